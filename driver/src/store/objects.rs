//! Small things kept whole: manifests and metadata blobs under their digests, metadata images under the digest of the
//! blob that they were made from.

use std::fs::{self, File};
use std::io::ErrorKind as IoErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use ublkimg_image::Sha256;
use ublkimg_registry::erofs_manifest::METADATA_BYTES_MAX;

use super::{HeldObject, Store, disk};
use crate::error::{Error, Result};

/// The longest object: a metadata blob, which is read whole into memory.
pub const OBJECT_BYTES_MAX: u64 = METADATA_BYTES_MAX;

impl Store {
    /// Holds an object: an image that is attached does, before it looks for it.
    pub(crate) fn hold(&self, digest: Sha256) -> HeldObject {
        self.held.hold(digest)
    }

    /// Keeps an object; it is durable a moment later, or after [`Store::sync`]. The caller has checked that `bytes` have this digest.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn put_object(&self, digest: Sha256, bytes: &[u8]) -> Result<()> {
        // One that is here may be durable already.
        if self.object(digest)?.is_some() {
            return Ok(());
        }
        self.replace_and_sync_later(self.layout.object(digest), &[bytes])
    }

    /// An object, checked against its digest; `None` if it is not here, or not what it should be.
    ///
    /// # Errors
    /// `Io`.
    pub fn object(&self, digest: Sha256) -> Result<Option<Vec<u8>>> {
        let path = self.layout.object(digest);
        let Some(file) = open_if_there(&path)? else { return Ok(None) };
        let len_bytes = file.metadata().map_err(|error| Error::path("read", &path, error))?.len();
        if len_bytes > OBJECT_BYTES_MAX {
            return Ok(None);
        }
        let bytes = fs::read(&path).map_err(|error| Error::path("read", &path, error))?;
        if Sha256::of(&bytes) != digest {
            tracing::error!("store: object {digest} is damaged, and is taken for absent");
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    /// A part of an object as it lies here, unchecked; `None` if it is not here or shorter.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn object_part(&self, digest: Sha256, range: Range<u64>) -> Result<Option<Vec<u8>>> {
        let path = self.layout.object(digest);
        let Some(file) = open_if_there(&path)? else { return Ok(None) };
        let failed = |error| Error::path("read", &path, error);
        if file.metadata().map_err(failed)?.len() < range.end || range.end > OBJECT_BYTES_MAX {
            return Ok(None);
        }
        let mut part = vec![0; usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0)];
        file.read_exact_at(&mut part, range.start).map_err(failed)?;
        Ok(Some(part))
    }

    /// Keeps a metadata image as it is served, under the digest of its blob, as [`Store::put_object`] does.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn put_metadata(&self, blob: Sha256, image: &[u8]) -> Result<()> {
        self.replace_and_sync_later(self.layout.metadata(blob), &[image])
    }

    /// Writes a metadata image over the one that is there, for those too that have it open. What a crash leaves of it is looked
    /// at when it is opened again.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub(crate) fn overwrite_metadata(&self, blob: Sha256, image: &[u8]) -> Result<()> {
        let path = self.layout.metadata(blob);
        let written = disk::open(&path).and_then(|file| {
            disk::write_all_at(&path, &file, image, 0)?;
            disk::set_len(&path, &file, image.len() as u64)
        });
        written.map_err(|error| Error::path("write", &path, error))?;
        self.sync_later(path);
        Ok(())
    }

    /// A metadata image as it is served.
    ///
    /// # Errors
    /// `Io`.
    pub fn metadata(&self, blob: Sha256) -> Result<Option<File>> {
        open_if_there(&self.layout.metadata(blob))
    }
}

pub(super) fn open_if_there(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == IoErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::path("open", path, error)),
    }
}
