//! A FUSE file system with one read-only file: the image.
//!
//! Requests that are in the store are answered where they arrive, on one of a few session threads. A request that misses
//! is parked in a table; its waiter only sends the key to the reply threads, which plan it again. So no thread ever waits
//! for the network, and the number of parked requests is bounded by what the kernel sends at a time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, UNIX_EPOCH};

use crossbeam::channel::{Receiver, Sender, bounded};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};
use parking_lot::Mutex;

use crate::first_reads::DeviceRead;
use crate::image::{BLOCK_SIZE_BYTES, Piece, Plan, Readiness, ServedImage};

/// Name of the file.
pub(super) const FILE_NAME: &str = "image";
/// Largest read the kernel may ask for: its own limit for one request (256 pages).
pub(super) const READ_LEN_MAX: u32 = 1 << 20;
/// Threads that receive requests and answer the ones that hit. They read local files; four keep a disk busy.
pub(super) const SESSION_THREADS: usize = 4;
/// Threads that answer requests which missed. They too read local files only.
const REPLY_THREADS: usize = 2;
/// Reads that the kernel has under way at a time: the depth of a loop device's queue.
const READS_MAX: u16 = 128;
/// Parked requests: what the kernel has under way, twice for requests that it interrupted and sent again.
const PARKED_MAX: usize = 2 * READS_MAX as usize;
/// How often a request is planned before it fails; see `ublk_queue`.
const PLANS_PER_REQUEST_MAX: u32 = 16;
/// What [`Shared::fill`] fails with when the range is to be planned again.
const PLAN_AGAIN: i32 = libc::ESTALE;
/// Nothing ever changes.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
const IMAGE_INODE: INodeNo = INodeNo(2);
const BLOCK_LEN: u64 = BLOCK_SIZE_BYTES as u64;

thread_local! {
    /// Grows to the largest read that the thread has answered.
    static SCRATCH: RefCell<(Plan, Vec<u8>)> = RefCell::default();
}

type News = (u64, Result<(), i32>);

struct ParkedRead {
    reply: ReplyData,
    offset_bytes: u64,
    len_bytes: u32,
    plans: u32,
    first: DeviceRead,
}

/// What the threads of one file share.
struct Shared {
    image: Arc<ServedImage>,
    parked: Mutex<HashMap<u64, ParkedRead>>,
    next_key: AtomicU64,
    news: Sender<News>,
    stopping: AtomicBool,
}

/// Stops what waits, and joins the reply threads.
pub(super) struct ReplyPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    stop: Sender<News>,
}

/// The file system.
pub(super) struct ImageFile {
    shared: Arc<Shared>,
}

/// The file system and the threads that answer late.
pub(super) fn image_file(image: Arc<ServedImage>) -> std::io::Result<(ImageFile, ReplyPool)> {
    // One entry per parked request, and one per reply thread to end it.
    let (news, inbox) = bounded(PARKED_MAX + REPLY_THREADS);
    let shared = Arc::new(Shared {
        image,
        parked: Mutex::default(),
        next_key: AtomicU64::new(1),
        news: news.clone(),
        stopping: AtomicBool::new(false),
    });
    let mut threads = Vec::new();
    for _ in 0..REPLY_THREADS {
        let (shared, inbox) = (Arc::clone(&shared), inbox.clone());
        threads.push(std::thread::Builder::new().name("fuse-reply".into()).spawn(move || shared.reply_late(&inbox))?);
    }
    Ok((ImageFile { shared: Arc::clone(&shared) }, ReplyPool { shared, threads, stop: news }))
}

impl ReplyPool {
    /// From now on nothing waits: what is parked fails with EIO, and so does what would park.
    pub(super) fn stop_waiting(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let parked = std::mem::take(&mut *self.shared.parked.lock());
        for read in parked.into_values() {
            self.shared.fail(read, libc::EIO);
        }
    }

    /// Ends the reply threads. To be called after [`ReplyPool::stop_waiting`].
    pub(super) fn join(self) {
        for _ in &self.threads {
            let _ = self.stop.send((0, Ok(())));
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a FUSE reply thread panicked");
            }
        }
    }
}

impl Shared {
    fn len_bytes(&self) -> u64 {
        u64::from(self.image.total_blocks()) * BLOCK_LEN
    }

    /// Key 0 ends the thread: parked requests are numbered from 1.
    fn reply_late(self: &Arc<Self>, inbox: &Receiver<News>) {
        while let Ok((key @ 1.., outcome)) = inbox.recv() {
            let Some(read) = self.parked.lock().remove(&key) else { continue };
            match outcome {
                Ok(()) => self.serve(read),
                Err(errno) => self.fail(read, errno),
            }
        }
    }

    fn fail(&self, read: ParkedRead, errno: i32) {
        self.image.answered(&read.first, Err(errno));
        read.reply.error(Errno::from_i32(errno));
    }

    fn serve(self: &Arc<Self>, mut read: ParkedRead) {
        read.plans += 1;
        SCRATCH.with_borrow_mut(|(plan, buffer)| {
            // Reads of a loop device are whole blocks, but nothing forces a reader of the file to do so.
            let start_block = read.offset_bytes / BLOCK_LEN;
            let end_block = (read.offset_bytes + u64::from(read.len_bytes)).div_ceil(BLOCK_LEN);
            let skip_bytes = read.offset_bytes % BLOCK_LEN;
            let (Ok(start_block), Ok(len_blocks), Ok(skip_bytes)) =
                (u32::try_from(start_block), u32::try_from(end_block - start_block), usize::try_from(skip_bytes))
            else {
                return self.fail(read, libc::EINVAL);
            };
            if read.plans == 1 {
                read.first = self.image.begin(start_block, len_blocks);
            }
            buffer.resize(len_blocks as usize * BLOCK_SIZE_BYTES as usize, 0);
            match self.plan_and_fill(start_block, len_blocks, plan, buffer) {
                Ok(Readiness::Ready) => {
                    self.image.answered(&read.first, Ok(read.len_bytes));
                    read.reply.data(&buffer[skip_bytes..skip_bytes + read.len_bytes as usize]);
                }
                Err(errno) => self.fail(read, errno),
                Ok(Readiness::Missing) if read.plans > PLANS_PER_REQUEST_MAX => {
                    tracing::error!(start_block, len_blocks, "a read still misses blocks after {} fetches", read.plans);
                    self.fail(read, libc::EIO);
                }
                Ok(Readiness::Missing) => self.park(read, plan),
            }
        });
    }

    fn park(self: &Arc<Self>, mut read: ParkedRead, plan: &Plan) {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let waited = self.image.wait(&mut read.first);
        {
            let mut parked = self.parked.lock();
            if parked.len() >= PARKED_MAX || self.stopping.load(Ordering::SeqCst) {
                drop(parked);
                return self.fail(read, libc::EIO);
            }
            parked.insert(key, read);
        }
        let ticket = Ticket { key, news: self.news.clone(), outcome: Err(libc::EIO) };
        self.image.demand(plan, waited, Box::new(move |outcome| ticket.deliver(outcome)));
    }

    /// Fills the buffer if everything is there: what is evicted while it is read, and what cannot be read, is planned again.
    fn plan_and_fill(
        &self,
        start_block: u32,
        len_blocks: u32,
        plan: &mut Plan,
        buffer: &mut [u8],
    ) -> Result<Readiness, i32> {
        loop {
            if self.image.plan(start_block, len_blocks, plan) == Readiness::Missing {
                return Ok(Readiness::Missing);
            }
            match self.fill(plan, buffer) {
                Ok(()) if self.image.was_there(plan) => return Ok(Readiness::Ready),
                Ok(()) | Err(PLAN_AGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn fill(&self, plan: &Plan, buffer: &mut [u8]) -> Result<(), i32> {
        let mut rest = buffer;
        for piece in plan.pieces() {
            let (Piece::File { len_bytes, .. } | Piece::Zero { len_bytes }) = *piece;
            let (part, after) = rest.split_at_mut_checked(len_bytes as usize).ok_or(libc::EIO)?;
            match *piece {
                Piece::Zero { .. } => part.fill(0),
                Piece::File { file, offset_bytes, .. } => {
                    let handle = self.image.files().get(usize::from(file)).ok_or(libc::EIO)?;
                    handle.read_exact_at(part, offset_bytes).map_err(|error| {
                        tracing::error!(file, offset_bytes, %error, "reading a file of the store");
                        if self.image.cannot_read(file, offset_bytes, len_bytes) { PLAN_AGAIN } else { libc::EIO }
                    })?;
                }
            }
            rest = after;
        }
        if rest.is_empty() { Ok(()) } else { Err(libc::EIO) }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o500, 0),
            IMAGE_INODE => (FileType::RegularFile, 0o400, self.len_bytes()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_SIZE_BYTES,
            flags: 0,
        })
    }
}

/// Sends its outcome when it is dropped, so that a waiter that is never called cannot leave a read hanging.
struct Ticket {
    key: u64,
    news: Sender<News>,
    outcome: Result<(), i32>,
}

impl Ticket {
    fn deliver(mut self, outcome: Result<(), i32>) {
        self.outcome = outcome;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // There is room for every parked request; when the reply threads are gone, so are the requests.
        if self.news.try_send((self.key, self.outcome)).is_err() {
            tracing::debug!(key = self.key, "a FUSE read was answered after its device stopped");
        }
    }
}

impl Filesystem for ImageFile {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Without asynchronous direct I/O a loop device has one read under way; without the larger limits twelve.
        for capability in [InitFlags::FUSE_ASYNC_READ, InitFlags::FUSE_ASYNC_DIO] {
            if config.add_capabilities(capability).is_err() {
                tracing::warn!(?capability, "FUSE of this kernel lacks it: reads wait for each other");
            }
        }
        let refused = |value| std::io::Error::other(format!("the FUSE library wants {value} at most"));
        config.set_max_background(READS_MAX).map_err(refused)?;
        config.set_congestion_threshold(READS_MAX).map_err(refused)?;
        // Nothing is written, but the size of a read follows from it.
        config.set_max_write(READ_LEN_MAX).map_err(|value| std::io::Error::other(format!("max_write {value}")))?;
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.shared.attributes(IMAGE_INODE) {
            Some(attributes) if parent == INodeNo::ROOT && name == FILE_NAME => {
                reply.entry(&FOREVER, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.shared.attributes(inode) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if inode == IMAGE_INODE {
            // Pages are cached by the loop device above us.
            reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if inode != IMAGE_INODE || size > READ_LEN_MAX {
            return reply.error(Errno::EINVAL);
        }
        let left_bytes = self.shared.len_bytes().saturating_sub(offset);
        let len_bytes = u32::try_from(left_bytes).unwrap_or(u32::MAX).min(size);
        if len_bytes == 0 {
            return reply.data(&[]);
        }
        self.shared.serve(ParkedRead {
            reply,
            offset_bytes: offset,
            len_bytes,
            plans: 0,
            first: DeviceRead::default(),
        });
    }
}
