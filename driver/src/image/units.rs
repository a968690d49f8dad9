//! An image as what is fetched of it: which chunks hold a range of blocks, and where a block of a layer lies on the device.

use std::ops::Range;

use ublkimg_image::{BLOCK_SIZE, Target};
use ublkimg_scheduler::bound::Unit;
use ublkimg_scheduler::{ChunkEntry, ChunkKey};

use super::{ServedBlob, ServedImage};

/// Names a chunk of a layer, or a frame of the hot blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum UnitKey {
    Chunk { layer: u16, chunk: u32 },
    Frame(u32),
}

/// Which of the chunks of a blob are in the store.
pub(crate) fn local(entries: &[ChunkEntry]) -> Box<[bool]> {
    entries.iter().map(|entry| entry.present).collect()
}

impl ServedBlob {
    fn was_local(&self, chunk: u32) -> bool {
        self.was_local.get(chunk as usize).copied().unwrap_or(false)
    }

    fn unit(&self, chunk: u32) -> Unit {
        let chunk = self.index.chunk(chunk);
        Unit { stored_len_bytes: chunk.stored.end - chunk.stored.start, raw_len_bytes: chunk.raw.end - chunk.raw.start }
    }

    /// The blocks of a chunk.
    fn blocks_of(&self, chunk: u32) -> Range<u32> {
        let raw = self.index.chunk(chunk).raw;
        let block = |offset_bytes: u64| u32::try_from(offset_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
        block(raw.start)..block(raw.end)
    }
}

impl ServedImage {
    /// What has to be fetched for blocks of a layer, in their order: frames of the hot blob where it has them, else chunks;
    /// `None` for what was in the store before. Blocks that the layer does not have are left out.
    pub(crate) fn units(&self, layer: u16, blocks: Range<u32>, mut take: impl FnMut(Option<(UnitKey, Unit)>)) {
        let Some(blob) = self.blobs.get(usize::from(layer)) else { return };
        let blocks = blocks.start..blocks.end.min(blob.index.raw_len_blocks());
        blob.each_chunk(blocks.clone(), |chunk| {
            if blob.was_local(chunk) {
                return take(None);
            }
            let own = blob.blocks_of(chunk);
            let wanted = own.start.max(blocks.start)..own.end.min(blocks.end);
            self.each_run(layer, wanted, |run, rank| match rank {
                Some((hot, rank)) => hot.blob.each_chunk(rank..rank + (run.end - run.start), |frame| {
                    let is_fetched = !hot.blob.was_local(frame);
                    take(is_fetched.then(|| (UnitKey::Frame(frame), hot.blob.unit(frame))));
                }),
                None => take(Some((UnitKey::Chunk { layer, chunk }, blob.unit(chunk)))),
            });
        });
    }

    /// Where a block of a layer lies on the device.
    pub(crate) fn device_block(&self, layer: u16, block: u32) -> Option<u32> {
        let blob = self.blobs.get(usize::from(layer))?;
        (block < blob.index.raw_len_blocks()).then(|| self.map.blob_start(layer) + block)
    }

    /// Whether blocks of the device can be read without a fetch. Nothing is noted as read.
    pub(crate) fn holds(&self, blocks: Range<u32>) -> bool {
        self.map.segments(blocks.start, blocks.end.saturating_sub(blocks.start)).all(|segment| match segment.target {
            Target::Metadata { .. } | Target::Zero => true,
            Target::Blob { index, block } => self.layer_holds(index, block..block + segment.len_blocks),
        })
    }

    /// Gives blocks of the device to a warmer: reads of them tell nothing of the program from now on.
    pub(crate) fn give(&self, runs: &[Range<u32>]) {
        let mut chunks = Vec::new();
        let mut add = |blob: &ServedBlob, blocks| {
            blob.each_chunk(blocks, |chunk| {
                let key = ChunkKey { blob: blob.key, chunk };
                if chunks.last() != Some(&key) {
                    chunks.push(key);
                }
            });
        };
        for run in runs {
            self.first_reads.give(run);
            for segment in self.map.segments(run.start, run.end.saturating_sub(run.start)) {
                let Target::Blob { index, block } = segment.target else { continue };
                self.each_run(index, block..block + segment.len_blocks, |blocks, rank| match rank {
                    Some((hot, rank)) => add(&hot.blob, rank..rank + (blocks.end - blocks.start)),
                    None => add(&self.blobs[usize::from(index)], blocks),
                });
            }
        }
        if let Some(attachment) = &self.attachment {
            attachment.engine.pushed(attachment.image, chunks);
        }
    }

    /// Whether blocks of a layer were given to a warmer.
    pub(super) fn is_given(&self, layer: u16, blocks: &Range<u32>) -> bool {
        let start = self.map.blob_start(layer);
        self.first_reads.is_given(&(start + blocks.start..start + blocks.end))
    }

    fn layer_holds(&self, layer: u16, blocks: Range<u32>) -> bool {
        let file = &self.blobs[usize::from(layer)].file;
        let (mut at, mut holds) = (blocks.start, true);
        while holds && at < blocks.end {
            let (place, end) = file.find(at..blocks.end);
            if place.is_none() {
                self.each_run(layer, at..end, |run, rank| {
                    holds &= rank.is_some_and(|(hot, rank)| hot.blob.file.holds(rank..rank + (run.end - run.start)));
                });
            }
            at = end;
        }
        holds
    }
}
