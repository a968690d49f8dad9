//! The whole conversion: layers one by one, then what binds them together, then the tag.

use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use ublkimg_image::{Bundle, BundledLayer, ChunkIndex, DeviceSlot, MergeRecord, Sha256, read_tree, write_merged};
use ublkimg_registry::descriptor::{
    Descriptor, Index, MEDIA_TYPE_CONFIG, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Platform,
};
use ublkimg_registry::erofs_manifest::{ErofsManifest, LayerRef, MetadataRef, OS_FEATURE_EROFS};
use ublkimg_registry::{BlobSource, ClientOptions, Digest, Location, Pushed, Repository};

use crate::background;
use crate::blob::{Blob, LayerBlob, from_image, write_layer_blob, write_metadata_blob};
use crate::compression::Decompressor;
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::frames::Compress;
use crate::hashing::HashingReader;
use crate::layer::{Layer, read_directory, read_tar};
use crate::merge::Merge;
use crate::progress::{Phase, Progress, Task};
use crate::source::{self, Image, LayerInput, Source, SourceLayer};
use crate::spool::Spool;

/// Layers under way at once: while one is compressed on all cores, the next is fetched and unpacked on one. More would
/// only take more memory and disk.
const LAYERS_AT_ONCE: usize = 2;

/// How to convert.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to talk to registries.
    pub client: ClientOptions,
    /// Which image of a multi-platform source; the host's by default.
    pub platform: Platform,
    /// Directory for temporary files without names; needs room for the largest two layers, unpacked and converted.
    /// `$TMPDIR` or `/var/tmp` by default, as `/tmp` is often memory.
    pub tmpdir: PathBuf,
    /// zstd level, 1 to 22. Part of the settings that decide the output.
    pub level: i32,
    /// Threads that compress; all cores by default. Does not change the output.
    pub threads: NonZeroUsize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            client: ClientOptions::default(),
            platform: Platform::host(),
            tmpdir: std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from),
            level: 3,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Digest of the image index, which the tag points at.
    pub digest: Digest,
    /// Digest of the manifest in it.
    pub manifest: Digest,
    /// What the image is for.
    pub platform: Platform,
    /// The layers, base first.
    pub layers: Vec<LayerSummary>,
    /// The metadata blob, in bytes as stored.
    pub metadata_bytes: u64,
    /// The metadata image, in bytes.
    pub metadata_raw_bytes: u64,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSummary {
    /// Digest of the source layer as it was stored; `None` for a directory.
    pub source: Option<Digest>,
    /// Bytes of the source layer as it was stored; of the files for a directory.
    pub source_bytes: u64,
    /// Digest of the layer blob.
    pub digest: Digest,
    /// Bytes of the layer blob.
    pub size_bytes: u64,
    /// Bytes of the layer blob decompressed.
    pub raw_bytes: u64,
    /// Number of chunks.
    pub chunks: u32,
    /// The destination had the blob already.
    pub existed: bool,
}

/// A layer that is in the destination.
struct Converted {
    summary: LayerSummary,
    index: ChunkIndex,
    reference: LayerRef,
    metadata: Vec<u8>,
    record: Vec<u8>,
}

/// What all steps need.
struct Context {
    options: Options,
    destination: Repository,
    progress: Arc<dyn Progress>,
    layers: usize,
    /// Set when nobody waits for the result any more.
    cancelled: Arc<AtomicBool>,
}

/// Sets the flag when the conversion is given up, so that work on other threads ends soon.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Converts the image at `source` and pushes it to `destination`, whose tag points at it when all is there.
///
/// # Errors
/// Every [`ErrorKind`]; the message names the image, layer and entry it is about. Nothing is left behind but blobs in
/// the destination that nothing refers to.
pub async fn convert(
    source: &Source,
    destination: &Location,
    options: &Options,
    progress: Arc<dyn Progress>,
) -> Result<Summary> {
    if let Location::Registry(reference) = destination
        && reference.tag().is_none()
    {
        return Err(Error::new(ErrorKind::Usage, format!("{destination}: the destination needs a tag, not a digest")));
    }
    let image = source::open(source, &options.client, &options.platform).await?;
    let cancelled = Arc::new(AtomicBool::new(false));
    let _cancel = CancelOnDrop(Arc::clone(&cancelled));
    let context = Arc::new(Context {
        options: options.clone(),
        destination: Repository::open(destination, &options.client).await?,
        progress,
        layers: image.layers.len(),
        cancelled,
    });
    let Image { config, platform, layers } = image;
    let converted: Vec<Converted> = stream::iter(layers.into_iter().enumerate())
        .map(|(number, layer)| convert_layer(Arc::clone(&context), number, layer))
        .buffered(LAYERS_AT_ONCE)
        .try_collect()
        .await?;
    finish(&context, config, platform, converted, destination.tag()).await
}

/// Reads, converts and pushes one layer.
async fn convert_layer(context: Arc<Context>, number: usize, layer: SourceLayer) -> Result<Converted> {
    let name = layer.name();
    let input = layer.open().await.map_err(|error| error.within(&name))?;
    let blocking = {
        let context = Arc::clone(&context);
        move || read_and_write(&context, number, &layer, input)
    };
    let (source, source_bytes, written) = background::run(blocking).await?.map_err(|error| error.within(&name))?;
    let LayerBlob { blob, index, metadata, record } = written;
    let task = context.task(Phase::Push, number);
    context.progress.start(&task, Some(blob.size_bytes));
    let pushed = context.push(&blob).await?;
    context.progress.advance(&task, blob.size_bytes);
    context.progress.finish(&task);
    tracing::debug!(layer = number, digest = %blob.digest, size_bytes = blob.size_bytes, ?pushed, "layer blob");
    Ok(Converted {
        summary: LayerSummary {
            source,
            source_bytes,
            digest: Digest(blob.digest.0),
            size_bytes: blob.size_bytes,
            raw_bytes: index.raw_len_bytes(),
            chunks: index.len(),
            existed: pushed != Pushed::Uploaded,
        },
        reference: LayerRef {
            digest: Digest(blob.digest.0),
            size_bytes: blob.size_bytes,
            index_range: blob.trailer.clone(),
            index_digest: Digest(index.digest().0),
            uncompressed_digest: Digest(blob.uncompressed_digest.0),
            source_layer: source,
        },
        index,
        metadata,
        record: record.encode().map_err(from_image)?,
    })
}

/// The blocking part: from the layer's bytes to its blob. Also returns digest and length of what was read.
fn read_and_write(
    context: &Context,
    number: usize,
    layer: &SourceLayer,
    input: LayerInput,
) -> Result<(Option<Digest>, u64, LayerBlob)> {
    let options = &context.options;
    check_room(&options.tmpdir, layer.size_bytes)?;
    let mut spool = Spool::new(&options.tmpdir)?;
    let task = context.task(Phase::Read, number);
    context.progress.start(&task, layer.size_bytes);
    let (digest, source_bytes, tree) = match input {
        LayerInput::Stream(stream) => {
            let watched = Watched { inner: stream, context, task: &task };
            let mut raw = HashingReader::new(watched);
            let tree = read_stream(&mut raw, layer, &mut spool)?;
            (Some(Digest(raw.digest().0)), raw.len_bytes(), tree)
        }
        LayerInput::Directory(path) => {
            let read = std::cell::Cell::new(0);
            let advance = |bytes| {
                read.set(read.get() + bytes);
                context.advance(&task, bytes)
            };
            let tree = read_directory(&path, &mut spool, &advance)?;
            (None, read.get(), tree)
        }
    };
    context.progress.finish(&task);
    context.check_cancelled()?;

    let task = context.task(Phase::Compress, number);
    context.progress.start(&task, Some(spool.len_bytes()));
    let how = Compress { level: options.level, threads: options.threads };
    let advance = |bytes| context.advance(&task, bytes);
    let blob = write_layer_blob(tree, &spool, &options.tmpdir, how, &advance)?;
    context.progress.finish(&task);
    Ok((digest, source_bytes, blob))
}

/// Unpacks a layer and checks its digests.
fn read_stream(raw: &mut HashingReader<impl Read>, layer: &SourceLayer, spool: &mut Spool) -> Result<Layer> {
    let tree = unpack(raw, spool);
    if tree.as_ref().is_err_and(|error| error.kind() != ErrorKind::BadSource) {
        return tree.map(|(tree, _)| tree);
    }
    // Bytes that make no sense may have come to harm on the way: then it is their digest that is wrong. Either way all
    // of the layer must have been seen.
    io::copy(raw, &mut io::sink()).map_err(|error| Error::io("reading the layer", error))?;
    if let Some(expected) = layer.digest
        && raw.digest().0 != expected.0
    {
        let message = format!("its bytes have the digest {}", raw.digest());
        return Err(Error::new(ErrorKind::VerificationFailed, message));
    }
    let (tree, diff_id) = tree?;
    if let Some(expected) = layer.diff_id
        && diff_id != expected
    {
        let message = format!("uncompressed it has the digest {diff_id}, but the config says {expected}");
        return Err(Error::new(ErrorKind::VerificationFailed, message));
    }
    Ok(tree)
}

/// The tree of a layer, and the digest of its bytes uncompressed.
fn unpack(raw: &mut dyn Read, spool: &mut Spool) -> Result<(Layer, Sha256)> {
    let mut unpacked = HashingReader::new(Decompressor::new(raw)?);
    let tree = read_tar(&mut unpacked, spool)?;
    Ok((tree, unpacked.digest()))
}

/// Refuses early when the disk cannot hold even the layer as it is stored and its blob, which is about as long.
fn check_room(dir: &Path, size_bytes: Option<u64>) -> Result<()> {
    let what = || format!("temporary directory {}", dir.display());
    let stat = rustix::fs::statvfs(dir).map_err(|error| Error::io(what(), error.into()))?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    let needed_bytes = size_bytes.unwrap_or_default().saturating_mul(2);
    if free_bytes < needed_bytes {
        let message = format!("{}: {free_bytes} bytes free, at least {needed_bytes} needed", what());
        return Err(Error::new(ErrorKind::DiskFull, message));
    }
    Ok(())
}

/// Merges the layers and pushes what makes an image of them; the tag last.
async fn finish(
    context: &Arc<Context>,
    config: Config,
    platform: Platform,
    converted: Vec<Converted>,
    tag: Option<&str>,
) -> Result<Summary> {
    let task = Task { phase: Phase::Finish, layer: None, layers: context.layers };
    context.progress.start(&task, None);
    let (blob, converted, metadata_raw_bytes) = background::run({
        let context = Arc::clone(context);
        move || write_metadata(&context, converted)
    })
    .await??;
    context.push(&blob).await?;

    let digests = converted.iter().map(|layer| Sha256(layer.reference.uncompressed_digest.0));
    let config = config.converted(&digests.chain([blob.uncompressed_digest]).collect::<Vec<_>>());
    let config_descriptor = describe(MEDIA_TYPE_CONFIG, &config);
    let config_size = config_descriptor.size;
    let source = BlobSource::Bytes(config.into());
    context.destination.push_blob(&config_descriptor.digest, config_size, source, None).await?;

    let mut references = Vec::with_capacity(converted.len());
    let mut layers = Vec::with_capacity(converted.len());
    for layer in converted {
        references.push(layer.reference);
        layers.push(layer.summary);
    }
    let manifest = ErofsManifest {
        config: config_descriptor,
        layers: references,
        metadata: MetadataRef {
            digest: Digest(blob.digest.0),
            size_bytes: blob.size_bytes,
            bundle_range: blob.trailer.clone(),
            uncompressed_digest: Digest(blob.uncompressed_digest.0),
        },
        annotations: std::collections::BTreeMap::new(),
    };
    let manifest = manifest.to_bytes();
    let mut listed = describe(MEDIA_TYPE_MANIFEST, &manifest);
    listed.platform = Some(Platform { os_features: vec![OS_FEATURE_EROFS.to_owned()], ..platform.clone() });
    let manifest_digest = listed.digest;
    context.destination.push_manifest(MEDIA_TYPE_MANIFEST, manifest.into(), None).await?;
    let index = index_of(listed)?;
    let digest = context.destination.push_manifest(MEDIA_TYPE_INDEX, index, tag).await?;
    context.progress.finish(&task);
    let metadata_bytes = blob.size_bytes;
    Ok(Summary { digest, manifest: manifest_digest, platform, layers, metadata_bytes, metadata_raw_bytes })
}

/// The blocking part of [`finish`]: the merged tree as a blob. Also returns the length of the metadata image.
fn write_metadata(context: &Context, mut converted: Vec<Converted>) -> Result<(Blob, Vec<Converted>, u64)> {
    let mut merge = Merge::new();
    let mut devices = Vec::with_capacity(converted.len());
    let mut bundle = Bundle::default();
    for (number, layer) in converted.iter_mut().enumerate() {
        context.check_cancelled()?;
        let digest = Sha256(layer.reference.digest.0);
        let name = |error: Error| error.within(format_args!("layer {}", number + 1));
        let (tree, _) = read_tree(&layer.metadata).map_err(from_image).map_err(name)?;
        layer.metadata = Vec::new();
        let record = MergeRecord::decode(&layer.record).map_err(from_image).map_err(name)?;
        merge.apply(&tree, &record, &layer.index).map_err(name)?;
        devices.push(DeviceSlot { blocks: layer.index.raw_len_blocks(), tag: digest });
        let blob_len_bytes = layer.reference.size_bytes;
        bundle.layers.push(BundledLayer { digest, blob_len_bytes, index: layer.index.clone() });
    }
    let metadata = write_merged(&merge.into_tree(), &devices).map_err(from_image)?;
    let how = Compress { level: context.options.level, threads: context.options.threads };
    let blob = write_metadata_blob(&metadata, &bundle, &context.options.tmpdir, how)?;
    Ok((blob, converted, metadata.len() as u64))
}

fn describe(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor::new(media_type, Digest::of(bytes), bytes.len() as u64)
}

fn index_of(manifest: Descriptor) -> Result<Bytes> {
    let index = Index {
        schema_version: 2,
        media_type: Some(MEDIA_TYPE_INDEX.to_owned()),
        manifests: vec![manifest],
        annotations: std::collections::BTreeMap::new(),
    };
    let bytes =
        serde_json::to_vec(&index).map_err(|error| Error::new(ErrorKind::Io, "image index").with_source(error))?;
    Ok(bytes.into())
}

impl Context {
    fn task(&self, phase: Phase, layer: usize) -> Task {
        Task { phase, layer: Some(layer), layers: self.layers }
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Io, "given up"));
        }
        Ok(())
    }

    /// Tells of progress, unless nobody listens any more.
    fn advance(&self, task: &Task, bytes: u64) -> Result<()> {
        self.check_cancelled()?;
        self.progress.advance(task, bytes);
        Ok(())
    }

    async fn push(&self, blob: &Blob) -> Result<Pushed> {
        let source = BlobSource::File(blob.path());
        Ok(self.destination.push_blob(&Digest(blob.digest.0), blob.size_bytes, source, None).await?)
    }
}

/// A source that reports its progress and ends when nobody waits any more.
struct Watched<'a, R> {
    inner: R,
    context: &'a Context,
    task: &'a Task,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.context.advance(self.task, count as u64)?;
        Ok(count)
    }
}
