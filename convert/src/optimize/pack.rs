//! The hot blob: blocks in the order of the trace, 64 to a zstd frame, one frame after another.

use std::path::Path;

use ublkimg_image::hot::HOT_FRAME_BLOCKS_MAX;
use ublkimg_image::{BLOCK_SIZE, HotFrame, HotTable};

use super::blocks::OrderedBlocks;
use crate::blob::{Blob, BlobWriter};
use crate::error::Result;
use crate::frames::{Chunk, Compress, compress};

/// Blocks of one frame: as many as of a chunk, so that what holds a chunk holds a frame. Smaller ones compress worse;
/// larger ones arrive later than the first of their blocks is needed.
const FRAME_BLOCKS: usize = HOT_FRAME_BLOCKS_MAX as usize;

/// Packs the first `count` of `blocks` into a file without a name in `dir`; also returns the table that vouches for it.
///
/// # Errors
/// `DiskFull` or `Io` naming `dir`.
pub(super) fn pack(
    blocks: &OrderedBlocks,
    count: usize,
    dir: &Path,
    how: Compress,
    advance: impl Fn(u64),
) -> Result<(Blob, HotTable)> {
    let mut writer = BlobWriter::new(dir)?;
    let mut table = HotTable { frames: Vec::with_capacity(count.div_ceil(FRAME_BLOCKS)) };
    let read = |frame: usize| blocks.read(frame * FRAME_BLOCKS..count.min((frame + 1) * FRAME_BLOCKS)).map(Chunk::Raw);
    let uncompressed_digest = compress(how, count.div_ceil(FRAME_BLOCKS), read, |frame| {
        table.frames.push(HotFrame {
            stored_len_bytes: u32::try_from(frame.stored.len()).unwrap_or(u32::MAX),
            blocks: u16::try_from(frame.raw.len() / BLOCK_SIZE).unwrap_or(u16::MAX),
            digest: frame.id.0,
        });
        advance(frame.raw.len() as u64);
        writer.write(&frame.stored)
    })?;
    Ok((writer.finish(&[], uncompressed_digest)?, table))
}
