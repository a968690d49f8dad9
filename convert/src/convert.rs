//! The whole conversion: layers one by one, then what binds them together, then the tag.

mod context;
mod finish;
mod layer;
mod original;
mod publish;
mod summary;
pub(crate) mod verity;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::stream::{self, Stream, StreamExt as _};
use ublkimg_registry::descriptor::{Descriptor, Platform};
use ublkimg_registry::{ClientOptions, Location};

use crate::chunk_size::ChunkSize;
use crate::config::Config;
use crate::converted_layer::{ConvertedLayer, settings};
use crate::destination::Destination;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::{Phase, Progress, Task};
use crate::reuse::Reuse;
use crate::source::{self, Image, Platforms, Source, SourceLayer};
use context::{CancelOnDrop, Context};
use original::Copy;

pub use summary::{ImageSummary, LayerSummary, Summary};

/// Layers under way at once: while one is compressed on all cores, the next is fetched and unpacked on one. More would
/// only take more memory and disk.
const LAYERS_AT_ONCE: usize = 2;

/// Layers looked for at once: each takes a few small requests, one after another.
const LOOKUPS_AT_ONCE: usize = 8;

/// How to convert.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to talk to registries.
    pub client: ClientOptions,
    /// Which images of a multi-platform source; the host's by default.
    pub platforms: Platforms,
    /// Whether the index lists the original manifest too, before ours, so that ordinary runtimes keep working.
    pub keep_original: bool,
    /// Directory for temporary files without names; needs room for the largest two layers, unpacked and converted.
    /// `$TMPDIR` or `/var/tmp` by default, as `/tmp` is often memory.
    pub tmpdir: PathBuf,
    /// zstd level, 1 to 22. Part of the settings that decide the output.
    pub level: i32,
    /// The grain of layer blobs; 256 KiB by default. Part of the settings, too.
    pub chunk_size: ChunkSize,
    /// Threads that compress; all cores by default. Does not change the output.
    pub threads: NonZeroUsize,
    /// Directory of the conversion cache; `None` = there is none, the default.
    pub cache: Option<PathBuf>,
    /// Whether the image gets a dm-verity tree. Its layers are read back from the destination for it.
    pub verity: bool,
    /// Converted images whose layers may be used again, beside the one that the destination's tag names.
    pub reuse: Vec<Location>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            client: ClientOptions::default(),
            platforms: Platforms::One(Platform::host()),
            keep_original: false,
            tmpdir: std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from),
            level: 3,
            chunk_size: ChunkSize::default(),
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            cache: None,
            verity: false,
            reuse: Vec::new(),
        }
    }
}

/// A layer of the image, and what to tell of it.
struct FinishedLayer {
    summary: LayerSummary,
    layer: ConvertedLayer,
}

/// Converts the images at `source` and pushes them to `destination`, whose tag points at an index of them when all is there.
/// Layers that were converted before are used again: see [`crate::reuse`].
///
/// # Errors
/// Every [`ErrorKind`]; the message names the image, layer and entry it is about. Nothing is left behind but blobs in the
/// destination that nothing refers to.
pub async fn convert(
    source: &Source,
    destination: &Location,
    options: &Options,
    progress: Arc<dyn Progress>,
) -> Result<Summary> {
    check(source, destination, options)?;
    let destination = Destination::open(destination, &options.client).await?;
    let images = source::open(source, &options.client, &options.platforms).await?;
    let settings = settings(options.level, options.chunk_size);
    let cache = options.cache.as_deref();
    let reuse = Reuse::open(cache, &destination.location, &options.reuse, &options.client, settings.clone()).await?;
    let source_repository = source.location().and_then(Destination::name_of);
    let context = Context::new(options.clone(), destination, source_repository, reuse, settings, progress);
    let context = Arc::new(context);
    let _cancel = CancelOnDrop(Arc::clone(&context.cancelled));
    let (mut listed, mut summaries) = (Vec::new(), Vec::new());
    for image in images {
        let Image { config, platform, layers, original } = image;
        let (descriptor, summary) = convert_image(&context, config, platform, layers).await?;
        if options.keep_original {
            listed.push(original::push(&context, original.as_ref()).await?);
        }
        listed.push(descriptor);
        summaries.push(summary);
    }
    let digest = publish::publish(&context.destination, listed).await?;
    Ok(Summary { digest, images: summaries })
}

/// Refuses what could only end badly.
fn check(source: &Source, destination: &Location, options: &Options) -> Result<()> {
    let usage = |message: String| Err(Error::new(ErrorKind::Usage, message));
    if options.keep_original {
        return match source {
            Source::Location(_) | Source::OciArchive(_) => Ok(()),
            _ => usage(format!("{source} has no manifest that could stand beside the converted one")),
        };
    }
    if source.location() == Some(destination) {
        return usage(format!("{destination} would lose its original image: give --index, or another destination"));
    }
    Ok(())
}

/// Converts one image; returns how an index lists it. The manifest is pushed, the index is not. The source's layers are in the
/// destination too where the original is kept.
async fn convert_image(
    context: &Arc<Context>,
    config: Config,
    platform: Platform,
    layers: Vec<SourceLayer>,
) -> Result<(Descriptor, ImageSummary)> {
    let count = layers.len();
    let found = find_layers(context, &layers).await?;
    let finished = stream::iter(layers.into_iter().zip(found).enumerate())
        .map(|(number, (layer, found))| finish_layer(Arc::clone(context), Position { number, count }, layer, found))
        .buffered(LAYERS_AT_ONCE);
    let finished = see_through(context, finished).await?;
    finish::finish(context, config, platform, finished).await
}

/// A layer among those of its image.
#[derive(Clone, Copy, Debug)]
struct Position {
    /// From 0, the base.
    number: usize,
    count: usize,
}

impl Position {
    fn task(self, phase: Phase) -> Task {
        Task { phase, layer: Some(self.number), layers: self.count }
    }
}

/// Looks for each layer among those that were converted before.
async fn find_layers(context: &Context, layers: &[SourceLayer]) -> Result<Vec<Option<ConvertedLayer>>> {
    let task = Task { phase: Phase::Find, layer: None, layers: layers.len() };
    context.progress.start(&task, None);
    let found = stream::iter(layers).map(|layer| find_layer(context, &task, layer)).buffered(LOOKUPS_AT_ONCE);
    let found = see_through(context, found).await?;
    context.progress.finish(&task);
    Ok(found)
}

async fn find_layer(context: &Context, task: &Task, layer: &SourceLayer) -> Result<Option<ConvertedLayer>> {
    context.check_cancelled()?;
    let found = context.reuse.find(layer, &context.destination).await?;
    let read_bytes = found.as_ref().map_or(0, |layer| layer.record.len() + layer.metadata.len());
    context.progress.advance(task, read_bytes as u64);
    Ok(found)
}

/// All results in their order, or the first error. What is under way beside the one that fails is not dropped: it stops as
/// soon as it can, or ends its upload, so that the registry keeps none that is neither ended nor called off.
async fn see_through<T>(context: &Context, results: impl Stream<Item = Result<T>>) -> Result<Vec<T>> {
    let watched = results.inspect(|result| {
        if result.is_err() {
            context.cancelled.store(true, Ordering::Relaxed);
        }
    });
    watched.collect::<Vec<_>>().await.into_iter().collect()
}

/// The layer as it was found, or converted now.
async fn finish_layer(
    context: Arc<Context>,
    position: Position,
    layer: SourceLayer,
    found: Option<ConvertedLayer>,
) -> Result<FinishedLayer> {
    context.check_cancelled()?;
    let of_layer = |error: Error| error.within(layer.name());
    let copy = Copy::begin(&context, &layer).await.map_err(of_layer)?;
    if let Some(found) = found {
        if let Some(copy) = copy {
            copy.fetch(&layer).await.map_err(of_layer)?;
            copy.push(&context).await.map_err(of_layer)?;
        }
        let source_bytes = layer.size_bytes.unwrap_or_default();
        let summary = LayerSummary::new(layer.digest, source_bytes, &found, true, true);
        return Ok(FinishedLayer { summary, layer: found });
    }
    let finished = layer::convert_layer(Arc::clone(&context), position, layer, copy).await?;
    context.reuse.keep(&finished.layer, &context.destination).await;
    Ok(finished)
}
