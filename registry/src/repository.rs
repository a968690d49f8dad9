//! The one interface: an image repository, wherever it is.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

use crate::blob::{BlobReader, BlobSource, LastTrouble, RangeStream};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::mirrors::Mirrored;
use crate::options::ClientOptions;
use crate::reference::Location;

mod profiles;
mod referrers;

pub use profiles::{NewProfile, PushedProfile};

/// A piece of a range that is streamed from a file: one read on a blocking thread.
const PIECE_BYTES: u64 = 1 << 20;

/// An image repository: manifests and blobs by digest, and the manifest that the location names.
///
/// Cheap to clone; clones share connections, tokens and the bound on requests in flight. A layout directory is created by
/// the first push into it.
#[derive(Debug, Clone)]
pub struct Repository(Arc<Opening>);

/// What is opened once, at the latest when it is used.
#[derive(Debug)]
struct Opening {
    location: Location,
    options: ClientOptions,
    opened: OnceLock<Inner>,
}

#[derive(Debug, Clone)]
enum Inner {
    Layout(Layout),
    Remote(Arc<Mirrored>),
}

impl Opening {
    fn open(&self) -> Result<&Inner> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let opened = match &self.location {
            Location::Layout { dir, tag } => Inner::Layout(Layout::new(dir, tag.as_deref())),
            Location::Registry(reference) => Inner::Remote(Arc::new(Mirrored::new(reference, &self.options)?)),
        };
        Ok(self.opened.get_or_init(|| opened))
    }
}

/// What a location names at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// SHA-256 of `bytes`; equals the digest in the reference when it has one.
    pub digest: Digest,
    /// The media type as the registry or the layout's index states it.
    pub media_type: String,
    /// The manifest or index, byte for byte.
    pub bytes: Bytes,
}

/// How a blob came to be in the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pushed {
    /// It was there already.
    Existed,
    /// The registry linked it from another of its repositories.
    Mounted,
    /// Its bytes were sent.
    Uploaded,
}

impl Repository {
    /// Prepares access. Sends nothing yet and reads no credentials: trouble shows at the first use.
    ///
    /// # Errors
    /// `Invalid` when the options do not fit the location, or for a `hosts.toml` that is malformed; `Io` for one that cannot
    /// be read.
    #[expect(clippy::unused_async, reason = "the interface leaves room for a first contact")]
    pub async fn open(location: &Location, options: &ClientOptions) -> Result<Self> {
        let repository = Self::open_later(location, options);
        repository.0.open()?;
        Ok(repository)
    }

    /// The same, at the first use that finds the configuration usable. Until then each use is `Unavailable`.
    #[must_use]
    pub fn open_later(location: &Location, options: &ClientOptions) -> Self {
        let (location, options) = (location.clone(), options.clone());
        Self(Arc::new(Opening { location, options, opened: OnceLock::new() }))
    }

    /// The same repository without the mirrors of its registry, for what is read in order to be written: a mirror may be
    /// behind.
    #[must_use]
    pub fn without_mirrors(&self) -> Self {
        let Ok(Inner::Remote(remote)) = self.0.open() else { return self.clone() };
        let (location, options) = (self.0.location.clone(), self.0.options.clone());
        let opened = OnceLock::from(Inner::Remote(Arc::new(remote.without_mirrors())));
        Self(Arc::new(Opening { location, options, opened }))
    }

    /// To be called when bytes of a blob are not what somebody vouches for, and a mirror may have sent them: no mirror is asked
    /// for this blob for a minute. The same repository without its mirrors, which is worth asking then; `None` without mirrors.
    #[must_use]
    pub fn distrust_mirrors(&self, digest: &Digest) -> Option<Self> {
        let Ok(Inner::Remote(remote)) = self.0.open() else { return None };
        remote.distrust(digest).then(|| self.without_mirrors())
    }

    fn inner(&self) -> Result<&Inner> {
        self.0.open().map_err(|error| Error::unavailable(error.to_string()).with_source(error))
    }

    /// The manifest or index that the location names: one request to a registry.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a layout without a tag that holds several; `Corrupt` when the bytes do not have the digest
    /// that the reference or the registry gives; `TooLarge` above [`crate::MAX_MANIFEST_BYTES`]; and those of the
    /// connection.
    pub async fn resolve(&self) -> Result<Resolved> {
        match self.inner()? {
            Inner::Layout(layout) => blocking(layout, Layout::resolve).await,
            Inner::Remote(remote) => remote.resolve().await,
        }
    }

    /// The manifest or index with this digest, verified.
    ///
    /// # Errors
    /// As [`Repository::resolve`].
    pub async fn manifest(&self, digest: &Digest) -> Result<Bytes> {
        let digest = *digest;
        match self.inner()? {
            Inner::Layout(layout) => blocking(layout, move |layout| layout.manifest(&digest)).await,
            Inner::Remote(remote) => remote.manifest(&digest).await,
        }
    }

    /// Exactly these bytes of a blob, **not** verified against its digest: that takes the whole blob. An empty range is
    /// answered without a request.
    ///
    /// # Errors
    /// `NotFound` without such a blob; `Corrupt` when the blob ends before the range does, or the registry keeps answering
    /// with something else; `Invalid` for a range that ends before it starts; and those of the connection.
    pub async fn blob_range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let digest = *digest;
        if range.start > range.end {
            return Err(Error::invalid(format!("range {}..{} of blob {digest}", range.start, range.end)));
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        match self.inner()? {
            Inner::Layout(layout) => blocking(layout, move |layout| layout.blob_range(&digest, range)).await,
            Inner::Remote(remote) => remote.blob_range(&digest, range).await,
        }
    }

    /// The same for a long range, as a stream that is read only as fast as it is pulled. After a broken connection it asks
    /// for the missing rest. Nothing is asked before the first pull; what would be an error here is the stream's first item.
    #[must_use]
    pub fn blob_stream(&self, digest: &Digest, range: Range<u64>) -> RangeStream {
        let digest = *digest;
        if range.start > range.end {
            let error = Error::invalid(format!("range {}..{} of blob {digest}", range.start, range.end));
            return RangeStream::new(stream::iter([Err(error)]).boxed(), LastTrouble::default());
        }
        let trouble = LastTrouble::default();
        let pieces = match self.inner() {
            Ok(Inner::Layout(layout)) => layout_stream(layout.clone(), digest, range),
            Ok(Inner::Remote(remote)) => remote.blob_stream(digest, range, trouble.clone()),
            Err(error) => stream::iter([Err(error)]).boxed(),
        };
        RangeStream::new(pieces, trouble)
    }

    /// A whole blob from its start. The reader resumes after a broken connection, and fails at the end, instead of
    /// reporting the end, when the bytes are not `size_bytes` long or do not have the digest.
    ///
    /// # Errors
    /// `NotFound` and those of the connection, here or wrapped in the reader's [`std::io::Error`].
    pub async fn blob(&self, digest: &Digest, size_bytes: u64) -> Result<BlobReader> {
        let digest = *digest;
        match self.inner()? {
            Inner::Layout(layout) => {
                let file = blocking(layout, move |layout| layout.open_blob(&digest, size_bytes)).await?;
                Ok(BlobReader::of_file(tokio::fs::File::from_std(file), digest, size_bytes))
            }
            Inner::Remote(remote) => remote.blob(digest, size_bytes).await,
        }
    }

    /// Whether the repository has the blob.
    ///
    /// # Errors
    /// Those of the connection; a missing blob is none.
    pub async fn has_blob(&self, digest: &Digest) -> Result<bool> {
        let digest = *digest;
        match self.inner()? {
            Inner::Layout(layout) => blocking(layout, move |layout| Ok(layout.has_blob(&digest))).await,
            Inner::Remote(remote) => remote.registry().has_blob(&digest).await,
        }
    }

    /// Makes the repository have the blob: nothing is sent when it is there or can be linked from the repository
    /// `mount_from` of the same registry.
    ///
    /// # Errors
    /// `Corrupt` when `source` does not have this digest and size; `Io` when it cannot be read; and those of the
    /// connection.
    pub async fn push_blob(
        &self,
        digest: &Digest,
        size_bytes: u64,
        source: BlobSource,
        mount_from: Option<&str>,
    ) -> Result<Pushed> {
        let digest = *digest;
        match self.inner()? {
            Inner::Layout(layout) => {
                blocking(layout, move |layout| layout.push_blob(&digest, size_bytes, &source)).await
            }
            Inner::Remote(remote) => remote.registry().push_blob(&digest, size_bytes, &source, mount_from).await,
        }
    }

    /// Links the blob from the repository `from` of the same registry, sending no bytes; `false` when it is not there, or not
    /// for us. A layout directory is one repository: nothing to link from.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn mount_blob(&self, digest: &Digest, from: &str) -> Result<bool> {
        match self.inner()? {
            Inner::Layout(_) => Ok(false),
            Inner::Remote(remote) => remote.registry().mount_blob(digest, from).await,
        }
    }

    /// Stores a manifest or index under `tag`, or by its digest alone. In a layout directory a manifest without a tag is
    /// listed in `index.json` too, unless an index there lists it: an index pushed after its manifests takes their place.
    ///
    /// # Errors
    /// `TooLarge` above [`crate::MAX_MANIFEST_BYTES`]; `Corrupt` when the registry stored something else; and those of the
    /// connection.
    pub async fn push_manifest(&self, media_type: &str, bytes: Bytes, tag: Option<&str>) -> Result<Digest> {
        if bytes.len() > crate::MAX_MANIFEST_BYTES {
            return Err(Error::too_large(format!("a manifest of {} bytes; the limit is 4 MiB", bytes.len())));
        }
        match self.inner()? {
            Inner::Layout(layout) => {
                let (media_type, tag) = (media_type.to_owned(), tag.map(str::to_owned));
                blocking(layout, move |layout| layout.push_manifest(&media_type, &bytes, tag.as_deref())).await
            }
            Inner::Remote(remote) => remote.registry().push_manifest(media_type, bytes, tag).await,
        }
    }
}

fn layout_stream(layout: Layout, digest: Digest, range: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
    let pieces = stream::try_unfold(range.start, move |at| {
        let (layout, end) = (layout.clone(), range.end);
        async move {
            if at >= end {
                return Ok(None);
            }
            let next = end.min(at + PIECE_BYTES);
            let piece = blocking(&layout, move |layout| layout.blob_range(&digest, at..next)).await?;
            Ok(Some((piece, next)))
        }
    });
    pieces.boxed()
}

/// Runs file work where it may block.
async fn blocking<T, W>(layout: &Layout, work: W) -> Result<T>
where
    T: Send + 'static,
    W: FnOnce(&Layout) -> Result<T> + Send + 'static,
{
    let layout = layout.clone();
    match tokio::task::spawn_blocking(move || work(&layout)).await {
        Ok(result) => result,
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(stopped) => Err(Error::unavailable("the program is shutting down").with_source(stopped)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send<T: Send>(_: &T) {}

    /// Callers spawn these; what they hold must be able to move between threads.
    #[tokio::test]
    async fn futures_can_be_spawned() {
        let options = ClientOptions::default();
        let repository = Repository::open(&"oci:/nonexistent/layout".parse().unwrap(), &options).await.unwrap();
        let digest = Digest::of(b"");
        send(&repository.resolve());
        send(&repository.manifest(&digest));
        send(&repository.blob_range(&digest, 0..1));
        send(&repository.blob_stream(&digest, 0..1).next());
        send(&repository.referrers(&digest, None));
        send(&repository.find_profile(None, &digest, &crate::profile::ProfileChoice::Auto, None));
        send(&repository.has_blob(&digest));
        send(&repository.push_blob(&digest, 0, BlobSource::Bytes(Bytes::new()), None));
        send(&repository.push_manifest("", Bytes::new(), None));
        let blob = repository.blob(&digest, 1);
        send(&blob);
        send(&blob.await.unwrap_err());
    }
}
