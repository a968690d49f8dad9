//! Where file contents go in a layer blob, and which bytes make a chunk.
//!
//! The grain decides what can be shared and what a read costs, so cuts follow files: a file of a chunk's size or more starts
//! a chunk and is cut at that grain, so an unchanged file has unchanged chunks wherever it moves. Smaller files are packed
//! in path order (what is used together lies together), and a pack ends at a file boundary that the *contents* choose:
//! when one file changes, the packs after it are cut where they were before. Packs come first, large files after them.
//! Every file starts at a block; the rest of its last block is zero. Equal contents are stored once, and so are equal pieces
//! of large files.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use ublkimg_image::{BLOCK_SIZE, ChunkId, DataBlock, FileData, FileLayout, Kind, MAX_BLOCKS, NodeId, Space, Tree};

use crate::chunk_size::ChunkSize;
use crate::error::{Error, Result};
use crate::frames::Chunk;
use crate::layer::{Layer, for_each_path};
use crate::spool::{Content, ContentId, PieceAt, Spool};

/// A pack does not end by choice before it has this part of a chunk's blocks (64 of 256 KiB): smaller chunks compress badly
/// and cost a request each.
const PACK_MIN_PART: u32 = 4;

/// From there on, one file in sixteen ends the pack. With typical small files of 4 to 8 KiB and chunks of 256 KiB a pack
/// gets 64 KiB and as much again on average, and seldom reaches the limit, which is not a content-chosen boundary.
const PACK_END_MASK: u8 = 0x0f;

/// What the data area of a blob holds.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Pieces of the spool in the order in which they are stored.
    extents: Vec<Extent>,
    chunks: Vec<PlannedChunk>,
    /// Length of the data area.
    pub(crate) blocks: u32,
}

/// A piece in the spool that starts at a block of the data area.
#[derive(Clone, Copy, Debug)]
struct Extent {
    at: PieceAt,
    len_bytes: u32,
}

#[derive(Debug)]
struct PlannedChunk {
    extents: Range<usize>,
    blocks: u32,
}

impl Plan {
    pub(crate) fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// A chunk: whole blocks.
    pub(crate) fn read_chunk(&self, chunk: usize, spool: &Spool) -> Result<Chunk> {
        let PlannedChunk { extents, blocks } = &self.chunks[chunk];
        let extents = &self.extents[extents.clone()];
        if let [Extent { at: PieceAt::Chunk(number), .. }] = extents {
            let chunk = spool.chunk(*number)?;
            return Ok(Chunk::Stored { frame: spool.read_chunk(chunk)?, id: chunk.id });
        }
        let mut raw = vec![0; *blocks as usize * BLOCK_SIZE];
        let mut start = 0;
        for extent in extents {
            let len = extent.len_bytes as usize;
            spool.read(&mut raw[start..start + len], extent.at)?;
            start += len.next_multiple_of(BLOCK_SIZE);
        }
        Ok(Chunk::Raw(raw))
    }

    /// Puts a piece at the end of the data area, in the chunk that is being filled. Returns its first block.
    fn push(&mut self, at: PieceAt, len_bytes: u64) -> Result<u32> {
        let blocks = u32::try_from(len_bytes.div_ceil(BLOCK_SIZE as u64)).unwrap_or(u32::MAX);
        let len_bytes = u32::try_from(len_bytes).unwrap_or(u32::MAX);
        let first = self.blocks;
        let end = first.checked_add(blocks).filter(|end| *end <= MAX_BLOCKS);
        self.blocks = end.ok_or_else(|| Error::unsupported("a layer of more than 16 TiB"))?;
        self.extents.push(Extent { at, len_bytes });
        Ok(first)
    }

    /// Makes a chunk of what was pushed since the last one.
    fn end_chunk(&mut self, first_block: u32) {
        let start = self.chunks.last().map_or(0, |chunk| chunk.extents.end);
        if start < self.extents.len() {
            self.chunks.push(PlannedChunk { extents: start..self.extents.len(), blocks: self.blocks - first_block });
        }
    }
}

/// Lays out the files of a layer: plans the data area and writes the layouts into the tree.
///
/// # Errors
/// `Unsupported` above 16 TiB.
pub(crate) fn place(layer: &mut Layer, spool: &Spool) -> Result<Plan> {
    let order = contents_in_path_order(&layer.tree, &layer.files, spool);
    let is_small = |id: &&ContentId| spool.content(**id).size_bytes < spool.chunk_size().bytes();
    let mut plan = Plan::default();
    let mut first_blocks: HashMap<ContentId, Vec<u32>> = HashMap::with_capacity(order.len());
    pack_small(&mut plan, spool, order.iter().filter(is_small), &mut first_blocks)?;
    // First blocks of the pieces of large files.
    let mut placed: HashMap<ChunkId, u32> = HashMap::new();
    for id in order.iter().filter(|id| !is_small(id)) {
        let content = spool.content(*id);
        let mut blocks = Vec::with_capacity(content.stored.len());
        for piece in &content.stored {
            let PieceAt::Chunk(number) = piece.at else { continue };
            let first = match placed.entry(spool.chunk(number)?.id) {
                Entry::Occupied(equal) => *equal.get(),
                Entry::Vacant(new) => {
                    let first = plan.push(piece.at, content.piece_len_bytes(piece.piece))?;
                    plan.end_chunk(first);
                    *new.insert(first)
                }
            };
            blocks.push(first);
        }
        first_blocks.insert(*id, blocks);
    }
    for (node, id) in &layer.files {
        let content = spool.content(*id);
        let layout = layout(content, spool.chunk_size(), first_blocks.get(id).map(Vec::as_slice).unwrap_or_default());
        let data = FileData { size_bytes: content.size_bytes, layout };
        layer.tree.node_mut(*node).kind = Kind::File(data);
    }
    Ok(plan)
}

/// Each content once, where it first occurs. Contents of files that were replaced do not occur.
fn contents_in_path_order(tree: &Tree, files: &HashMap<NodeId, ContentId>, spool: &Spool) -> Vec<ContentId> {
    let mut order = Vec::with_capacity(spool.len());
    let mut seen = std::collections::HashSet::with_capacity(spool.len());
    for_each_path(tree, |_, id, _| {
        if let Some(content) = files.get(&id)
            && seen.insert(*content)
        {
            order.push(*content);
        }
    });
    order
}

fn pack_small<'a>(
    plan: &mut Plan,
    spool: &Spool,
    contents: impl Iterator<Item = &'a ContentId>,
    first_blocks: &mut HashMap<ContentId, Vec<u32>>,
) -> Result<()> {
    let chunk_blocks = spool.chunk_size().blocks();
    let mut pack_start = 0;
    for id in contents {
        let content = spool.content(*id);
        let Some(piece) = content.stored.first() else { continue };
        let blocks = content.size_bytes.div_ceil(BLOCK_SIZE as u64);
        if u64::from(plan.blocks - pack_start) + blocks > u64::from(chunk_blocks) {
            plan.end_chunk(pack_start);
            pack_start = plan.blocks;
        }
        let first = plan.push(piece.at, content.size_bytes)?;
        first_blocks.insert(*id, vec![first]);
        if plan.blocks - pack_start >= chunk_blocks / PACK_MIN_PART
            && content.identity.is_some_and(|identity| identity.0[0] & PACK_END_MASK == 0)
        {
            plan.end_chunk(pack_start);
            pack_start = plan.blocks;
        }
    }
    plan.end_chunk(pack_start);
    Ok(())
}

/// `first_blocks`: of the stored pieces.
fn layout(content: &Content, chunk_size: ChunkSize, first_blocks: &[u32]) -> FileLayout {
    let own = |block: u32| DataBlock { space: Space::Own, block };
    if content.size_bytes == 0 {
        return FileData::EMPTY.layout;
    }
    let in_one_run = first_blocks.windows(2).all(|pair| pair[0] + chunk_size.blocks() == pair[1]);
    if !content.has_holes()
        && in_one_run
        && let Some(first) = first_blocks.first()
    {
        return FileLayout::Contiguous(own(*first));
    }
    let mut blocks = vec![None; usize::try_from(content.pieces()).unwrap_or_default()];
    for (piece, block) in content.stored.iter().zip(first_blocks) {
        blocks[piece.piece as usize] = Some(own(*block));
    }
    FileLayout::Chunked { chunk_blocks_log2: chunk_size.blocks_log2(), blocks }
}

#[cfg(test)]
mod tests;
