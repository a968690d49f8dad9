//! From a trace to what the engine is to fetch, in order.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ublkimg_image::trace::Trace;
use ublkimg_image::{BLOCK_SIZE, ChunkIndex, Sha256};
use ublkimg_scheduler::{BlobKey, ChunkKey, PlanEntry};

use crate::hot::HotMap;
use crate::store::BlobFile;

/// What a profile may make the engine fetch, however wrong it is: this share of the image's raw bytes, since a start
/// reads a share of the image however well that compresses ...
const CAP_PERCENT: u64 = 15;

/// ... and so many bytes. The largest start known (vLLM) reads 11 % of 4.2 GB in chunks.
pub(super) const CAP_BYTES_MIN: u64 = 64 << 20;

/// The most that a profile of an image with so many raw bytes may make the engine fetch.
pub(super) fn byte_cap(image_bytes: u64) -> u64 {
    CAP_BYTES_MIN + image_bytes / 100 * CAP_PERCENT
}

/// A layer blob that the engine knows.
pub(super) struct PlannedLayer {
    pub(super) digest: Sha256,
    pub(super) key: BlobKey,
    pub(super) file: Arc<BlobFile>,
    pub(super) index: Arc<ChunkIndex>,
    /// Whether each chunk was in the store when attaching began.
    pub(super) was_local: Box<[bool]>,
}

/// A hot blob that the engine knows.
#[derive(Clone, Copy)]
pub(super) struct PlannedHot<'a> {
    pub(super) key: BlobKey,
    pub(super) index: &'a ChunkIndex,
}

/// The place of each blob of a trace among the layers; `None` for one that the image does not have.
fn places(trace: &Trace, layers: &[PlannedLayer]) -> Vec<Option<usize>> {
    let place = |blob: &Sha256| layers.iter().position(|layer| layer.digest == *blob);
    trace.header.blobs.iter().map(place).collect()
}

/// Where the first `packed_blocks` blocks of a trace lie. `None` if they are not all blocks of the image.
pub(super) fn hot_map(trace: &Trace, layers: &[PlannedLayer], packed_blocks: u32) -> Option<HotMap> {
    let places = places(trace, layers);
    let reads = trace.entries.iter().map(|entry| {
        let layer = places.get(usize::from(entry.blob)).copied().flatten();
        // No layer has this place: whoever packed it did not mean this image.
        (layer.unwrap_or(usize::MAX), entry.block..entry.block + u32::from(entry.blocks))
    });
    HotMap::new(layers.len(), packed_blocks, reads)
}

/// The steps of a trace, each chunk once: frames of the hot blob where it has the blocks, chunks of the layers elsewhere.
/// A frame is left out when the layers have all its blocks on this host; a block that the image lacks is passed over.
pub(super) fn steps(trace: &Trace, layers: &[PlannedLayer], hot: Option<PlannedHot<'_>>) -> Vec<PlanEntry> {
    let places = places(trace, layers);
    let packed_blocks = hot.map_or(0, |hot| hot.index.raw_len_blocks());
    let mut planned = HashSet::new();
    let mut entries = Vec::new();
    let (mut due, mut rank) = (Duration::ZERO, 0_u32);
    for entry in &trace.entries {
        due += Duration::from_micros(entry.since_previous_us);
        let mut step = |chunk: ChunkKey| {
            if planned.insert(chunk) {
                entries.push(PlanEntry { chunk, due, confidence: entry.confidence });
            }
        };
        let blocks = entry.block..entry.block + u32::from(entry.blocks);
        let packed_end = blocks.start + packed_blocks.saturating_sub(rank).min(u32::from(entry.blocks));
        let layer = places.get(usize::from(entry.blob)).copied().flatten().and_then(|place| layers.get(place));
        if let (Some(layer), Some(hot)) = (layer, hot) {
            each_frame(hot.index, rank, blocks.start..packed_end, |frame, blocks| {
                if layer.file.first_missing(blocks).is_some() {
                    step(ChunkKey { blob: hot.key, chunk: frame });
                }
            });
        }
        if let Some(layer) = layer {
            each_chunk(&layer.index, packed_end..blocks.end, |chunk| step(ChunkKey { blob: layer.key, chunk }));
        }
        rank = rank.saturating_add(u32::from(entry.blocks));
    }
    entries
}

/// The frames of blocks whose first has this rank, with the blocks of each.
fn each_frame(index: &ChunkIndex, first_rank: u32, blocks: Range<u32>, mut take: impl FnMut(u32, Range<u32>)) {
    let mut at = blocks.start;
    while at < blocks.end {
        let rank = first_rank + (at - blocks.start);
        let frame = index.find(u64::from(rank) * BLOCK_SIZE as u64);
        let frame_end = u32::try_from(index.chunk(frame).raw.end / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
        let end = blocks.end.min(at + (frame_end - rank));
        take(frame, at..end);
        at = end;
    }
}

/// The chunks of blocks, of those that the layer has.
fn each_chunk(index: &ChunkIndex, blocks: Range<u32>, take: impl FnMut(u32)) {
    let end = blocks.end.min(index.raw_len_blocks());
    if blocks.start < end {
        let of_block = |block: u32| index.find(u64::from(block) * BLOCK_SIZE as u64);
        (of_block(blocks.start)..=of_block(end - 1)).for_each(take);
    }
}
