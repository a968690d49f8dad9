//! Where the chunks are that are here, by name: what several blobs have is fetched once and copied for the others.
//!
//! A chunk is named by the digest of its stored frame, and blocks get into a blob file only from a frame that had the
//! digest which the file's own chunk index states. So what came in under a name is what every frame of that name decodes
//! to, whoever stated it. What an index says of chunks that never came in is not noted: a forged index can lead nobody
//! astray. Before blocks are copied they are compared with their sums (`sums`), for a disk may have changed them.
//!
//! A place is a hint: its blocks may be evicted, and then the chunk is fetched.

use std::collections::HashMap;
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use ublkimg_image::{BLOCK_SIZE, ChunkIndex, Sha256};

use super::bitmap_file::{self, Identity};
use super::{BlobFile, Store};
use crate::error::Result;

/// Names in one of two generations, seven eighths of 2^18, at which a hash table is full: 26 MB for both, 110 GB of
/// layers in full chunks.
const GENERATION_MAX: usize = 229_376;

/// Where a chunk is.
#[derive(Debug, Clone)]
pub(crate) struct ChunkPlace {
    file: Arc<Identity>,
    first_block: u32,
    len_blocks: u32,
}

impl ChunkPlace {
    /// Whether it is the place in this blob file that begins with this byte.
    pub(crate) fn is(&self, file: &BlobFile, raw_offset_bytes: u64) -> bool {
        self.file.index == file.index_digest() && u64::from(self.first_block) * BLOCK_SIZE as u64 == raw_offset_bytes
    }

    /// Length of the chunk.
    pub(crate) fn len_bytes(&self) -> u64 {
        u64::from(self.len_blocks) * BLOCK_SIZE as u64
    }

    fn blocks(&self) -> Range<u32> {
        self.first_block..self.first_block.saturating_add(self.len_blocks)
    }
}

/// The places. When there are too many, those go that were neither noted nor asked for lately.
#[derive(Debug, Default)]
pub(crate) struct ChunkPlaces(Mutex<Generations>);

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<Sha256, ChunkPlace>,
    old: HashMap<Sha256, ChunkPlace>,
}

impl Generations {
    fn insert(&mut self, name: Sha256, place: ChunkPlace) {
        if self.young.len() >= GENERATION_MAX {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(name, place);
    }
}

impl ChunkPlaces {
    /// Where the chunk with this name was last seen.
    pub(crate) fn find(&self, name: Sha256) -> Option<ChunkPlace> {
        let mut generations = self.0.lock();
        if let Some(place) = generations.young.get(&name) {
            return Some(place.clone());
        }
        let place = generations.old.remove(&name)?;
        generations.insert(name, place.clone());
        Some(place)
    }

    /// It is not there any more.
    pub(crate) fn forget(&self, name: Sha256) {
        let mut generations = self.0.lock();
        generations.young.remove(&name);
        generations.old.remove(&name);
    }

    /// The blocks of a chunk with this name are in a blob file, from a frame that was checked.
    pub(super) fn note(&self, name: Sha256, file: &Arc<Identity>, blocks: Range<u32>) {
        let (first_block, len_blocks) = (blocks.start, blocks.end - blocks.start);
        self.0.lock().insert(name, ChunkPlace { file: Arc::clone(file), first_block, len_blocks });
    }
}

impl Store {
    /// Where the chunks are.
    pub(crate) fn chunk_places(&self) -> &Arc<ChunkPlaces> {
        &self.shared.chunk_places
    }

    /// Notes the chunks of a blob that earlier processes left here. `digest` is that of the chunk index.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn note_chunks(&self, digest: Sha256, index: &ChunkIndex) -> Result<()> {
        let file = Arc::new(Identity { index: digest, blocks: index.raw_len_blocks() });
        let Some(present) = bitmap_file::read_believed(&self.layout.blob(digest), *file, self.boot_id)? else {
            return Ok(());
        };
        for chunk in index.iter() {
            let blocks = blocks_of(&chunk.raw);
            if present.first_missing(blocks.clone()).is_none() {
                self.chunk_places().note(chunk.id.0, &file, blocks);
            }
        }
        Ok(())
    }

    /// Fills `raw` with the chunk at a place; false if it is not there any more, or not what was written there.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub(crate) fn read_chunk(&self, place: &ChunkPlace, raw: &mut Vec<u8>) -> Result<bool> {
        let Identity { index, blocks } = *place.file;
        if !self.layout.blob(index).data.exists() {
            return Ok(false);
        }
        raw.clear();
        raw.resize(place.len_blocks as usize * BLOCK_SIZE, 0);
        self.blob(index, blocks)?.read_checked(place.blocks(), raw)
    }
}

/// The blocks of a chunk, whose bytes these are.
fn blocks_of(raw: &Range<u64>) -> Range<u32> {
    let block = |offset_bytes: u64| u32::try_from(offset_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
    block(raw.start)..block(raw.end)
}

impl BlobFile {
    /// The blocks of the chunk with this name are here, from a frame that was checked.
    pub(crate) fn note_chunk(&self, name: Sha256, raw: &Range<u64>) {
        self.places().note(name, self.identity(), blocks_of(raw));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: usize) -> Sha256 {
        Sha256::of(&number.to_le_bytes())
    }

    #[test]
    fn there_are_so_many_names_and_those_stay_that_are_asked_for() {
        let places = ChunkPlaces::default();
        let file = Arc::new(Identity { index: Sha256::of(b""), blocks: 1 });
        for number in 0..3 * GENERATION_MAX {
            places.note(name(number), &file, 0..1);
            if number % 1000 == 0 {
                assert!(places.find(name(0)).is_some(), "after {number} others");
            }
        }
        let generations = places.0.lock();
        assert!(generations.young.len() <= GENERATION_MAX && generations.old.len() <= GENERATION_MAX);
        drop(generations);
        assert!(places.find(name(1)).is_none(), "nobody asked for it");
        assert!(places.find(name(3 * GENERATION_MAX - 1)).is_some());
        places.forget(name(0));
        assert!(places.find(name(0)).is_none());
    }
}
