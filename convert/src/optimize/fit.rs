//! A trace as one image can use it: only blocks that the image has.

use std::collections::HashMap;

use ublkimg_image::trace::{GAP_US_MAX, Trace, TraceEntry, TraceHeader};
use ublkimg_image::{Bundle, Sha256};

use super::blocks::BlockAddress;
use crate::error::{Error, ErrorKind, Result};
use crate::stored_image::StoredImage;

/// Blocks of the traces that are not in the profile, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Of blobs that the image does not have.
    pub other_blobs: u64,
    /// Past the end of their blob.
    pub past_end: u64,
}

/// A trace of one image.
#[derive(Debug)]
pub(super) struct Fitted {
    pub(super) trace: Trace,
    /// Its blocks one by one: the first ones, as many as were asked for.
    pub(super) order: Vec<BlockAddress>,
    pub(super) dropped: Dropped,
}

/// The trace for another build of its image, or for this one: only blocks that the image has, and its digest.
///
/// # Errors
/// `Usage` when nothing is left of it.
pub fn fit_trace(trace: &Trace, image: &StoredImage) -> Result<(Trace, Dropped)> {
    let fitted = fit(trace, image, 0)?;
    Ok((fitted.trace, fitted.dropped))
}

/// What a blob number of the old trace stands for.
#[derive(Clone, Copy)]
struct Known {
    /// Number of the layer of the image.
    layer: u16,
    /// Number of the blob in the new trace.
    blob: u16,
}

/// Fits `trace` to the image; at most `order_max` blocks come back one by one.
///
/// # Errors
/// `Usage` when nothing is left of it.
pub(super) fn fit(trace: &Trace, image: &StoredImage, order_max: usize) -> Result<Fitted> {
    let fitted = fit_to(trace, Sha256(image.digest.0), &image.bundle, order_max);
    if fitted.trace.entries.is_empty() {
        let message = format!("none of the {} traced blocks is of image {}", trace.blocks(), image.digest);
        return Err(Error::new(ErrorKind::Usage, message));
    }
    Ok(fitted)
}

/// The same for the image with this manifest and these layers. Time that passed before a dropped block passes before the
/// next one that is kept.
fn fit_to(trace: &Trace, manifest: Sha256, bundle: &Bundle, order_max: usize) -> Fitted {
    let (blobs, known) = match_blobs(&trace.header.blobs, bundle);
    let mut entries = Vec::with_capacity(trace.entries.len());
    let (mut order, mut dropped) = (Vec::new(), Dropped::default());
    let mut waited_us: u64 = 0;
    for entry in &trace.entries {
        waited_us = waited_us.saturating_add(entry.since_previous_us).min(GAP_US_MAX);
        let Some(Some(known)) = known.get(usize::from(entry.blob)).copied() else {
            dropped.other_blobs += u64::from(entry.blocks);
            continue;
        };
        let len_blocks = bundle.layers[usize::from(known.layer)].index.raw_len_blocks();
        let left = len_blocks.saturating_sub(entry.block);
        let blocks = entry.blocks.min(u16::try_from(left).unwrap_or(u16::MAX));
        dropped.past_end += u64::from(entry.blocks - blocks);
        if blocks > 0 {
            entries.push(TraceEntry { blob: known.blob, blocks, since_previous_us: waited_us, ..*entry });
            waited_us = 0;
            let room = order_max - order.len();
            let each = entry.block..entry.block + u32::from(blocks);
            order.extend(each.take(room).map(|block| BlockAddress { layer: known.layer, block }));
        }
    }
    let trace = Trace { header: TraceHeader { manifest, blobs, ..trace.header.clone() }, entries };
    Fitted { trace, order, dropped }
}

/// The blobs of the trace that the image has, and what each old number stands for. A blob that is two layers of the
/// image counts as the first.
fn match_blobs(blobs: &[Sha256], bundle: &Bundle) -> (Vec<Sha256>, Vec<Option<Known>>) {
    let mut layers: HashMap<Sha256, u16> = HashMap::new();
    for (layer, bundled) in (0..).zip(&bundle.layers) {
        layers.entry(bundled.digest).or_insert(layer);
    }
    let mut kept: Vec<Sha256> = Vec::new();
    let mut known = Vec::with_capacity(blobs.len());
    for digest in blobs {
        let layer = layers.get(digest).copied();
        let blob = u16::try_from(kept.len()).unwrap_or(u16::MAX);
        known.push(layer.map(|layer| Known { layer, blob }));
        kept.extend(layer.map(|_| *digest));
    }
    (kept, known)
}

#[cfg(test)]
mod tests {
    use ublkimg_image::{BLOCK_SIZE, BundledLayer, ChunkId, ChunkIndexBuilder};

    use super::*;

    /// A layer blob of that name with chunks of ten blocks.
    fn layer(name: &[u8], chunks: u64) -> BundledLayer {
        let mut builder = ChunkIndexBuilder::new(0);
        for chunk in 0..chunks {
            let id = ChunkId(Sha256::of(&chunk.to_le_bytes()));
            builder.push(100, 10 * BLOCK_SIZE as u64, id).unwrap();
        }
        BundledLayer { digest: Sha256::of(name), blob_len_bytes: 0, index: builder.finish() }
    }

    fn entry(blob: u16, block: u32, blocks: u16) -> TraceEntry {
        TraceEntry { blob, block, blocks, since_previous_us: 7, confidence: 255 }
    }

    #[test]
    fn what_the_image_lacks_is_left_out_and_counted() {
        let bundle = Bundle { layers: vec![layer(b"base", 2), layer(b"top", 1)] };
        let header = TraceHeader {
            manifest: Sha256::of(b"older build"),
            command: vec!["app".to_owned()],
            read_ahead_kb: 0,
            runs: 1,
            ready_us: None,
            lost: 0,
            blobs: [b"gone".as_slice(), b"top", b"base"].map(Sha256::of).to_vec(),
        };
        let entries = vec![entry(2, 18, 2), entry(0, 0, 5), entry(1, 8, 4), entry(1, 500, 1), entry(2, 0, 1)];
        let trace = Trace { header, entries };
        let manifest = Sha256::of(b"this build");
        let fitted = fit_to(&trace, manifest, &bundle, 4);
        assert_eq!(fitted.trace.header.blobs, [b"top".as_slice(), b"base"].map(Sha256::of));
        assert_eq!(fitted.trace.header.manifest, manifest);
        let with_wait = |entry, since_previous_us| TraceEntry { since_previous_us, ..entry };
        let expected = [entry(1, 18, 2), with_wait(entry(0, 8, 2), 14), with_wait(entry(1, 0, 1), 14)];
        assert_eq!(fitted.trace.entries, expected);
        assert_eq!(fitted.dropped, Dropped { other_blobs: 5, past_end: 3 });
        let order: Vec<_> = fitted.order.iter().map(|at| (at.layer, at.block)).collect();
        assert_eq!(order, [(0, 18), (0, 19), (1, 8), (1, 9)]);
        assert!(fitted.trace.encode().is_ok());
    }
}
