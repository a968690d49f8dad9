//! From the name of an image to a [`ServedImage`]: everything before there is a device.
//!
//! By tag it takes three requests in sequence, whatever the number of layers: the index, the manifest, the metadata blob,
//! which brings the chunk indexes of all layer blobs along; by the manifest's digest it takes two, and none for what the
//! store has. Each thing is checked against what named it before it is used: the manifest against its digest, the
//! metadata blob against the manifest, each chunk index against the manifest, the device table against the indexes.
//!
//! All of it is kept in the store, so [`reopen`] needs no registry.

use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{
    BLOCK_SIZE, Bundle, BundledLayer, ChunkIndex, DeviceMap, Geometry, Sha256, SkippableKind, flat_block0,
    read_geometry,
};
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, LayerRef, choose};
use ublkimg_registry::{ClientOptions, Digest, Location, Repository};
use ublkimg_scheduler::ChunkEntry;

use crate::counters::ImageCounters;
use crate::engine::{Engine, NewBlob, is_present};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::Source;
use crate::image::{Attachment, ServedBlob, ServedImage};
use crate::store::{BlobFile, Store};

/// Longest metadata image, in bytes, while it is decoded in memory: three to ten million files.
const METADATA_RAW_BYTES_MAX: u64 = 1 << 30;

/// Bytes of a stored metadata image that are compared at a time.
const COMPARE_BYTES: usize = 1 << 20;

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
    let attaching = Attaching::new(store, engine, location, options).await?;
    let attached = async {
        let (manifest_digest, manifest) = attaching.manifest(&options.platform).await?;
        let manifest = parse(manifest_digest, &manifest)?;
        let blob = attaching.metadata_blob(&manifest).await?;
        Ok((manifest_digest, attaching.prepare(&manifest, blob).await?, manifest))
    };
    let timed_out = || {
        let seconds = options.attach_deadline.as_secs();
        Error::new(ErrorKind::TimedOut, format!("attach {location}: not done after {seconds} s"))
    };
    let attached = tokio::time::timeout(options.attach_deadline, attached).await;
    let (manifest_digest, prepared, manifest) =
        attached.map_err(|_| timed_out())?.map_err(|error| about(location, error))?;
    // Not under the deadline: an image that is registered while nobody waits any more would stay for ever.
    attaching.register(manifest_digest, prepared, manifest).await
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
    let prepared = attaching.prepare(&manifest, blob).await?;
    attaching.register(manifest_digest, prepared, manifest).await
}

/// What attaching one image works with.
struct Attaching<'a> {
    store: &'a Arc<Store>,
    engine: &'a Engine,
    location: &'a Location,
    repository: Repository,
    read_deadline: Duration,
    counters: Arc<ImageCounters>,
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
        let counters = Arc::default();
        Ok(Self { store, engine, location, repository, read_deadline: options.read_deadline, counters })
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

    async fn prepare(&self, manifest: &ErofsManifest, blob: Bytes) -> Result<Prepared> {
        let (store, of_blocking) = (Arc::clone(self.store), manifest.clone());
        blocking(move || Prepared::new(&store, &of_blocking, &blob)).await
    }

    /// Makes the blobs known to the engine.
    async fn register(
        &self,
        manifest_digest: Digest,
        prepared: Prepared,
        manifest: ErofsManifest,
    ) -> Result<LoadedImage> {
        let (attached, receiver) = watch::channel(());
        let source = |layer: &LayerRef, index: &Arc<ChunkIndex>| Source {
            repository: self.repository.clone(),
            blob: layer.digest,
            index: Arc::clone(index),
            read_deadline: self.read_deadline,
            counters: Arc::clone(&self.counters),
            attached: receiver.clone(),
        };
        let new = prepared.blobs.iter().zip(&manifest.layers).map(|(blob, layer)| NewBlob {
            file: Arc::clone(&blob.file),
            source: Arc::new(source(layer, &blob.index)),
            entries: blob.entries.clone(),
        });
        let keys = self.engine.handle().attach(new.collect(), attached).await?;
        let attachment = Attachment { engine: self.engine.handle().clone(), image: keys.image };
        let blobs = prepared.blobs.into_iter().zip(keys.blobs);
        let blobs = blobs.map(|(blob, key)| ServedBlob::new(key, blob.file, blob.index)).collect();
        let (metadata, counters) = (Arc::new(prepared.metadata), Arc::clone(&self.counters));
        let image = ServedImage::new(metadata, prepared.metadata_blocks, blobs, counters, Some(attachment))?;
        Ok(LoadedImage { image: Arc::new(image), manifest_digest, manifest })
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

/// A checked image with its files open.
struct Prepared {
    metadata: std::fs::File,
    metadata_blocks: u32,
    blobs: Vec<PreparedBlob>,
}

struct PreparedBlob {
    file: Arc<BlobFile>,
    index: Arc<ChunkIndex>,
    entries: Vec<ChunkEntry>,
}

impl Prepared {
    /// `blob` is the metadata blob, which has the digest that the manifest names.
    fn new(store: &Store, manifest: &ErofsManifest, blob: &[u8]) -> Result<Self> {
        let digest = manifest.metadata.digest;
        let corrupt = |why: &str| Error::new(ErrorKind::Corrupt, format!("metadata blob {digest}: {why}"));
        let frames = part(blob, 0..manifest.metadata.bundle_range.start).ok_or_else(|| corrupt("too short"))?;
        let bundle = part(blob, manifest.metadata.bundle_range.clone()).ok_or_else(|| corrupt("too short"))?;
        let bundle = skippable_payload(SkippableKind::Ublkimg, bundle).and_then(Bundle::decode);
        let bundle = bundle.map_err(|error| bad_format(digest, error))?;
        check_bundle(&bundle, &manifest.layers)?;
        let mut metadata = decode_metadata(frames).map_err(|error| {
            Error::caused(ErrorKind::Corrupt, format!("metadata blob {digest} does not decode"), error)
        })?;
        let geometry = read_geometry(&metadata).map_err(|error| bad_format(digest, error))?;
        check_geometry(&geometry, &bundle, digest)?;
        let blob_blocks: Vec<u32> = geometry.devices.iter().map(|device| device.blocks).collect();
        let map = DeviceMap::new(geometry.metadata_blocks, &blob_blocks);
        let total_blocks = map.map_err(|error| bad_format(digest, error))?.total_blocks();
        let block0 = metadata.first_chunk_mut::<BLOCK_SIZE>().ok_or_else(|| corrupt("empty"))?;
        *block0 = flat_block0(block0, total_blocks).map_err(|error| bad_format(digest, error))?;
        let metadata = open_metadata(store, Sha256(digest.0), &metadata)?;
        let blobs = bundle.layers.into_iter().zip(&manifest.layers);
        let blobs = blobs.map(|(bundled, layer)| PreparedBlob::open(store, bundled, layer)).collect::<Result<_>>()?;
        Ok(Self { metadata, metadata_blocks: geometry.metadata_blocks, blobs })
    }
}

impl PreparedBlob {
    fn open(store: &Store, bundled: BundledLayer, layer: &LayerRef) -> Result<Self> {
        let index = bundled.index;
        let file = store.blob(Sha256(layer.index_digest.0), index.raw_len_blocks())?;
        let entry = |chunk: ublkimg_image::Chunk| ChunkEntry {
            stored_offset_bytes: chunk.stored.start,
            // The index bounds a stored chunk to 260 KiB.
            stored_len_bytes: u32::try_from(chunk.stored.end - chunk.stored.start).unwrap_or(u32::MAX),
            present: is_present(&file, &index, chunk.index),
        };
        let entries = index.iter().map(entry).collect();
        Ok(Self { file, index: Arc::new(index), entries })
    }
}

/// The bundle must be about the blobs that the manifest lists, and each index the one that the manifest vouches for.
fn check_bundle(bundle: &Bundle, layers: &[LayerRef]) -> Result<()> {
    if bundle.layers.len() != layers.len() {
        let what = format!("the bundle has {} layers, the manifest {}", bundle.layers.len(), layers.len());
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    for (bundled, layer) in bundle.layers.iter().zip(layers) {
        let index_start = bundled.index.section_offset_bytes();
        let same = bundled.digest.0 == layer.digest.0
            && bundled.blob_len_bytes == layer.size_bytes
            && (index_start..layer.size_bytes) == layer.index_range
            && bundled.index.digest().0 == layer.index_digest.0;
        if !same {
            let what = format!("the bundle and the manifest differ about layer blob {}", layer.digest);
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
    }
    Ok(())
}

/// The device table must be about the same blobs with the same lengths.
fn check_geometry(geometry: &Geometry, bundle: &Bundle, digest: Digest) -> Result<()> {
    let devices = geometry.devices.iter().map(|device| (device.tag, device.blocks));
    let layers = bundle.layers.iter().map(|layer| (layer.digest, layer.index.raw_len_blocks()));
    if devices.eq(layers) {
        return Ok(());
    }
    let what = format!("metadata blob {digest}: its device table does not fit the layer blobs");
    Err(Error::new(ErrorKind::Corrupt, what))
}

fn decode_metadata(frames: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut metadata = Vec::new();
    let decoder = zstd::stream::read::Decoder::with_buffer(frames)?;
    decoder.take(METADATA_RAW_BYTES_MAX + 1).read_to_end(&mut metadata)?;
    if metadata.len() as u64 > METADATA_RAW_BYTES_MAX {
        return Err(std::io::Error::other(format!("longer than {METADATA_RAW_BYTES_MAX} bytes")));
    }
    Ok(metadata)
}

/// The metadata image as a file: what is there already, if it is `image` byte for byte, or `image` written now. The
/// file's name vouches for the blob that it was made from, not for what lies in it.
fn open_metadata(store: &Store, blob: Sha256, image: &[u8]) -> Result<std::fs::File> {
    if let Some(file) = store.metadata(blob)?
        && holds(&file, image)
    {
        return Ok(file);
    }
    store.put_metadata(blob, image)?;
    let gone = || Error::new(ErrorKind::Internal, format!("metadata image {blob} vanished from the store"));
    store.metadata(blob)?.ok_or_else(gone)
}

fn holds(file: &std::fs::File, image: &[u8]) -> bool {
    let mut part = vec![0; COMPARE_BYTES];
    let same_len = file.metadata().is_ok_and(|metadata| metadata.len() == image.len() as u64);
    let mut offset_bytes = 0;
    same_len
        && image.chunks(COMPARE_BYTES).all(|expected| {
            let part = &mut part[..expected.len()];
            let read = file.read_exact_at(part, offset_bytes);
            offset_bytes += expected.len() as u64;
            read.is_ok() && part == expected
        })
}

fn part(bytes: &[u8], range: Range<u64>) -> Option<&[u8]> {
    bytes.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

fn bad_format(digest: Digest, error: ublkimg_image::Error) -> Error {
    let kind = match error.kind() {
        ublkimg_image::ErrorKind::Unsupported => ErrorKind::NotOurs,
        _ => ErrorKind::Corrupt,
    };
    Error::caused(kind, format!("metadata blob {digest}"), error)
}

fn parse(digest: Digest, manifest: &[u8]) -> Result<ErofsManifest> {
    ErofsManifest::parse(manifest).map_err(|error| bad_manifest(digest, error))
}

/// A manifest that breaks a rule is the producer's fault, not the user's.
/// Makes sure that an error names what the user asked for.
fn about(location: &Location, error: Error) -> Error {
    let name = location.to_string();
    if error.chain().contains(&name) { error } else { Error::caused(error.kind(), format!("attach {name}"), error) }
}

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
