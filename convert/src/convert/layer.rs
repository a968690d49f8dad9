//! One layer: from the source's bytes to a blob in the destination.

use std::path::Path;
use std::sync::Arc;

use ublkimg_image::Sha256;
use ublkimg_registry::erofs_manifest::LayerOrigin;
use ublkimg_registry::{Digest, Pushed};

use super::context::Context;
use super::original::Copy;
use super::{FinishedLayer, LayerSummary, Position};
use crate::background;
use crate::blob::{LayerBlob, from_image, write_layer_blob};
use crate::converted_layer::ConvertedLayer;
use crate::error::{Error, ErrorKind, Result};
use crate::frames::Compress;
use crate::progress::Phase;
use crate::read_layer::read_layer;
use crate::source::{LayerInput, SourceLayer};
use crate::spool::Spool;

/// Reads, converts and pushes one layer, and the layer itself if there is to be a copy of it.
pub(super) async fn convert_layer(
    context: Arc<Context>,
    position: Position,
    layer: SourceLayer,
    copy: Option<Copy>,
) -> Result<FinishedLayer> {
    let name = layer.name();
    let of_layer = |error: Error| error.within(&name);
    let source = layer.digest;
    let mut input = layer.open().await.map_err(of_layer)?;
    if let Some(copy) = &copy {
        input = copy.of_input(input).map_err(of_layer)?;
    }
    let blocking = {
        let context = Arc::clone(&context);
        move || read_and_write(&context, position, &layer, input)
    };
    let written = background::run(blocking).await?.map_err(of_layer)?;
    let (source_bytes, diff_id, LayerBlob { blob, index, metadata, record }) = written;
    if let Some(copy) = copy {
        copy.push(&context).await.map_err(of_layer)?;
    }
    let task = position.task(Phase::Push);
    context.progress.start(&task, Some(blob.size_bytes));
    let pushed = context.destination.push(&blob).await?;
    context.progress.advance(&task, blob.size_bytes);
    context.progress.finish(&task);
    tracing::debug!(layer = position.number, digest = %blob.digest, size_bytes = blob.size_bytes, ?pushed, "layer blob");
    let record = record.encode().map_err(from_image)?;
    let origin = diff_id.map(|diff_id| LayerOrigin {
        source_layer: source,
        diff_id: Digest(diff_id.0),
        settings: context.settings.clone(),
        record_digest: Digest::of(&record),
    });
    let reference = blob.reference(&index, origin);
    let layer = ConvertedLayer { reference, index, metadata, record };
    let summary = LayerSummary::new(source, source_bytes, &layer, pushed != Pushed::Uploaded, false);
    Ok(FinishedLayer { summary, layer })
}

/// The blocking part: from the layer's bytes to its blob. Also returns length and diff id of what was read.
fn read_and_write(
    context: &Context,
    position: Position,
    layer: &SourceLayer,
    input: LayerInput,
) -> Result<(u64, Option<Sha256>, LayerBlob)> {
    let options = &context.options;
    check_room(&options.tmpdir, layer.size_bytes)?;
    let how = context.compress();
    let mut spool = Spool::new(&options.tmpdir, options.chunk_size, how)?;
    let task = position.task(Phase::Read);
    context.progress.start(&task, layer.size_bytes);
    let read = read_layer(input, layer, &mut spool, &|bytes| context.advance(&task, bytes))?;
    context.progress.finish(&task);
    context.check_cancelled()?;

    let task = position.task(Phase::Compress);
    context.progress.start(&task, Some(spool.len_bytes()));
    let advance = |bytes| context.advance(&task, bytes);
    let how = Compress { level: level_of_packs(how.level), ..how };
    let blob = write_layer_blob(read.tree, &spool, &options.tmpdir, how, &advance)?;
    context.progress.finish(&task);
    Ok((read.len_bytes, read.diff_id, blob))
}

/// Small files are text more often than not: the next level, for them alone, stores 1 % less of an image of Python in a tenth
/// more time (bench/README.md).
fn level_of_packs(level: i32) -> i32 {
    level.saturating_add(1).min(*zstd::compression_level_range().end())
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
