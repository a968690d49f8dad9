//! Chosen blocks of layer blobs, in the order that is wanted, from as few bytes of the registry as hold them.
//!
//! Chunks are read in the order in which they are stored, neighbours together, several reads at a time; each is checked
//! before it is decoded, and each of its wanted blocks goes to its place in an unlinked file: block `i` of the order is
//! at byte `4096 * i`. So a chunk is read once however its blocks are scattered over the order, and memory is bounded by
//! [`READS_AT_ONCE`] reads of [`READ_BYTES_MAX`] bytes and one decoded chunk each: 34 MiB.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use ublkimg_image::{BLOCK_SIZE, Bundle, Chunk, ChunkId, ChunkIndex};
use ublkimg_registry::{Digest, Repository};

use crate::background;
use crate::chunk::decode_chunk;
use crate::error::{Error, Result};

/// Reads under way at once. What is read are a few percent of an image: enough of it at a time to hide a round trip.
const READS_AT_ONCE: usize = 16;

/// Most stored bytes of one read.
const READ_BYTES_MAX: u64 = 2 << 20;

/// A block of a layer blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct BlockAddress {
    /// Number of the layer, base first.
    pub(super) layer: u16,
    /// Block of its raw stream.
    pub(super) block: u32,
}

/// Blocks in an unlinked file, in order.
#[derive(Debug)]
pub(super) struct OrderedBlocks {
    file: Arc<File>,
    /// Chunks that were read.
    pub(super) chunks: u64,
    /// Their stored bytes.
    pub(super) chunk_bytes: u64,
}

impl OrderedBlocks {
    /// Blocks `range` of the order.
    pub(super) fn read(&self, range: Range<usize>) -> Result<Vec<u8>> {
        let mut raw = vec![0; range.len() * BLOCK_SIZE];
        let offset_bytes = range.start as u64 * BLOCK_SIZE as u64;
        self.file.read_exact_at(&mut raw, offset_bytes).map_err(|error| Error::io("reading back blocks", error))?;
        Ok(raw)
    }
}

/// A block and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    layer: u16,
    chunk: u32,
    /// Block of the chunk.
    block: u32,
    /// Place in the order.
    rank: u32,
}

/// Neighbouring chunks that are read together.
#[derive(Debug, PartialEq, Eq)]
struct Read {
    layer: u16,
    chunks: Range<u32>,
    stored: Range<u64>,
    /// The blocks that are wanted from them, in the sorted list.
    wanted: Range<usize>,
}

/// Reads `order`, blocks that `bundle` has, each once. `advance` hears of the stored bytes; `start` once of all of them.
///
/// # Errors
/// `VerificationFailed` naming a chunk that is not what its digest says; `DiskFull` or `Io` naming `dir`; those of the
/// registry.
pub(super) async fn read_blocks(
    repository: &Repository,
    bundle: &Arc<Bundle>,
    order: &[BlockAddress],
    dir: &Path,
    start: impl Fn(u64),
    advance: impl Fn(u64),
) -> Result<OrderedBlocks> {
    let file = tempfile::tempfile_in(dir);
    let file = Arc::new(file.map_err(|error| Error::io(format!("temporary directory {}", dir.display()), error))?);
    let wanted: Arc<[Wanted]> = locate(bundle, order).into();
    let reads = plan(bundle, &wanted);
    let chunks = reads.iter().map(|read| u64::from(read.chunks.end - read.chunks.start)).sum();
    let chunk_bytes = reads.iter().map(|read| read.stored.end - read.stored.start).sum();
    start(chunk_bytes);
    stream::iter(reads)
        .map(|read| {
            let (wanted, file, bundle) = (Arc::clone(&wanted), Arc::clone(&file), Arc::clone(bundle));
            async move {
                let layer = &bundle.layers[usize::from(read.layer)];
                let stored_bytes = read.stored.end - read.stored.start;
                let stored = repository.blob_range(&Digest(layer.digest.0), read.stored.clone()).await?;
                background::run(move || write_wanted(&bundle, &read, &stored, &wanted, &file)).await??;
                Ok::<u64, Error>(stored_bytes)
            }
        })
        .buffer_unordered(READS_AT_ONCE)
        .try_for_each(|stored_bytes| {
            advance(stored_bytes);
            std::future::ready(Ok(()))
        })
        .await?;
    Ok(OrderedBlocks { file, chunks, chunk_bytes })
}

/// Finds the chunks of the blocks. Of equal chunks in several places only the first is wanted.
fn locate(bundle: &Bundle, order: &[BlockAddress]) -> Vec<Wanted> {
    let mut wanted: Vec<Wanted> = (0..)
        .zip(order)
        .map(|(rank, address)| {
            let index = &bundle.layers[usize::from(address.layer)].index;
            let offset_bytes = u64::from(address.block) * BLOCK_SIZE as u64;
            let chunk = index.find(offset_bytes);
            Wanted { layer: address.layer, chunk, block: address.block - first_block(&index.chunk(chunk)), rank }
        })
        .collect();
    wanted.sort_unstable();
    let mut places: HashMap<ChunkId, (u16, u32)> = HashMap::new();
    for wanted in &mut wanted {
        let id = bundle.layers[usize::from(wanted.layer)].index.chunk(wanted.chunk).id;
        (wanted.layer, wanted.chunk) = *places.entry(id).or_insert((wanted.layer, wanted.chunk));
    }
    wanted.sort_unstable();
    wanted
}

fn first_block(chunk: &Chunk) -> u32 {
    u32::try_from(chunk.raw.start / BLOCK_SIZE as u64).unwrap_or(u32::MAX)
}

/// Groups sorted blocks by neighbouring chunks.
fn plan(bundle: &Bundle, wanted: &[Wanted]) -> Vec<Read> {
    let mut reads: Vec<Read> = Vec::new();
    for (number, block) in wanted.iter().enumerate() {
        let chunk = bundle.layers[usize::from(block.layer)].index.chunk(block.chunk);
        if let Some(read) = reads.last_mut().filter(|read| read.layer == block.layer) {
            let known = read.chunks.contains(&block.chunk);
            let next = read.chunks.end == block.chunk && chunk.stored.end - read.stored.start <= READ_BYTES_MAX;
            if known || next {
                read.chunks.end = block.chunk + 1;
                read.stored.end = chunk.stored.end;
                read.wanted.end = number + 1;
                continue;
            }
        }
        reads.push(Read {
            layer: block.layer,
            chunks: block.chunk..block.chunk + 1,
            stored: chunk.stored,
            wanted: number..number + 1,
        });
    }
    reads
}

/// Checks and decodes the chunks of a read, and writes the wanted blocks to their places.
fn write_wanted(bundle: &Bundle, read: &Read, stored: &Bytes, wanted: &[Wanted], file: &File) -> Result<()> {
    let layer = &bundle.layers[usize::from(read.layer)];
    let fault = |chunk, what: &str| Error::damaged(format!("layer {}: chunk {chunk}: {what}", layer.digest));
    let mut decompressor = zstd::bulk::Decompressor::new().map_err(|error| Error::io("starting zstd", error))?;
    for blocks in wanted[read.wanted.clone()].chunk_by(|a, b| a.chunk == b.chunk) {
        let chunk = layer.index.chunk(blocks[0].chunk);
        let frame = stored_frame(&layer.index, read, stored, chunk.index)
            .ok_or_else(|| fault(chunk.index, "the registry sent less than was asked for"))?;
        let raw = decode_chunk(&mut decompressor, &chunk, frame)
            .map_err(|error| error.within(format_args!("layer blob {}", layer.digest)))?;
        for block in blocks {
            let at = block.block as usize * BLOCK_SIZE;
            file.write_all_at(&raw[at..at + BLOCK_SIZE], u64::from(block.rank) * BLOCK_SIZE as u64)
                .map_err(|error| Error::io("writing blocks to the temporary directory", error))?;
        }
    }
    Ok(())
}

/// The bytes of one chunk among those of a read.
fn stored_frame<'a>(index: &ChunkIndex, read: &Read, stored: &'a [u8], chunk: u32) -> Option<&'a [u8]> {
    let range = index.chunk(chunk).stored;
    let start = usize::try_from(range.start - read.stored.start).ok()?;
    let end = usize::try_from(range.end - read.stored.start).ok()?;
    stored.get(start..end)
}

#[cfg(test)]
mod tests {
    use ublkimg_image::{BundledLayer, ChunkIndexBuilder, Sha256};

    use super::*;

    /// A layer of chunks of four blocks each, with these names, 1000 bytes apart.
    fn layer(names: &[&str]) -> BundledLayer {
        let mut builder = ChunkIndexBuilder::new(50);
        for name in names {
            builder.push(1000, 4 * BLOCK_SIZE as u64, ChunkId(Sha256::of(name.as_bytes()))).unwrap();
        }
        BundledLayer { digest: Sha256::of(b"layer"), blob_len_bytes: 0, index: builder.finish() }
    }

    fn address(layer: u16, block: u32) -> BlockAddress {
        BlockAddress { layer, block }
    }

    #[test]
    fn each_chunk_is_read_once_and_neighbours_together() {
        let bundle = Bundle { layers: vec![layer(&["a", "b", "c", "d"]), layer(&["e", "c"])] };
        let order = [address(0, 13), address(1, 5), address(0, 4), address(0, 0), address(1, 0), address(0, 8)];
        let wanted = locate(&bundle, &order);
        let reads = plan(&bundle, &wanted);
        let all: Vec<_> = reads.iter().map(|read| (read.layer, read.chunks.clone(), read.stored.clone())).collect();
        // Chunk 1 of layer 1 is the same as chunk 2 of layer 0.
        assert_eq!(all, [(0, 0..4, 50..4050), (1, 0..1, 50..1050)]);
        assert_eq!(reads[0].wanted, 0..5);
        let ranks: Vec<u32> = wanted.iter().map(|block| block.rank).collect();
        assert_eq!(ranks, [3, 2, 5, 1, 0, 4]);
    }

    #[test]
    fn gaps_and_long_runs_end_a_read() {
        let names: Vec<String> = (0..3000).map(|name| name.to_string()).collect();
        let bundle = Bundle { layers: vec![layer(&names.iter().map(String::as_str).collect::<Vec<_>>())] };
        let order: Vec<BlockAddress> =
            (0..3000).filter(|chunk| *chunk != 10).map(|chunk| address(0, 4 * chunk)).collect();
        let reads = plan(&bundle, &locate(&bundle, &order));
        let chunks: Vec<_> = reads.iter().map(|read| read.chunks.clone()).collect();
        assert_eq!(chunks, [0..10, 11..2108, 2108..3000]);
        assert!(reads.iter().all(|read| read.stored.end - read.stored.start <= READ_BYTES_MAX));
    }
}
