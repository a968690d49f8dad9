//! The simulated image: one layer blob in chunks, and perhaps a hot blob in frames.

use std::collections::BTreeMap;

use crate::bound::Unit;
use crate::types::{BlobKey, ChunkKey};

use super::program::RecordedRead;

/// The layer blob: its chunk `i` is raw bytes `i * 256 KiB` and on, and its neighbour in the blob is `i + 1`.
pub const LAYER: BlobKey = BlobKey(0);

/// The hot blob: its chunks are its frames, one after another.
pub const HOT: BlobKey = BlobKey(1);

/// Blocks in a chunk.
pub const CHUNK_BLOCKS: u32 = 64;

/// Blocks in a frame of the hot blob; the last may hold fewer.
pub const FRAME_BLOCKS: u32 = 64;

const BLOCK_BYTES: u32 = 4096;

/// A measured chunk of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSize {
    /// Its index.
    pub chunk: u32,
    /// Bytes before compression.
    pub raw_len_bytes: u32,
    /// Bytes on the wire.
    pub stored_len_bytes: u32,
}

/// A measured frame of the hot blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameSize {
    /// Blocks in it.
    pub blocks: u32,
    /// Bytes on the wire.
    pub stored_len_bytes: u32,
}

/// Sizes of all that can be fetched, and what holds each block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimulatedImage {
    chunks: Vec<ChunkSize>,
    frames: Vec<FrameSize>,
    frame_of_block: BTreeMap<u32, u32>,
}

impl SimulatedImage {
    /// An image of `image_bytes` without a hot blob. Only chunks that some recorded start read have been measured: any
    /// other is taken to be full and to compress like all the measured ones together.
    #[must_use]
    pub fn new(image_bytes: u64, measured: &[ChunkSize]) -> Self {
        let chunk_bytes = CHUNK_BLOCKS * BLOCK_BYTES;
        let past_measured = measured.iter().map(|size| size.chunk + 1).max().unwrap_or(0);
        let count = u32::try_from(image_bytes.div_ceil(u64::from(chunk_bytes))).unwrap_or(u32::MAX).max(past_measured);
        let (raw, stored) = measured.iter().fold((0_u64, 0_u64), |(raw, stored), size| {
            (raw + u64::from(size.raw_len_bytes), stored + u64::from(size.stored_len_bytes))
        });
        let usual_bytes = (u64::from(chunk_bytes) * stored).checked_div(raw).unwrap_or(u64::from(chunk_bytes));
        let usual_bytes = u32::try_from(usual_bytes).unwrap_or(chunk_bytes).max(1);
        let unmeasured = |chunk| ChunkSize { chunk, raw_len_bytes: chunk_bytes, stored_len_bytes: usual_bytes };
        let mut chunks: Vec<ChunkSize> = (0..count).map(unmeasured).collect();
        for size in measured {
            if let Some(slot) = chunks.get_mut(size.chunk as usize) {
                *slot = *size;
            }
        }
        Self { chunks, frames: Vec::new(), frame_of_block: BTreeMap::new() }
    }

    /// The same image with a hot blob: `blocks` in order, cut into `frames`. A block outside costs its chunk.
    #[must_use]
    pub fn with_hot_blob(&self, frames: &[FrameSize], blocks: &[u32]) -> Self {
        let mut frame_of_block = BTreeMap::new();
        let mut blocks = blocks.iter();
        for (frame, size) in (0_u32..).zip(frames) {
            for block in blocks.by_ref().take(size.blocks as usize) {
                frame_of_block.entry(*block).or_insert(frame);
            }
        }
        Self { chunks: self.chunks.clone(), frames: frames.to_vec(), frame_of_block }
    }

    /// The layer's chunks.
    #[must_use]
    pub fn chunks(&self) -> &[ChunkSize] {
        &self.chunks
    }

    /// The hot blob's frames; none if there is no hot blob.
    #[must_use]
    pub fn frames(&self) -> &[FrameSize] {
        &self.frames
    }

    /// Bytes of the whole layer on the wire.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.chunks.iter().map(|size| u64::from(size.stored_len_bytes)).sum()
    }

    /// Most bytes that a plan for this image may cost: 15 % of its raw bytes and 64 MiB, so that a small image can be had
    /// whole. In chunks, a start needs up to a third of the stored bytes of its image.
    #[must_use]
    pub fn plan_cap_bytes(&self) -> u64 {
        let raw_bytes: u64 = self.chunks.iter().map(|size| u64::from(size.raw_len_bytes)).sum();
        raw_bytes * 15 / 100 + (64 << 20)
    }

    /// What a read needs, each once, in the order of its blocks.
    #[must_use]
    pub fn units_of(&self, read: RecordedRead) -> Vec<ChunkKey> {
        self.units_by(read, |frame, _| frame)
    }

    /// The same, where `choose` is asked for each block that the hot blob has: its frame, or its chunk?
    pub(super) fn units_by(
        &self,
        read: RecordedRead,
        choose: impl Fn(ChunkKey, ChunkKey) -> ChunkKey,
    ) -> Vec<ChunkKey> {
        let mut units: Vec<ChunkKey> = Vec::new();
        for block in read.block..read.block.saturating_add(read.blocks) {
            let chunk = ChunkKey { blob: LAYER, chunk: block / CHUNK_BLOCKS };
            let unit = match self.frame_of_block.get(&block) {
                Some(frame) => choose(ChunkKey { blob: HOT, chunk: *frame }, chunk),
                None => chunk,
            };
            if self.index(unit).is_some() && !units.contains(&unit) {
                units.push(unit);
            }
        }
        units
    }

    /// What the reads need, each once, in the order of first use.
    #[must_use]
    pub fn first_uses(&self, reads: &[RecordedRead]) -> Vec<ChunkKey> {
        let mut seen = vec![false; self.len()];
        let mut order = Vec::new();
        for unit in reads.iter().flat_map(|read| self.units_of(*read)) {
            if let Some(slot) = self.index(unit).and_then(|index| seen.get_mut(index))
                && !std::mem::replace(slot, true)
            {
                order.push(unit);
            }
        }
        order
    }

    /// Number of all units: the chunks, then the frames.
    pub(super) fn len(&self) -> usize {
        self.chunks.len() + self.frames.len()
    }

    /// Place of a unit among all of them; `None` for one that does not exist.
    pub(super) fn index(&self, unit: ChunkKey) -> Option<usize> {
        let (from, count) =
            if unit.blob == HOT { (self.chunks.len(), self.frames.len()) } else { (0, self.chunks.len()) };
        let index = unit.chunk as usize;
        (index < count).then_some(from + index)
    }

    /// Bytes of a unit on the wire; 0 for one that does not exist.
    pub(super) fn stored_len_bytes(&self, unit: ChunkKey) -> u32 {
        let index = unit.chunk as usize;
        let len = if unit.blob == HOT {
            self.frames.get(index).map(|frame| frame.stored_len_bytes)
        } else {
            self.chunks.get(index).map(|chunk| chunk.stored_len_bytes)
        };
        len.unwrap_or(0)
    }

    /// All units as the bound wants them, in the order of [`Self::index`].
    pub(super) fn bound_units(&self) -> Vec<Unit> {
        let chunks = self.chunks.iter().map(|size| (size.stored_len_bytes, size.raw_len_bytes));
        let frames = self.frames.iter().map(|size| (size.stored_len_bytes, size.blocks * BLOCK_BYTES));
        chunks
            .chain(frames)
            .map(|(stored, raw)| Unit { stored_len_bytes: u64::from(stored), raw_len_bytes: u64::from(raw) })
            .collect()
    }
}
