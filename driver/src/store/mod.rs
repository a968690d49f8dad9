//! The local cache: what has been fetched, and how much of it is to be believed after a crash.
//!
//! Three rules hold it together. *Data before bit*: nothing is said to be there before it is; see [`BlobFile`].
//! *Whole or not at all*: small files are written beside their place and moved there. *Named by what vouches for it*: a
//! blob file by the digest of its chunk index, an object by its own digest, so a forged index can never fill a file that
//! another image reads. After `kill -9` nothing is forgotten; after a power cut the store may forget, it never lies.

mod bitmap;
mod bitmap_file;
mod blob_file;
mod chunk_places;
mod disk;
mod evictions;
mod held;
#[cfg(test)]
pub(crate) mod journal;
mod layout;
mod links;
pub mod names;
mod objects;
mod overflow;
mod pins;
#[cfg(test)]
mod power_cut_tests;
mod space;
#[cfg(test)]
mod space_tests;
mod sums;
#[cfg(test)]
mod tests;
mod traces;
mod unsynced;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use ublkimg_image::Sha256;

use self::bitmap_file::{BootId, Identity};
pub use self::blob_file::BlobFile;
pub(crate) use self::blob_file::Place;
use self::blob_file::Shared;
pub(crate) use self::chunk_places::{ChunkPlace, ChunkPlaces};
use self::evictions::Evictions;
pub(crate) use self::evictions::Reader;
pub(crate) use self::held::HeldObject;
use self::held::HeldObjects;

use self::layout::{Layout, replace_file};
pub use self::objects::OBJECT_BYTES_MAX;
use self::overflow::Overflow;
pub use self::pins::Holding;
pub use self::space::{Checked, Limits, Room, Usage};
pub use self::traces::TRACE_BYTES_MAX;
use self::unsynced::Unsynced;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;

/// How long written blocks and small files may wait for their sync: what a power cut makes the store forget. Long enough that a
/// start-up's writes share a few syncs.
const SYNC_DELAY: Duration = Duration::from_secs(2);

/// Blob files that are open, by the digest of their chunk index. As many as images in use have layers, and those that
/// wait for their last sync.
type OpenBlobs = Mutex<BTreeMap<Sha256, Arc<BlobFile>>>;

/// The store. One process owns it at a time.
#[derive(Debug)]
pub struct Store {
    layout: Layout,
    boot_id: BootId,
    shared: Shared,
    blobs: Arc<OpenBlobs>,
    unsynced: Arc<Unsynced>,
    held: HeldObjects,
    memory: Memory,
    /// Disconnected to stop the sync thread.
    stop_sync: Option<Sender<()>>,
    sync_thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens the store under `root`, which is made if it is missing.
    ///
    /// # Errors
    /// `Busy` when another process owns it; `Io` and `NoSpace`.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_in_boot(root, BootId::current()?)
    }

    fn open_in_boot(root: &Path, boot_id: BootId) -> Result<Self> {
        let store = Self::beside_in_boot(root, boot_id)?;
        store.own()?;
        Ok(store)
    }

    /// Opens the store beside the process that owns it, to read objects and metadata images. Nothing else may be done with
    /// it before [`Store::own`].
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn beside(root: &Path) -> Result<Self> {
        Self::beside_in_boot(root, BootId::current()?)
    }

    /// Makes this process the owner.
    ///
    /// # Errors
    /// `Busy` as long as another process is; `Io` and `NoSpace`.
    pub fn own(&self) -> Result<()> {
        take_lock(&self.layout, &self.shared.lock)?;
        self.layout.prepare()
    }

    fn beside_in_boot(root: &Path, boot_id: BootId) -> Result<Self> {
        // Images may be private: a new store is its owner's alone.
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(root);
        made.map_err(|error| Error::path("make directory", root, error))?;
        let layout = Layout::new(root);
        let lock = open_lock(&layout)?;
        let blobs = Arc::new(OpenBlobs::default());
        let evictions = Arc::<Evictions>::default();
        let overflow = Overflow::new(Arc::clone(&evictions))?;
        let clock_s = Arc::new(AtomicU32::new(space::now_s()));
        let (wake_sync, woken) = bounded(1);
        let (stop_sync, stopped) = bounded(0);
        let thread = std::thread::Builder::new().name("store-sync".to_owned());
        let unsynced = Arc::<Unsynced>::default();
        let (of_thread, small) = (Arc::clone(&blobs), Arc::clone(&unsynced));
        let sync_thread = thread.spawn(move || sync_loop(&of_thread, &small, &woken, &stopped));
        let sync_thread = sync_thread.map_err(|error| Error::io("start the store's sync thread", error))?;
        Ok(Self {
            layout,
            boot_id,
            shared: Shared {
                lock: Arc::new(lock),
                wake_sync,
                written: Arc::default(),
                overflow: Arc::new(overflow),
                chunk_places: Arc::default(),
                evictions,
                clock_s,
            },
            blobs,
            unsynced,
            held: HeldObjects::default(),
            memory: Memory::default(),
            stop_sync: Some(stop_sync),
            sync_thread: Some(sync_thread),
        })
    }

    /// The file for the raw blocks that a chunk index vouches for. All who ask for the same share one.
    ///
    /// # Errors
    /// `Invalid` when the file is open with another length; `Io` and `NoSpace`.
    pub fn blob(&self, index: Sha256, raw_blocks: u32) -> Result<Arc<BlobFile>> {
        // Held while a file is opened: two that open the same must not both look at its bitmaps.
        let mut blobs = self.blobs.lock();
        if let Some(blob) = blobs.get(&index) {
            if blob.blocks() != raw_blocks {
                let what = format!("blob file {index} has {} blocks, not {raw_blocks}", blob.blocks());
                return Err(Error::new(ErrorKind::Invalid, what));
            }
            return Ok(Arc::clone(blob));
        }
        let identity = Identity { index, blocks: raw_blocks };
        let paths = self.layout.blob(index);
        let blob = BlobFile::open(paths, identity, self.boot_id, self.shared.clone())?;
        let blob = Arc::new(blob);
        blobs.insert(index, Arc::clone(&blob));
        // A full channel means that the thread is about to look anyway.
        let _ = self.shared.wake_sync.try_send(());
        Ok(blob)
    }

    /// Waits until something is written after a while without, or has been since this was last called.
    pub async fn written(&self) {
        self.shared.written.notified().await;
    }

    /// The memory for what is read whole, and what images keep of it.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Makes durable what was written so far.
    ///
    /// # Errors
    /// The first of the files' errors; see [`Store::blob`].
    pub fn sync(&self) -> Result<()> {
        sync_all(&self.blobs, &self.unsynced)
    }

    /// Writes a small file, whole or not at all; a moment later it is on the disk too.
    fn replace_and_sync_later(&self, path: PathBuf, parts: &[&[u8]]) -> Result<()> {
        replace_file(&path, false, parts)?;
        self.sync_later(path);
        Ok(())
    }

    fn sync_later(&self, path: PathBuf) {
        self.unsynced.note(path);
        let _ = self.shared.wake_sync.try_send(());
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.stop_sync = None;
        if let Some(thread) = self.sync_thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's sync thread panicked");
        }
    }
}

fn open_lock(layout: &Layout) -> Result<File> {
    let path = layout.lock();
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    file.map_err(|error| Error::path("open", &path, error))
}

fn take_lock(layout: &Layout, file: &File) -> Result<()> {
    let path = layout.lock();
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err(Error::new(ErrorKind::Busy, format!("{}: the store belongs to another process", path.display())))
        }
        Err(TryLockError::Error(error)) => Err(Error::path("lock", &path, error)),
    }
}

/// Syncs a while after it was woken, again until it succeeds, and a last time when the store is closed.
fn sync_loop(blobs: &OpenBlobs, unsynced: &Unsynced, woken: &Receiver<()>, stopped: &Receiver<()>) {
    let is_stopped = || stopped.recv_timeout(SYNC_DELAY) != Err(RecvTimeoutError::Timeout);
    let mut has_failed = false;
    loop {
        // Blocks that are dirty wake nobody, as those of the last time are if it failed.
        let stopping = if has_failed {
            is_stopped()
        } else {
            crossbeam::select! {
                recv(woken) -> _ => is_stopped(),
                recv(stopped) -> _ => true,
            }
        };
        let outcome = sync_all(blobs, unsynced);
        if let Err(error) = &outcome
            && !has_failed
        {
            tracing::warn!("store: what was fetched may be forgotten at a power cut: {}", error.chain());
        }
        has_failed = outcome.is_err();
        if stopping {
            return;
        }
        blobs.lock().retain(|_, blob| Arc::strong_count(blob) > 1 || blob.is_dirty());
    }
}

fn sync_all(blobs: &OpenBlobs, unsynced: &Unsynced) -> Result<()> {
    let mut outcome = unsynced.sync();
    // Not under the lock: a sync takes as long as the disk does.
    let dirty: Vec<_> = blobs.lock().values().filter(|blob| blob.is_dirty()).map(Arc::clone).collect();
    for blob in dirty {
        outcome = outcome.and(blob.sync());
    }
    outcome
}
