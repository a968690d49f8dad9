//! What hangs on a manifest.

use bytes::Bytes;

use super::{Inner, Repository, blocking};
use crate::artifact::Artifact;
use crate::descriptor::{Descriptor, MEDIA_TYPE_MANIFEST};
use crate::digest::Digest;
use crate::error::{Error, Result};

impl Repository {
    /// The manifests that refer to `subject`, of one type or of all; at most about a thousand. A registry is asked through
    /// its referrers API and, if it has none, through the tag `sha256-<hex>`. None is not an error.
    ///
    /// # Errors
    /// `Corrupt` or `Invalid` for a list that is malformed; and those of the connection.
    pub async fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>> {
        match self.inner()? {
            Inner::Layout(layout) => {
                let (subject, wanted) = (*subject, artifact_type.map(str::to_owned));
                blocking(layout, move |layout| layout.referrers(&subject, wanted.as_deref())).await
            }
            Inner::Remote(remote) => remote.registry().referrers(subject, artifact_type).await,
        }
    }

    /// Stores a manifest that has a subject, so that [`Repository::referrers`] of the subject lists it. Its blobs must be
    /// there. A registry without the referrers API gets an index under the tag `sha256-<hex>` of the subject.
    ///
    /// # Errors
    /// `Invalid` for a manifest without a subject; and as [`Repository::push_manifest`].
    pub async fn push_referrer(&self, manifest: Bytes) -> Result<Digest> {
        if manifest.len() > crate::MAX_MANIFEST_BYTES {
            return Err(Error::too_large(format!("a manifest of {} bytes; the limit is 4 MiB", manifest.len())));
        }
        let artifact = Artifact::parse(&manifest)?;
        match self.inner()? {
            Inner::Layout(_) => self.push_manifest(MEDIA_TYPE_MANIFEST, manifest, None).await,
            Inner::Remote(remote) => {
                let listed = artifact.descriptor(&manifest);
                remote.registry().push_referrer(&manifest, &artifact.subject.digest, &listed).await
            }
        }
    }
}
