//! From the name of an image to a [`ServedImage`]: everything before there is a device.
//!
//! By tag it takes three requests in sequence, whatever the number of layers: the index, the manifest, the metadata blob,
//! which brings the chunk indexes of all layer blobs along; by the manifest's digest it takes two, and none for what the
//! store has. Each thing is checked against what named it before it is used: the manifest against its digest, the
//! metadata blob against the manifest, each chunk index against the manifest, the device table against the indexes.
//!
//! All of it is kept in the store, so [`reopen`] needs no registry.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use ublkimg_image::{ChunkIndex, Sha256};
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, choose};
use ublkimg_registry::{ClientOptions, Digest, Location, Repository};
use ublkimg_scheduler::BlobKind;

use crate::counters::ImageCounters;
use crate::engine::{Attachment, Engine, NewBlob};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::Source;
use crate::image::{ServedBlob, ServedImage};
use crate::store::Store;

mod prepare;

use prepare::{Prepared, PreparedBlob};

/// How an image is attached.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// Which of the images that a tag names.
    pub platform: Platform,
    /// How to talk to the registry. Its `retry_deadline` is replaced by `attach_deadline`.
    pub client: ClientOptions,
    /// How long attaching may take.
    pub attach_deadline: Duration,
    /// How long a read waits for a registry that does not answer, before it fails with EIO.
    pub read_deadline: Duration,
}

impl Default for AttachOptions {
    /// The platform of this machine; 60 s to attach, 300 s for a read.
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            client: ClientOptions::default(),
            attach_deadline: Duration::from_secs(60),
            read_deadline: Duration::from_secs(300),
        }
    }
}

/// An attached image and what it is.
#[derive(Debug)]
pub struct LoadedImage {
    /// What a device serves.
    pub image: Arc<ServedImage>,
    /// Names the image for [`reopen`].
    pub manifest_digest: Digest,
    /// The manifest.
    pub manifest: ErofsManifest,
}

/// Attaches the image that `location` names now. Runs on any tokio runtime.
///
/// # Errors
/// `NotFound`, `Unauthorized`, `Unavailable` and `TimedOut` from the registry; `NotOurs` for an image of another format;
/// `Corrupt` when something is not what names it; `Busy` with too many images; those of the store.
pub async fn attach(
    store: &Arc<Store>,
    engine: &Engine,
    location: &Location,
    options: &AttachOptions,
) -> Result<LoadedImage> {
    let attached = async {
        let attaching = Attaching::new(store, engine, location, options).await?;
        let (manifest_digest, manifest) = attaching.manifest(&options.platform).await?;
        let manifest = parse(manifest_digest, &manifest)?;
        let blob = attaching.metadata_blob(&manifest).await?;
        attaching.serve(manifest_digest, manifest, blob).await
    };
    let timed_out = || {
        let seconds = options.attach_deadline.as_secs();
        Error::new(ErrorKind::TimedOut, format!("attach {location}: not done after {seconds} s"))
    };
    let attached = tokio::time::timeout(options.attach_deadline, attached).await;
    attached.map_err(|_| timed_out())?.map_err(|error| about(location, error))
}

/// Attaches an image that was attached before, without the registry; `location` is where its chunks are fetched from,
/// should some be missing.
///
/// # Errors
/// `NotFound` when the store does not have the image; otherwise as [`attach`].
pub async fn reopen(
    store: &Arc<Store>,
    engine: &Engine,
    location: &Location,
    manifest_digest: Digest,
    options: &AttachOptions,
) -> Result<LoadedImage> {
    let attaching = Attaching::new(store, engine, location, options).await?;
    let not_here = |digest: Digest| Error::new(ErrorKind::NotFound, format!("{digest} is not in the store"));
    let manifest = attaching.stored(manifest_digest).await?.ok_or_else(|| not_here(manifest_digest))?;
    let manifest = parse(manifest_digest, &manifest)?;
    let digest = manifest.metadata.digest;
    let blob = attaching.stored(digest).await?.ok_or_else(|| not_here(digest))?;
    attaching.serve(manifest_digest, manifest, blob).await
}

/// What attaching one image works with. The engine knows the image from the start, and forgets it if this is dropped.
struct Attaching<'a> {
    store: &'a Arc<Store>,
    location: &'a Location,
    repository: Repository,
    read_deadline: Duration,
    counters: Arc<ImageCounters>,
    attachment: Attachment,
    attached: watch::Receiver<()>,
}

impl<'a> Attaching<'a> {
    async fn new(
        store: &'a Arc<Store>,
        engine: &'a Engine,
        location: &'a Location,
        options: &AttachOptions,
    ) -> Result<Self> {
        let client = ClientOptions { retry_deadline: options.attach_deadline, ..options.client.clone() };
        let repository = Repository::open(location, &client).await;
        let repository = repository.map_err(|error| Error::registry(format!("open {location}"), error))?;
        let (attached, receiver) = watch::channel(());
        let attachment = engine.handle().add_image(link_name(location, &client), attached).await?;
        Ok(Self {
            store,
            location,
            repository,
            read_deadline: options.read_deadline,
            counters: Arc::default(),
            attachment,
            attached: receiver,
        })
    }

    /// The manifest that the location names, kept in the store.
    async fn manifest(&self, platform: &Platform) -> Result<(Digest, Bytes)> {
        if let Location::Registry(reference) = self.location
            && let Some(digest) = reference.digest()
            && let Some(manifest) = self.stored(digest).await?
        {
            return Ok((digest, manifest));
        }
        let what = || format!("resolve {}", self.location);
        self.count_request();
        let resolved = self.repository.resolve().await.map_err(|error| Error::registry(what(), error))?;
        self.count_bytes(resolved.bytes.len());
        let is_index = matches!(resolved.media_type.as_str(), MEDIA_TYPE_INDEX | MEDIA_TYPE_DOCKER_LIST);
        let (digest, manifest) = if is_index {
            let chosen = choose(&resolved.bytes, platform).map_err(|error| bad_manifest(resolved.digest, error))?;
            match self.stored(chosen.digest).await? {
                Some(manifest) => return Ok((chosen.digest, manifest)),
                None => (chosen.digest, self.fetch_manifest(chosen.digest).await?),
            }
        } else {
            (resolved.digest, resolved.bytes)
        };
        // What is not ours does not go into the store.
        parse(digest, &manifest)?;
        self.keep(digest, manifest.clone()).await?;
        Ok((digest, manifest))
    }

    async fn fetch_manifest(&self, digest: Digest) -> Result<Bytes> {
        self.count_request();
        let manifest = self.repository.manifest(&digest).await;
        let manifest = manifest.map_err(|error| Error::registry(format!("fetch manifest {digest}"), error))?;
        self.count_bytes(manifest.len());
        Ok(manifest)
    }

    /// The metadata blob, from the store or into it.
    async fn metadata_blob(&self, manifest: &ErofsManifest) -> Result<Bytes> {
        let reference = &manifest.metadata;
        if let Some(blob) = self.stored(reference.digest).await? {
            return Ok(blob);
        }
        let what = || format!("fetch metadata blob {}", reference.digest);
        self.count_request();
        let reader = self.repository.blob(&reference.digest, reference.size_bytes).await;
        let mut reader = reader.map_err(|error| Error::registry(what(), error))?;
        let mut blob = Vec::new();
        // The manifest bounds the size, and the reader ends there; it fails if the digest differs.
        reader.read_to_end(&mut blob).await.map_err(|error| match error.downcast() {
            Ok(error) => Error::registry(what(), error),
            Err(error) => Error::io(what(), error),
        })?;
        self.count_bytes(blob.len());
        let blob = Bytes::from(blob);
        self.keep(reference.digest, blob.clone()).await?;
        Ok(blob)
    }

    /// The last step: the blobs are made known to the engine, and the image can be read.
    async fn serve(self, manifest_digest: Digest, manifest: ErofsManifest, metadata_blob: Bytes) -> Result<LoadedImage> {
        let (store, of_blocking) = (Arc::clone(self.store), manifest.clone());
        let prepared = blocking(move || Prepared::new(&store, &of_blocking, &metadata_blob)).await?;
        let new_blob = |(blob, digest): (&PreparedBlob, Digest)| NewBlob {
            kind: BlobKind::Layer,
            file: Arc::clone(&blob.file),
            source: self.source(digest, &blob.index),
            entries: blob.entries.clone(),
        };
        let new = prepared.blobs.iter().zip(manifest.layers.iter().map(|layer| layer.digest)).map(new_blob).collect();
        let added = self.attachment.engine.add_blobs(self.attachment.image, new).await?;
        let blobs = prepared.blobs.into_iter().zip(added);
        let blobs = blobs.map(|(blob, added)| ServedBlob::new(added.key, blob.file, blob.index)).collect();
        let metadata = Arc::new(prepared.metadata);
        let (counters, attachment) = (Arc::clone(&self.counters), Some(self.attachment));
        let image = ServedImage::new(metadata, prepared.metadata_blocks, blobs, None, counters, attachment)?;
        Ok(LoadedImage { image: Arc::new(image), manifest_digest, manifest })
    }

    /// This image's repository as a source of a blob's chunks.
    fn source(&self, blob: Digest, index: &Arc<ChunkIndex>) -> Arc<Source> {
        Arc::new(Source {
            repository: self.repository.clone(),
            blob,
            index: Arc::clone(index),
            read_deadline: self.read_deadline,
            counters: Arc::clone(&self.counters),
            attached: self.attached.clone(),
        })
    }

    async fn stored(&self, digest: Digest) -> Result<Option<Bytes>> {
        let store = Arc::clone(self.store);
        blocking(move || Ok(store.object(Sha256(digest.0))?.map(Bytes::from))).await
    }

    async fn keep(&self, digest: Digest, bytes: Bytes) -> Result<()> {
        let store = Arc::clone(self.store);
        blocking(move || store.put_object(Sha256(digest.0), &bytes)).await
    }

    fn count_request(&self) {
        self.counters.registry_requests.fetch_add(1, Ordering::Relaxed);
    }

    fn count_bytes(&self, len_bytes: usize) {
        self.counters.fetched_bytes.fetch_add(len_bytes as u64, Ordering::Relaxed);
    }
}

fn parse(digest: Digest, manifest: &[u8]) -> Result<ErofsManifest> {
    ErofsManifest::parse(manifest).map_err(|error| bad_manifest(digest, error))
}

/// Names the link to a registry host; a directory is one of its own.
fn link_name(location: &Location, client: &ClientOptions) -> String {
    match location {
        Location::Registry(reference) if client.plain_http => format!("http://{}", reference.registry()),
        Location::Registry(reference) => format!("https://{}", reference.registry()),
        Location::Layout { dir, .. } => format!("oci:{}", dir.display()),
    }
}

/// Makes sure that an error names what the user asked for.
fn about(location: &Location, error: Error) -> Error {
    let name = location.to_string();
    if error.chain().contains(&name) { error } else { Error::caused(error.kind(), format!("attach {name}"), error) }
}

/// A manifest that breaks a rule is the producer's fault, not the user's.
fn bad_manifest(digest: Digest, error: ublkimg_registry::Error) -> Error {
    match error.kind() {
        ublkimg_registry::ErrorKind::Invalid => Error::caused(ErrorKind::Corrupt, format!("manifest {digest}"), error),
        _ => Error::registry(format!("manifest {digest}"), error),
    }
}

/// Runs work that may block on the disk or take long.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::caused(ErrorKind::Internal, "attaching was interrupted", error))?
}
