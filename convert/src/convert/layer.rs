//! One layer: from the source's bytes to a blob in the destination.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use ublkimg_image::Sha256;
use ublkimg_registry::erofs_manifest::{LayerOrigin, LayerRef};
use ublkimg_registry::{Digest, Pushed};

use super::context::{Context, Watched};
use super::{FinishedLayer, LayerSummary};
use crate::background;
use crate::blob::{LayerBlob, from_image, write_layer_blob};
use crate::compression::Decompressor;
use crate::converted_layer::ConvertedLayer;
use crate::error::{Error, ErrorKind, Result};
use crate::frames::Compress;
use crate::hashing::HashingReader;
use crate::layer::{Layer, read_directory, read_tar};
use crate::progress::Phase;
use crate::source::{LayerInput, SourceLayer};
use crate::spool::Spool;

/// What reading a layer tells.
struct SourceRead {
    len_bytes: u64,
    /// Digest of its bytes uncompressed; `None` for a directory.
    diff_id: Option<Sha256>,
    tree: Layer,
}

/// Reads, converts and pushes one layer.
pub(super) async fn convert_layer(context: Arc<Context>, number: usize, layer: SourceLayer) -> Result<FinishedLayer> {
    let name = layer.name();
    let source = layer.digest;
    let input = layer.open().await.map_err(|error| error.within(&name))?;
    let blocking = {
        let context = Arc::clone(&context);
        move || read_and_write(&context, number, &layer, input)
    };
    let written = background::run(blocking).await?.map_err(|error| error.within(&name))?;
    let (source_bytes, diff_id, LayerBlob { blob, index, metadata, record }) = written;
    let task = context.task(Phase::Push, number);
    context.progress.start(&task, Some(blob.size_bytes));
    let pushed = context.destination.push(&blob).await?;
    context.progress.advance(&task, blob.size_bytes);
    context.progress.finish(&task);
    tracing::debug!(layer = number, digest = %blob.digest, size_bytes = blob.size_bytes, ?pushed, "layer blob");
    let record = record.encode().map_err(from_image)?;
    let origin = diff_id.map(|diff_id| LayerOrigin {
        source_layer: source,
        diff_id: Digest(diff_id.0),
        settings: context.settings.clone(),
        record_digest: Digest::of(&record),
    });
    let reference = LayerRef {
        digest: Digest(blob.digest.0),
        size_bytes: blob.size_bytes,
        index_range: blob.trailer.clone(),
        index_digest: Digest(index.digest().0),
        uncompressed_digest: Digest(blob.uncompressed_digest.0),
        origin,
    };
    let layer = ConvertedLayer { reference, index, metadata, record };
    let summary = LayerSummary::new(source, source_bytes, &layer, pushed != Pushed::Uploaded, false);
    Ok(FinishedLayer { summary, layer })
}

/// The blocking part: from the layer's bytes to its blob. Also returns length and diff id of what was read.
fn read_and_write(
    context: &Context,
    number: usize,
    layer: &SourceLayer,
    input: LayerInput,
) -> Result<(u64, Option<Sha256>, LayerBlob)> {
    let options = &context.options;
    check_room(&options.tmpdir, layer.size_bytes)?;
    let mut spool = Spool::new(&options.tmpdir)?;
    let task = context.task(Phase::Read, number);
    context.progress.start(&task, layer.size_bytes);
    let read = match input {
        LayerInput::Stream(stream) => {
            let watched = Watched { inner: stream, context, task: &task };
            let mut raw = HashingReader::new(watched);
            let (tree, diff_id) = read_stream(&mut raw, layer, &mut spool)?;
            SourceRead { len_bytes: raw.len_bytes(), diff_id: Some(diff_id), tree }
        }
        LayerInput::Directory(path) => {
            let read = std::cell::Cell::new(0);
            let advance = |bytes| {
                read.set(read.get() + bytes);
                context.advance(&task, bytes)
            };
            let tree = read_directory(&path, &mut spool, &advance)?;
            SourceRead { len_bytes: read.get(), diff_id: None, tree }
        }
    };
    context.progress.finish(&task);
    context.check_cancelled()?;

    let task = context.task(Phase::Compress, number);
    context.progress.start(&task, Some(spool.len_bytes()));
    let how = Compress { level: options.level, threads: options.threads };
    let advance = |bytes| context.advance(&task, bytes);
    let blob = write_layer_blob(read.tree, &spool, &options.tmpdir, how, &advance)?;
    context.progress.finish(&task);
    Ok((read.len_bytes, read.diff_id, blob))
}

/// Unpacks a layer and checks its digests.
fn read_stream(raw: &mut HashingReader<impl Read>, layer: &SourceLayer, spool: &mut Spool) -> Result<(Layer, Sha256)> {
    let tree = unpack(raw, spool);
    if tree.as_ref().is_err_and(|error| error.kind() != ErrorKind::BadSource) {
        return tree;
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
    Ok((tree, diff_id))
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
