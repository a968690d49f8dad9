//! An image as what is fetched of it: which chunks hold a range of blocks, and where a block of a layer lies on the device.

use std::ops::Range;

use ublkimg_scheduler::bound::Unit;

use super::ServedImage;

/// Names a chunk of a layer, or a frame of the hot blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum UnitKey {
    Chunk { layer: u16, chunk: u32 },
    Frame(u32),
}

impl ServedImage {
    /// What has to be fetched for blocks of a layer, in their order: frames of the hot blob where it has them, else chunks.
    /// Blocks that the layer does not have are left out.
    pub(crate) fn units(&self, layer: u16, blocks: Range<u32>, mut take: impl FnMut(UnitKey, Unit)) {
        let Some(blob) = self.blobs.get(usize::from(layer)) else { return };
        let blocks = blocks.start..blocks.end.min(blob.index.raw_len_blocks());
        self.each_run(layer, blocks, |run, rank| {
            let (blob, blocks) = match rank {
                Some((hot, rank)) => (&hot.blob, rank..rank + (run.end - run.start)),
                None => (blob, run),
            };
            blob.each_chunk(blocks, |number| {
                let chunk = blob.index.chunk(number);
                let unit = Unit {
                    stored_len_bytes: chunk.stored.end - chunk.stored.start,
                    raw_len_bytes: chunk.raw.end - chunk.raw.start,
                };
                let key = if rank.is_some() { UnitKey::Frame(number) } else { UnitKey::Chunk { layer, chunk: number } };
                take(key, unit);
            });
        });
    }

    /// Where a block of a layer lies on the device.
    pub(crate) fn device_block(&self, layer: u16, block: u32) -> Option<u32> {
        let blob = self.blobs.get(usize::from(layer))?;
        (block < blob.index.raw_len_blocks()).then(|| self.map.blob_start(layer) + block)
    }
}
