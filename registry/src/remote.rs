//! A repository in an OCI distribution registry.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::blob::{BlobReader, BlobSource};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::options::ClientOptions;
use crate::reference::Reference;
use crate::repository::{Pushed, Resolved};

#[derive(Debug)]
pub(crate) struct Remote {}

impl Remote {
    pub(crate) fn new(reference: &Reference, _options: &ClientOptions) -> Result<Self> {
        Err(Error::unavailable(format!("{}: registries cannot be reached yet", reference.registry())))
    }
    pub(crate) async fn resolve(&self) -> Result<Resolved> {
        unreachable!()
    }
    pub(crate) async fn manifest(&self, _digest: &Digest) -> Result<Bytes> {
        unreachable!()
    }
    pub(crate) async fn blob_range(&self, _digest: &Digest, _range: Range<u64>) -> Result<Bytes> {
        unreachable!()
    }
    pub(crate) async fn blob(self: &Arc<Self>, _digest: Digest, _size_bytes: u64) -> Result<BlobReader> {
        unreachable!()
    }
    pub(crate) async fn has_blob(&self, _digest: &Digest) -> Result<bool> {
        unreachable!()
    }
    pub(crate) async fn push_blob(
        &self,
        _digest: &Digest,
        _size_bytes: u64,
        _source: &BlobSource,
        _mount_from: Option<&str>,
    ) -> Result<Pushed> {
        unreachable!()
    }
    pub(crate) async fn push_manifest(&self, _media_type: &str, _bytes: Bytes, _tag: Option<&str>) -> Result<Digest> {
        unreachable!()
    }
}
