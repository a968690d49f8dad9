//! Where the data of a layer's files is in the merged image: at the address of the lowest layer that has the same chunk.
//!
//! A layer blob has all of its own data, as it depends on its layer alone. But equal chunks have equal names, so the
//! merged tree can leave the copies aside: the files of a layer that only changed owners or modes, or one more copy of a
//! library, share the addresses of those below.

use std::collections::HashMap;

use ublkimg_image::{BLOCK_SIZE, ChunkId, ChunkIndex, DataBlock, FileData, FileLayout, Space};

use crate::error::{Error, Result};

/// Blocks of a piece as a power of two, at most: the grain of chunks, and so of what can be elsewhere.
const PIECE_BLOCKS_LOG2_MAX: u8 = 6;

/// The first place of each chunk of the layers so far. Some 70 bytes for each 256 KiB of data.
#[derive(Debug, Default)]
pub(super) struct ChunkPlaces(HashMap<ChunkId, DataBlock>);

/// Places of one layer's data.
#[derive(Debug)]
pub(super) struct DevicePlaces<'a> {
    device: u16,
    metadata_blocks: u32,
    index: &'a ChunkIndex,
    /// For each chunk, where it is read.
    places: Vec<DataBlock>,
}

impl ChunkPlaces {
    /// Adds the chunks of a layer's blob, which is that device; finds those that are there already.
    pub(super) fn add_device<'a>(
        &mut self,
        device: u16,
        metadata_blocks: u32,
        index: &'a ChunkIndex,
    ) -> DevicePlaces<'a> {
        let own = |block| DataBlock { space: Space::Device(device), block };
        let place = |chunk: ublkimg_image::Chunk| *self.0.entry(chunk.id).or_insert(own(block_of(chunk.raw.start)));
        DevicePlaces { device, metadata_blocks, index, places: index.iter().map(place).collect() }
    }
}

impl DevicePlaces<'_> {
    /// The data of a file of the layer, seen from the merged image.
    ///
    /// # Errors
    /// `Unsupported` for addresses that no device has.
    pub(super) fn move_file(&self, data: &FileData) -> Result<FileData> {
        if data.size_bytes == 0 {
            return Ok(FileData::EMPTY);
        }
        let (log2, pieces) = match &data.layout {
            // One run in the layer: its pieces may lie apart in the image.
            FileLayout::Contiguous(first) => {
                let log2 = self.grain_log2(self.own(*first)?);
                (log2, pieces_of_run(*first, data.size_bytes, log2)?)
            }
            FileLayout::Chunked { chunk_blocks_log2, blocks } => (*chunk_blocks_log2, blocks.clone()),
        };
        let piece_blocks = 1_u64 << log2;
        let mut left = data.size_bytes.div_ceil(BLOCK_SIZE as u64);
        let mut moved = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let place = match piece {
                Some(at) => Some(self.place(self.own(at)?, left.min(piece_blocks))),
                None => None,
            };
            moved.push(place);
            left = left.saturating_sub(piece_blocks);
        }
        Ok(FileData { size_bytes: data.size_bytes, layout: joined(moved, log2) })
    }

    /// The layer's whole image is one device, metadata first.
    fn own(&self, at: DataBlock) -> Result<DataBlock> {
        let block = at.block.checked_add(self.metadata_blocks).ok_or_else(too_far)?;
        Ok(DataBlock { space: Space::Device(self.device), block })
    }

    /// The grain of a run that begins there, as a power of two: the first chunk of a file that has several is full.
    fn grain_log2(&self, own: DataBlock) -> u8 {
        let start = u64::from(own.block) * BLOCK_SIZE as u64;
        let first = (start < self.index.raw_len_bytes()).then(|| self.index.chunk(self.index.find(start)));
        let log2 =
            first.map(|chunk| (chunk.raw.end - chunk.raw.start) / BLOCK_SIZE as u64).filter(|n| n.is_power_of_two());
        log2.and_then(|blocks| u8::try_from(blocks.ilog2()).ok())
            .unwrap_or(PIECE_BLOCKS_LOG2_MAX)
            .min(PIECE_BLOCKS_LOG2_MAX)
    }

    /// Where that many blocks are read: elsewhere only if one chunk holds them all.
    fn place(&self, own: DataBlock, blocks: u64) -> DataBlock {
        let start = u64::from(own.block) * BLOCK_SIZE as u64;
        if start >= self.index.raw_len_bytes() {
            return own;
        }
        let chunk = self.index.chunk(self.index.find(start));
        if start + blocks * BLOCK_SIZE as u64 > chunk.raw.end {
            return own;
        }
        let place = self.places[chunk.index as usize];
        DataBlock { block: place.block + (own.block - block_of(chunk.raw.start)), ..place }
    }
}

fn pieces_of_run(first: DataBlock, size_bytes: u64, log2: u8) -> Result<Vec<Option<DataBlock>>> {
    let piece = |start: u64| {
        let block = u32::try_from(start).ok().and_then(|start| first.block.checked_add(start));
        Ok(Some(DataBlock { block: block.ok_or_else(too_far)?, ..first }))
    };
    (0..size_bytes.div_ceil(BLOCK_SIZE as u64)).step_by(1 << log2).map(piece).collect()
}

/// Pieces that lie one after another are one run.
fn joined(pieces: Vec<Option<DataBlock>>, log2: u8) -> FileLayout {
    let follows = |pair: &[Option<DataBlock>]| match pair {
        [Some(left), Some(right)] => {
            let next = 1_u32.checked_shl(log2.into()).and_then(|blocks| left.block.checked_add(blocks));
            left.space == right.space && next == Some(right.block)
        }
        _ => false,
    };
    match pieces.first() {
        Some(Some(first)) if pieces.windows(2).all(follows) => FileLayout::Contiguous(*first),
        _ => FileLayout::Chunked { chunk_blocks_log2: log2, blocks: pieces },
    }
}

/// A chunk starts at a block that has a number.
fn block_of(offset_bytes: u64) -> u32 {
    u32::try_from(offset_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX)
}

fn too_far() -> Error {
    Error::unsupported("a layer of more than 16 TiB")
}
