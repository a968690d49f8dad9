//! What the disk would not take: kept in memory, so that a full or broken disk costs speed and no error.
//!
//! A few hundred places for one chunk each in a file that has no disk; when all are taken the oldest is given away. It is
//! read like the other files. Nothing of it outlives the process.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::MemfdFlags;
use ublkimg_image::{BLOCK_SIZE, CHUNK_BYTES, Sha256};

use super::evictions::Evictions;
use crate::error::{Error, Result};

/// Chunks that are kept, 64 MiB in all: several times what is demanded at a time, so that a chunk is read before it goes.
const PLACES: u32 = 256;

/// Blocks of a place.
const PLACE_BLOCKS: u32 = 64;
const _: () = assert!(PLACE_BLOCKS as u64 * BLOCK_SIZE as u64 == CHUNK_BYTES);

/// How often the log says that the disk takes nothing.
const WARNING_PERIOD: Duration = Duration::from_secs(10);

/// The first block of a chunk in the raw blocks that an index vouches for.
type Key = (Sha256, u32);

/// The chunks in memory.
#[derive(Debug)]
pub(super) struct Overflow {
    file: Arc<File>,
    places: Mutex<Places>,
    /// Chunks that were ever put here; reads do not look as long as it is zero.
    taken: AtomicU64,
    evictions: Arc<Evictions>,
}

#[derive(Debug, Default)]
struct Places {
    /// Place and length in blocks.
    by_key: BTreeMap<Key, (u32, u32)>,
    /// Oldest first.
    order: VecDeque<Key>,
    warned: Option<Instant>,
}

impl Overflow {
    pub(super) fn new(evictions: Arc<Evictions>) -> Result<Self> {
        let file = rustix::fs::memfd_create("ublkimg-overflow", MemfdFlags::CLOEXEC);
        let file = file.map_err(|error| Error::io("make a file in memory", error.into()))?;
        Ok(Self { file: Arc::new(File::from(file)), places: Mutex::default(), taken: AtomicU64::new(0), evictions })
    }

    /// To be read at the offsets that [`Self::find`] gives.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// How many chunks the disk did not take so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }

    /// Keeps a chunk that the disk did not take, because of `error`.
    ///
    /// # Errors
    /// `error`, if it is too long to be a chunk; `Io` when there is no memory either.
    pub(super) fn put(&self, index: Sha256, block: u32, data: &[u8], error: Error) -> Result<()> {
        let len_blocks = u32::try_from(data.len() / BLOCK_SIZE).unwrap_or(u32::MAX);
        if data.len() as u64 > CHUNK_BYTES {
            return Err(error);
        }
        let mut places = self.places.lock();
        if places.warned.is_none_or(|warned| warned.elapsed() > WARNING_PERIOD) {
            places.warned = Some(Instant::now());
            tracing::warn!("store: what is fetched is served from memory: {}", error.chain());
        }
        let place = places.free(&self.evictions);
        let written = self.file.write_all_at(data, u64::from(place) * CHUNK_BYTES);
        written.map_err(|error| Error::io("write into memory", error))?;
        places.insert((index, block), place, len_blocks);
        self.taken.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Looks at a range of blocks, not empty: the block of [`Self::file`] where its first one is, if it is here, and the
    /// end of the blocks from there on that are side by side here, or that are not here.
    pub(super) fn find(&self, index: Sha256, blocks: Range<u32>) -> (Option<u32>, u32) {
        if self.taken() == 0 {
            return (None, blocks.end);
        }
        let places = self.places.lock();
        let before = places.by_key.range(..=(index, blocks.start)).next_back();
        if let Some(((of, block), (place, len_blocks))) = before
            && *of == index
            && blocks.start - block < *len_blocks
        {
            let start = place * PLACE_BLOCKS + (blocks.start - block);
            return (Some(start), (block + len_blocks).min(blocks.end));
        }
        let next = places.by_key.range((index, blocks.start)..(index, blocks.end)).next();
        (None, next.map_or(blocks.end, |((_, block), _)| *block))
    }
}

impl Places {
    /// A place that nobody has; who still reads the chunk that had it notices by the count of evictions.
    fn free(&mut self, evictions: &Evictions) -> u32 {
        let used = u32::try_from(self.by_key.len()).unwrap_or(u32::MAX);
        if used < PLACES {
            return used;
        }
        let oldest = self.order.pop_front();
        let (place, _) = oldest.and_then(|oldest| self.by_key.remove(&oldest)).unwrap_or_default();
        evictions.note();
        place
    }

    fn insert(&mut self, key: Key, place: u32, len_blocks: u32) {
        // A second copy of a chunk cannot come: what is here is not fetched.
        if self.by_key.insert(key, (place, len_blocks)).is_none() {
            self.order.push_back(key);
        }
    }
}
