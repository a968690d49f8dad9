//! Where the converted image goes.

use ublkimg_registry::{BlobSource, ClientOptions, Digest, Location, Pushed, Repository};

use crate::blob::Blob;
use crate::error::{Error, ErrorKind, Result};

/// A repository, and the tag that the image gets there.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) location: Location,
    pub(crate) repository: Repository,
}

impl Destination {
    /// # Errors
    /// `Usage` for a digest, which cannot be pushed to.
    pub(crate) async fn open(location: &Location, client: &ClientOptions) -> Result<Self> {
        if let Location::Registry(reference) = location
            && (reference.tag().is_none() || reference.digest().is_some())
        {
            return Err(Error::new(ErrorKind::Usage, format!("{location}: the destination needs a tag, not a digest")));
        }
        let repository = Repository::open(location, client).await?.without_mirrors();
        Ok(Self { location: location.clone(), repository })
    }

    /// `HOST/NAME` of a repository in a registry; what blobs can be linked from.
    pub(crate) fn name_of(location: &Location) -> Option<String> {
        match location {
            Location::Registry(reference) => Some(format!("{}/{}", reference.registry(), reference.repository())),
            Location::Layout { .. } => None,
        }
    }

    pub(crate) fn name(&self) -> Option<String> {
        Self::name_of(&self.location)
    }

    /// The name inside the registry of `other`, `HOST/NAME`, if blobs can be linked from it.
    fn neighbour<'a>(&self, other: &'a str) -> Option<&'a str> {
        let Location::Registry(own) = &self.location else { return None };
        let name = other.strip_prefix(own.registry())?.strip_prefix('/')?;
        (name != own.repository()).then_some(name)
    }

    /// Whether the blob is there. If not, it is linked from `other`, `HOST/NAME`, where that is possible.
    ///
    /// # Errors
    /// Those of the connection.
    pub(crate) async fn has(&self, blob: &Digest, other: Option<&str>) -> Result<bool> {
        if self.repository.has_blob(blob).await? {
            return Ok(true);
        }
        let Some(name) = other.and_then(|other| self.neighbour(other)) else { return Ok(false) };
        match self.repository.mount_blob(blob, name).await.map_err(Error::from) {
            Err(error) if error.kind() == ErrorKind::Unavailable => Err(error),
            // A repository that may not be read is one that has nothing for us.
            linked => Ok(linked.unwrap_or(false)),
        }
    }

    pub(crate) async fn push(&self, blob: &Blob) -> Result<Pushed> {
        let source = BlobSource::File(blob.path());
        Ok(self.repository.push_blob(&Digest(blob.digest.0), blob.size_bytes, source, None).await?)
    }
}
