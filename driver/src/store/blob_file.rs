//! The raw blocks of one layer blob, as far as they are here.
//!
//! A chunk is written to the data file first, then its bits to the live bitmap file, then to memory. The first two land
//! in the page cache, in this order, and the page cache outlives the process: whatever a killed process leaves, a bit in
//! the live file has its data. It does not outlive the kernel, so the live file counts in its own boot only. A copy of
//! the bitmap is made durable behind a sync of the data: bits as they were *before* the sync, written after it.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crossbeam::channel::Sender;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use ublkimg_image::{BLOCK_SIZE, Sha256};

use super::bitmap::Bitmap;
use super::bitmap_file::{self, BootId, Identity, Validity};
use super::chunk_places::ChunkPlaces;
use super::disk;
use super::evictions::Evictions;
use super::layout::{BlobPaths, sync_directory_of};
use super::overflow::Overflow;
use super::sums::{self, Verdict};
use crate::error::{Error, ErrorKind, Result};

/// Blocks that are evicted together: 1 MiB, a few chunks. Smaller ones would make the disk's map of the file long.
const EXTENT_BLOCKS: u32 = 256;

/// What the blob files of a store have in common.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    /// Keeps other processes out of the store for as long as a file is written.
    pub(super) lock: Arc<File>,
    pub(super) wake_sync: Sender<()>,
    /// Told when something is written after a while without.
    pub(super) written: Arc<Notify>,
    pub(super) evictions: Arc<Evictions>,
    pub(super) overflow: Arc<Overflow>,
    pub(super) chunk_places: Arc<ChunkPlaces>,
    /// Seconds since 1970, as of a moment ago.
    pub(super) clock_s: Arc<AtomicU32>,
}

/// Where a block can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the file itself.
    Disk,
    /// In [`BlobFile::memory`], at this block of it.
    Memory(u32),
}

/// A sparse file of raw blocks and the set of those that are there.
#[derive(Debug)]
pub struct BlobFile {
    identity: Arc<Identity>,
    paths: BlobPaths,
    data: Arc<File>,
    sums: File,
    present: Bitmap,
    /// When each extent was last read, by the clock of [`Shared`].
    used_s: Box<[AtomicU32]>,
    /// The live bitmap. Held while words of it are written (into the page cache): two writers of one word must not
    /// overtake each other between memory and file.
    live: Mutex<File>,
    /// Held by the one that makes bits durable.
    syncing: Mutex<()>,
    /// Held shared by those that write, exclusively by the one that evicts.
    writing: RwLock<()>,
    /// Blocks were written since the last sync began.
    dirty: AtomicBool,
    /// The disk could not read what it had: it gets no more of this file.
    is_broken: AtomicBool,
    shared: Shared,
}

impl BlobFile {
    pub(super) fn open(paths: BlobPaths, identity: Identity, boot_id: BootId, shared: Shared) -> Result<Self> {
        let sums = sums::open(&paths.sums, identity.blocks);
        let (sums, are_new) = sums.map_err(|error| Error::path("open", &paths.sums, error))?;
        // After the sums: both names are to be durable before a bit is.
        let data = open_data(&paths, identity, are_new)?;
        let used_s = last_use(&paths).unwrap_or_else(|| shared.clock_s.load(Ordering::Relaxed));
        let present = match bitmap_file::read(&paths.live, identity, Validity::Live(boot_id))? {
            Some(live) => live,
            None => {
                let durable = bitmap_file::read(&paths.durable, identity, Validity::Durable)?;
                let present = durable.unwrap_or_else(|| Bitmap::empty(identity.blocks));
                bitmap_file::write(&paths.live, identity, Validity::Live(boot_id), &present.snapshot())?;
                present
            }
        };
        let live = OpenOptions::new().write(true).open(&paths.live);
        let live = live.map_err(|error| Error::path("open", &paths.live, error))?;
        // What an earlier process wrote in this boot may not be durable yet.
        let dirty = AtomicBool::new(present.count() > 0);
        let extents = identity.blocks.div_ceil(EXTENT_BLOCKS);
        Ok(Self {
            identity: Arc::new(identity),
            paths,
            data: Arc::new(data),
            sums,
            present,
            used_s: (0..extents).map(|_| AtomicU32::new(used_s)).collect(),
            live: Mutex::new(live),
            syncing: Mutex::new(()),
            writing: RwLock::new(()),
            dirty,
            is_broken: AtomicBool::new(false),
            shared,
        })
    }

    /// The data file, to be read at offsets. A block may be read only when [`Self::first_missing`] has said that it is
    /// there.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.data
    }

    /// Length in blocks.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.identity.blocks
    }

    pub(super) fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    pub(super) fn places(&self) -> &ChunkPlaces {
        &self.shared.chunk_places
    }

    /// Digest of the chunk index that vouches for the content.
    #[must_use]
    pub fn index_digest(&self) -> Sha256 {
        self.identity.index
    }

    /// The first block of a range that is not there; blocks past the end are not. Takes no lock.
    #[must_use]
    pub fn first_missing(&self, range: Range<u32>) -> Option<u32> {
        self.present.first_missing(range)
    }

    /// The first block of a range that is there. Takes no lock.
    #[must_use]
    pub fn first_present(&self, range: Range<u32>) -> Option<u32> {
        self.present.first_present(range)
    }

    /// Where the first block of a range, not empty, can be read, and the end of those after it of which the same is true.
    /// Takes a lock only where the disk has refused something.
    pub(crate) fn find(&self, blocks: Range<u32>) -> (Option<Place>, u32) {
        let missing = self.first_missing(blocks.clone()).unwrap_or(blocks.end);
        if missing > blocks.start {
            return (Some(Place::Disk), missing);
        }
        let end = self.first_present(blocks.clone()).unwrap_or(blocks.end);
        let (place, end) = self.shared.overflow.find(self.identity.index, blocks.start..end);
        (place.map(Place::Memory), end)
    }

    /// Whether all blocks of a range can be read.
    pub(crate) fn holds(&self, mut blocks: Range<u32>) -> bool {
        while !blocks.is_empty() {
            match self.find(blocks.clone()) {
                (Some(_), end) => blocks.start = end,
                (None, _) => return false,
            }
        }
        true
    }

    /// The file that [`Place::Memory`] is about; one for the whole store.
    pub(crate) fn memory(&self) -> &Arc<File> {
        self.shared.overflow.file()
    }

    /// What a reader looks at before and after it reads.
    pub(crate) fn evictions(&self) -> &Arc<Evictions> {
        &self.shared.evictions
    }

    /// Notes that blocks are read now: what was not for the longest time is evicted first.
    pub(crate) fn note_use(&self, blocks: Range<u32>) {
        let now_s = self.shared.clock_s.load(Ordering::Relaxed);
        let extents = blocks.start / EXTENT_BLOCKS..blocks.end.div_ceil(EXTENT_BLOCKS);
        for extent in self.used_s.get(extents.start as usize..extents.end as usize).unwrap_or_default() {
            // Most reads are not the first of this second: look before writing to a line that other threads read.
            if extent.load(Ordering::Relaxed) != now_s {
                extent.store(now_s, Ordering::Relaxed);
            }
        }
    }

    /// The extents with a block that is there: when it was last read, and its blocks.
    pub(super) fn extents(&self) -> Vec<(u32, Range<u32>)> {
        let extent = |(number, used_s): (u32, &AtomicU32)| {
            let start = number * EXTENT_BLOCKS;
            let blocks = start..start.saturating_add(EXTENT_BLOCKS).min(self.identity.blocks);
            self.first_present(blocks.clone()).map(|_| (used_s.load(Ordering::Relaxed), blocks))
        };
        (0..).zip(&self.used_s).filter_map(extent).collect()
    }

    /// Blocks of a range that are there.
    pub(super) fn count(&self, blocks: Range<u32>) -> u32 {
        self.present.count_in(blocks)
    }

    /// Number of blocks that are there.
    #[must_use]
    pub fn present_blocks(&self) -> u32 {
        self.present.count()
    }

    /// Keeps verified blocks from `block` on, and then says that they are there. If the disk is full or broken, memory
    /// takes them for a while.
    ///
    /// # Errors
    /// `Invalid` when `data` is not a number of blocks inside the file. Otherwise what kept the disk from taking more
    /// than a chunk. The blocks are not there then.
    pub fn write(&self, block: u32, data: &[u8]) -> Result<()> {
        let range = self.range_of(block, data)?;
        match self.write_to_disk(range, data) {
            Ok(()) => Ok(()),
            Err(error) => self.shared.overflow.put(self.identity.index, block, data, error),
        }
    }

    fn write_to_disk(&self, range: Range<u32>, data: &[u8]) -> Result<()> {
        if self.is_broken.load(Ordering::Relaxed) {
            let what = format!("{} could not be read", self.paths.data.display());
            return Err(Error::new(ErrorKind::Io, what));
        }
        let _no_eviction = self.writing.read();
        self.write_data(range.start, data)?;
        let summed = sums::write(&self.paths.sums, &self.sums, range.start, data);
        summed.map_err(|error| Error::path("write", &self.paths.sums, error))?;
        self.mark_present(range)
    }

    /// The disk could not read blocks that it had: they are not there any more, and what is fetched in their place stays
    /// in memory.
    pub(crate) fn cannot_read(&self, blocks: Range<u32>) {
        if !self.is_broken.swap(true, Ordering::Relaxed) {
            let path = self.paths.data.display();
            tracing::error!("store: {path} cannot be read: blocks {blocks:?} are fetched again and kept in memory");
        }
        self.present.clear(blocks.start..blocks.end.min(self.identity.blocks));
        let live = self.live.lock();
        if let Err(error) = self.write_live(&live) {
            tracing::error!("store: {}", error.chain());
        }
    }

    /// Compares the blocks of a range that are there with their sums: the wrong ones, and how many have no sum.
    pub(super) fn check(&self, blocks: Range<u32>) -> Result<(Vec<u32>, u32)> {
        let failed = |error| Error::path("read", &self.paths.data, error);
        let (mut wrong, mut unknown) = (Vec::new(), 0);
        let mut at = blocks.start;
        while let Some(start) = self.first_present(at..blocks.end) {
            let end = self.first_missing(start..blocks.end).unwrap_or(blocks.end);
            let mut data = vec![0; (end - start) as usize * BLOCK_SIZE];
            self.data.read_exact_at(&mut data, u64::from(start) * BLOCK_SIZE as u64).map_err(failed)?;
            for (block, verdict) in (start..).zip(sums::check(&self.sums, start, &data).map_err(failed)?) {
                match verdict {
                    Verdict::Right => {}
                    Verdict::Wrong => wrong.push(block),
                    Verdict::Unknown => unknown += 1,
                }
            }
            at = end;
        }
        Ok((wrong, unknown))
    }

    /// Fills `data` with blocks of the disk; false if one of them is not there, or not what was written, or of unknown sum.
    pub(super) fn read_checked(&self, blocks: Range<u32>, data: &mut [u8]) -> Result<bool> {
        let failed = |error| Error::path("read", &self.paths.data, error);
        let evictions = self.shared.evictions.count();
        if self.first_missing(blocks.clone()).is_some() {
            return Ok(false);
        }
        self.data.read_exact_at(data, u64::from(blocks.start) * BLOCK_SIZE as u64).map_err(failed)?;
        let verdicts = sums::check(&self.sums, blocks.start, data).map_err(failed)?;
        let is_right = verdicts.iter().all(|verdict| matches!(verdict, Verdict::Right));
        Ok(is_right && self.shared.evictions.count() == evictions)
    }

    fn range_of(&self, block: u32, data: &[u8]) -> Result<Range<u32>> {
        let blocks = u32::try_from(data.len() / BLOCK_SIZE).ok().filter(|_| data.len().is_multiple_of(BLOCK_SIZE));
        let end = blocks.and_then(|blocks| block.checked_add(blocks)).filter(|end| *end <= self.identity.blocks);
        let what = || format!("{} bytes at block {block} of {}", data.len(), self.paths.data.display());
        end.map(|end| block..end).ok_or_else(|| Error::new(ErrorKind::Invalid, what()))
    }

    pub(super) fn write_data(&self, block: u32, data: &[u8]) -> Result<()> {
        let offset_bytes = u64::from(block) * BLOCK_SIZE as u64;
        let written = disk::write_all_at(&self.paths.data, &self.data, data, offset_bytes);
        written.map_err(|error| Error::path("write", &self.paths.data, error))
    }

    fn mark_present(&self, range: Range<u32>) -> Result<()> {
        {
            let live = self.live.lock();
            let (first, words) = self.present.words_with(range.clone());
            let written = bitmap_file::write_words(&self.paths.live, &live, first, &words);
            written.map_err(|error| Error::path("write", &self.paths.live, error))?;
            self.present.set(range);
        }
        if !self.dirty.swap(true, Ordering::AcqRel) {
            // A full channel means that the thread is about to look anyway; no receiver, that the store is closing.
            let _ = self.shared.wake_sync.try_send(());
            self.shared.written.notify_one();
        }
        Ok(())
    }

    /// Whether [`Self::sync`] has something to do.
    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Makes durable what was written so far. May take as long as the disk does.
    ///
    /// # Errors
    /// `NoSpace` or `Io`. If the data itself could not be written back, the blocks that were not durable before are
    /// forgotten: the kernel may have dropped them (fsync(2), errors).
    pub(crate) fn sync(&self) -> Result<()> {
        let _only_one = self.syncing.lock();
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let outcome = self.make_durable();
        if outcome.is_err() {
            self.dirty.store(true, Ordering::Release);
        }
        outcome
    }

    /// For who holds `syncing`.
    fn make_durable(&self) -> Result<()> {
        let bits = self.present.snapshot();
        let summed = disk::sync(&self.paths.sums, &self.sums);
        summed.map_err(|error| Error::path("sync", &self.paths.sums, error))?;
        if let Err(error) = disk::sync(&self.paths.data, &self.data) {
            self.forget_unsynced()?;
            return Err(Error::path("sync", &self.paths.data, error));
        }
        bitmap_file::write(&self.paths.durable, *self.identity, Validity::Durable, &bits)
    }

    /// Gives the space of some ranges of blocks back. They are not there any more, for nobody and for ever, before their
    /// data goes: first the bits, here and on the disk, then a note for those who read ([`Evictions`]), then the holes.
    /// Needs no space on a disk that has none.
    ///
    /// # Errors
    /// `NoSpace` or `Io`, also of a disk that needs space to overwrite: then nothing has changed, or the blocks are not there
    /// and may still take their space.
    pub(crate) fn evict(&self, ranges: &[Range<u32>]) -> Result<()> {
        let _only_one = self.syncing.lock();
        // Nobody puts data back where a hole is about to be.
        let _no_writer = self.writing.write();
        {
            let live = self.live.lock();
            let before = self.present.snapshot();
            for range in ranges {
                self.present.clear(range.clone());
            }
            if let Err(error) = self.write_live(&live) {
                // Their data is there: they are evicted another time.
                self.present.restore(&before);
                return Err(error);
            }
        }
        if let Err(error) = self.make_durable() {
            self.remove_durable(&error)?;
        }
        self.shared.evictions.note_and_wait();
        for range in ranges {
            let bytes = u64::from(range.start) * BLOCK_SIZE as u64..u64::from(range.end) * BLOCK_SIZE as u64;
            let punched = disk::punch_hole(&self.paths.data, &self.data, bytes);
            punched.map_err(|error| Error::path("punch a hole into", &self.paths.data, error))?;
        }
        Ok(())
    }

    fn forget_unsynced(&self) -> Result<()> {
        let durable = bitmap_file::read(&self.paths.durable, *self.identity, Validity::Durable)?;
        let durable = durable.unwrap_or_else(|| Bitmap::empty(self.identity.blocks));
        let live = self.live.lock();
        self.present.retain(&durable);
        self.shared.evictions.note();
        self.write_live(&live)
    }

    fn write_live(&self, live: &File) -> Result<()> {
        let written = bitmap_file::write_words(&self.paths.live, live, 0, &self.present.snapshot());
        written.map_err(|error| Error::path("write", &self.paths.live, error))
    }

    /// The durable bitmap could not be written, on a full disk for one, and the old one has bits whose data is about to go:
    /// none at all may forget, and does not lie. The next sync writes one.
    fn remove_durable(&self, error: &Error) -> Result<()> {
        let index = self.identity.index;
        tracing::warn!("store: a power cut would forget {index} until it is synced again: {}", error.chain());
        let removed = disk::remove(&self.paths.durable);
        removed.map_err(|error| Error::path("remove", &self.paths.durable, error))?;
        sync_directory_of(&self.paths.durable)?;
        self.dirty.store(true, Ordering::Release);
        let _ = self.shared.wake_sync.try_send(());
        Ok(())
    }
}

impl Drop for BlobFile {
    /// Notes when it was last read, which says when it is evicted. Opening it to look is no use of it.
    fn drop(&mut self) {
        let used_s = self.used_s.iter().map(|used_s| used_s.load(Ordering::Relaxed)).max().unwrap_or_default();
        let used = std::time::UNIX_EPOCH + std::time::Duration::from_secs(u64::from(used_s));
        let _ = self.live.get_mut().set_modified(used);
    }
}

/// When a file that is there was last used, in seconds since 1970.
pub(super) fn last_use(paths: &BlobPaths) -> Option<u32> {
    let modified = std::fs::metadata(&paths.live).and_then(|metadata| metadata.modified()).ok()?;
    let since_1970 = modified.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(u32::try_from(since_1970.as_secs()).unwrap_or(u32::MAX))
}

/// Opens the data file; one that is new, or not as long as it should be, loses its bitmaps before it gets its length. Its name is
/// durable then, and with `has_new_neighbour` at any rate, and those of its neighbours with it.
fn open_data(paths: &BlobPaths, identity: Identity, has_new_neighbour: bool) -> Result<File> {
    let len_bytes = u64::from(identity.blocks) * BLOCK_SIZE as u64;
    let doing = |error| Error::path("open", &paths.data, error);
    let data = disk::open(&paths.data).map_err(doing)?;
    if data.metadata().map_err(doing)?.len() == len_bytes {
        if has_new_neighbour {
            sync_directory_of(&paths.data)?;
        }
        return Ok(data);
    }
    for bitmap in [&paths.live, &paths.durable] {
        disk::remove(bitmap).map_err(|error| Error::path("remove", bitmap, error))?;
    }
    sync_directory_of(&paths.data)?;
    let set_len = |len_bytes| disk::set_len(&paths.data, &data, len_bytes);
    set_len(0).and_then(|()| set_len(len_bytes)).map_err(doing)?;
    Ok(data)
}
