//! The whole conversion: layers one by one, then what binds them together, then the tag.

mod context;
mod finish;
mod layer;
mod summary;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{ClientOptions, Location};

use crate::converted_layer::{ConvertedLayer, settings};
use crate::destination::Destination;
use crate::error::Result;
use crate::progress::{Phase, Progress, Task};
use crate::reuse::Reuse;
use crate::source::{self, Image, Source, SourceLayer};
use context::{CancelOnDrop, Context};

pub use summary::{LayerSummary, Summary};

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
    /// Which image of a multi-platform source; the host's by default.
    pub platform: Platform,
    /// Directory for temporary files without names; needs room for the largest two layers, unpacked and converted.
    /// `$TMPDIR` or `/var/tmp` by default, as `/tmp` is often memory.
    pub tmpdir: PathBuf,
    /// zstd level, 1 to 22. Part of the settings that decide the output.
    pub level: i32,
    /// Threads that compress; all cores by default. Does not change the output.
    pub threads: NonZeroUsize,
    /// Directory of the conversion cache; `None` = there is none, the default.
    pub cache: Option<PathBuf>,
    /// Converted images whose layers may be used again, beside the one that the destination's tag names.
    pub reuse: Vec<Location>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            client: ClientOptions::default(),
            platform: Platform::host(),
            tmpdir: std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from),
            level: 3,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            cache: None,
            reuse: Vec::new(),
        }
    }
}

/// A layer of the image, and what to tell of it.
struct FinishedLayer {
    summary: LayerSummary,
    layer: ConvertedLayer,
}

/// Converts the image at `source` and pushes it to `destination`, whose tag points at it when all is there. Layers that were
/// converted before are used again: see [`crate::reuse`].
///
/// # Errors
/// Every [`ErrorKind`](crate::ErrorKind); the message names the image, layer and entry it is about. Nothing is left behind
/// but blobs in the destination that nothing refers to.
pub async fn convert(
    source: &Source,
    destination: &Location,
    options: &Options,
    progress: Arc<dyn Progress>,
) -> Result<Summary> {
    let destination = Destination::open(destination, &options.client).await?;
    let image = source::open(source, &options.client, &options.platform).await?;
    let settings = settings(options.level);
    let cache = options.cache.as_deref();
    let reuse = Reuse::open(cache, &destination.location, &options.reuse, &options.client, settings.clone()).await?;
    let context = Arc::new(Context::new(options.clone(), destination, reuse, settings, progress, image.layers.len()));
    let _cancel = CancelOnDrop(Arc::clone(&context.cancelled));
    let Image { config, platform, layers } = image;
    let found = find_layers(&context, &layers).await?;
    let finished: Vec<FinishedLayer> = stream::iter(layers.into_iter().zip(found).enumerate())
        .map(|(number, (layer, found))| finish_layer(Arc::clone(&context), number, layer, found))
        .buffered(LAYERS_AT_ONCE)
        .try_collect()
        .await?;
    finish::finish(&context, config, platform, finished).await
}

/// Looks for each layer among those that were converted before.
async fn find_layers(context: &Context, layers: &[SourceLayer]) -> Result<Vec<Option<ConvertedLayer>>> {
    let task = Task { phase: Phase::Find, layer: None, layers: context.layers };
    context.progress.start(&task, None);
    let found: Vec<Option<ConvertedLayer>> = stream::iter(layers)
        .map(|layer| context.reuse.find(layer, &context.destination))
        .buffered(LOOKUPS_AT_ONCE)
        .inspect_ok(|found| {
            let read = found.as_ref().map_or(0, |layer| layer.record.len() + layer.metadata.len());
            context.progress.advance(&task, read as u64);
        })
        .try_collect()
        .await?;
    context.progress.finish(&task);
    Ok(found)
}

/// The layer as it was found, or converted now.
async fn finish_layer(
    context: Arc<Context>,
    number: usize,
    layer: SourceLayer,
    found: Option<ConvertedLayer>,
) -> Result<FinishedLayer> {
    if let Some(found) = found {
        let source_bytes = layer.size_bytes.unwrap_or_default();
        let summary = LayerSummary::new(layer.digest, source_bytes, &found, true, true);
        return Ok(FinishedLayer { summary, layer: found });
    }
    let finished = layer::convert_layer(Arc::clone(&context), number, layer).await?;
    context.reuse.keep(&finished.layer, &context.destination).await;
    Ok(finished)
}
