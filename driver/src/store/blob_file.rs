//! The raw blocks of one layer blob, as far as they are here.
//!
//! A chunk is written to the data file first, then its bits to the live bitmap file, then to memory. The first two land
//! in the page cache, in this order, and the page cache outlives the process: whatever a killed process leaves, a bit in
//! the live file has its data. It does not outlive the kernel, so the live file counts in its own boot only. A copy of
//! the bitmap is made durable behind a sync of the data: bits as they were *before* the sync, written after it.

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::Sender;
use parking_lot::Mutex;
use ublkimg_image::{BLOCK_SIZE, Sha256};

use super::bitmap::Bitmap;
use super::bitmap_file::{self, BootId, Identity, Validity};
use super::layout::{BlobPaths, sync_directory_of};
use crate::error::{Error, ErrorKind, Result};

/// A sparse file of raw blocks and the set of those that are there.
#[derive(Debug)]
pub struct BlobFile {
    identity: Identity,
    paths: BlobPaths,
    data: Arc<File>,
    present: Bitmap,
    /// The live bitmap. Held while words of it are written (into the page cache): two writers of one word must not
    /// overtake each other between memory and file.
    live: Mutex<File>,
    /// Held by the one that makes bits durable.
    syncing: Mutex<()>,
    /// Blocks were written since the last sync began.
    dirty: AtomicBool,
    /// Wakes the sync thread.
    wake_sync: Sender<()>,
    /// Keeps other processes out of the store for as long as this writes.
    _lock: Arc<File>,
}

impl BlobFile {
    pub(crate) fn open(
        paths: BlobPaths,
        identity: Identity,
        boot_id: BootId,
        wake_sync: Sender<()>,
        lock: Arc<File>,
    ) -> Result<Self> {
        let data = open_data(&paths, identity)?;
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
        Ok(Self {
            identity,
            paths,
            data: Arc::new(data),
            present,
            live: Mutex::new(live),
            syncing: Mutex::new(()),
            dirty,
            wake_sync,
            _lock: lock,
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

    /// Number of blocks that are there.
    #[must_use]
    pub fn present_blocks(&self) -> u32 {
        self.present.count()
    }

    /// Writes verified blocks from `block` on, and then says that they are there.
    ///
    /// # Errors
    /// `NoSpace` when the disk is full, `Io` for other trouble with the files, `Invalid` when `data` is not a number of
    /// blocks inside the file. The blocks are not there then.
    pub fn write(&self, block: u32, data: &[u8]) -> Result<()> {
        let range = self.range_of(block, data)?;
        self.write_data(block, data)?;
        self.mark_present(range)
    }

    fn range_of(&self, block: u32, data: &[u8]) -> Result<Range<u32>> {
        let blocks = u32::try_from(data.len() / BLOCK_SIZE).ok().filter(|_| data.len().is_multiple_of(BLOCK_SIZE));
        let end = blocks.and_then(|blocks| block.checked_add(blocks)).filter(|end| *end <= self.identity.blocks);
        let what = || format!("{} bytes at block {block} of {}", data.len(), self.paths.data.display());
        end.map(|end| block..end).ok_or_else(|| Error::new(ErrorKind::Invalid, what()))
    }

    pub(super) fn write_data(&self, block: u32, data: &[u8]) -> Result<()> {
        let offset_bytes = u64::from(block) * BLOCK_SIZE as u64;
        let written = self.data.write_all_at(data, offset_bytes);
        written.map_err(|error| Error::path("write", &self.paths.data, error))
    }

    fn mark_present(&self, range: Range<u32>) -> Result<()> {
        {
            let live = self.live.lock();
            let (first, words) = self.present.words_with(range.clone());
            let written = bitmap_file::write_words(&live, first, &words);
            written.map_err(|error| Error::path("write", &self.paths.live, error))?;
            self.present.set(range);
        }
        if !self.dirty.swap(true, Ordering::AcqRel) {
            // A full channel means that the thread is about to look anyway; no receiver, that the store is closing.
            let _ = self.wake_sync.try_send(());
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
        let bits = self.present.snapshot();
        if let Err(error) = self.data.sync_data() {
            self.forget_unsynced()?;
            return Err(Error::path("sync", &self.paths.data, error));
        }
        let written = bitmap_file::write(&self.paths.durable, self.identity, Validity::Durable, &bits);
        if written.is_err() {
            self.dirty.store(true, Ordering::Release);
        }
        written
    }

    fn forget_unsynced(&self) -> Result<()> {
        let durable = bitmap_file::read(&self.paths.durable, self.identity, Validity::Durable)?;
        let durable = durable.unwrap_or_else(|| Bitmap::empty(self.identity.blocks));
        let live = self.live.lock();
        self.present.retain(&durable);
        let written = bitmap_file::write_words(&live, 0, &self.present.snapshot());
        written.map_err(|error| Error::path("write", &self.paths.live, error))
    }
}

/// Opens the data file; one that is new, or not as long as it should be, loses its bitmaps before it gets its length.
fn open_data(paths: &BlobPaths, identity: Identity) -> Result<File> {
    let len_bytes = u64::from(identity.blocks) * BLOCK_SIZE as u64;
    let doing = |error| Error::path("open", &paths.data, error);
    let data = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&paths.data);
    let data = data.map_err(doing)?;
    if data.metadata().map_err(doing)?.len() == len_bytes {
        return Ok(data);
    }
    for bitmap in [&paths.live, &paths.durable] {
        match fs::remove_file(bitmap) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::path("remove", bitmap, error));
            }
            _ => {}
        }
    }
    sync_directory_of(&paths.data)?;
    data.set_len(0).and_then(|()| data.set_len(len_bytes)).map_err(doing)?;
    Ok(data)
}
