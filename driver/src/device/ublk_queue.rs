//! The queue thread of a ublk device: a state machine a tag, all on one io_uring ([`UblkRing`]).
//!
//! ```text
//! command ─► plan ─ready, one file──► read linked to the commit ─────────────► next command
//!   (a request) ▲ │ └─ready, else────► reads, one after another ─► commit ────►
//!               │ └missing─► demand, parked until the waiter ran ─┐
//!               └──────────────────────────────────────────────────┘
//! ```
//! The thread sleeps in its ring only: it performs no I/O of its own, takes no lock held across I/O and knows no network.
//! A miss costs nothing but its tag, so hits go on while others wait. A request is committed with all its bytes or with an
//! error, never with bytes left over from another one.
//!
//! A read that is linked to the commit is not looked at in between, so nothing may be evicted until it is over: the thread
//! says so ([`Reader`]) from before it plans until the ring has taken the read, which by then is done, as such a read waits
//! for no disk. If it would have to, it fails, and the request goes the longer way.
//!
//! The thread ends when the kernel aborts the fetches (STOP_DEV). Should it panic, or should the kernel refuse a commit,
//! the process is aborted: a process without its queue thread would leave readers hanging on a device that looks live,
//! a process that died is recovered without an error.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use libublk::ctrl::UblkCtrl;
use libublk::io::UblkDev;
use libublk::sys;
use rustix::fs::{MemfdFlags, OFlags};

use super::completion::{CompletionPort, Outcome};
use super::ublk_ring::{Completion, DataPath, FileRead, UblkRing};
use crate::capabilities;
use crate::first_reads::DeviceRead;
use crate::image::{BLOCK_SIZE_BYTES, Piece, Plan, Readiness, ServedImage};
use crate::store::Reader;

/// How often a request is planned in vain before it fails. More than one demand is needed only when a chunk is evicted
/// between its arrival and the next plan, or cannot be read from the disk.
const PLANS_PER_REQUEST_MAX: u32 = 16;
/// How often one read is tried again after EINTR or EAGAIN.
const READ_RETRIES_MAX: u32 = 1000;
/// After a read that would have waited for the disk, so many go the longer way at once: who reads what is not in memory goes
/// on to do so.
const READS_AFTER_WAIT: u32 = 7;
/// Buffers that nobody used for so long are given back.
const BUFFERS_KEPT: Duration = Duration::from_secs(10);
/// Sectors of 512 bytes per block.
const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE_BYTES as u64 / 512;
/// `f_type` of a file system in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Serves queue 0 until the kernel aborts it. Says on `up` whether the queue could be set up; the fetches follow.
pub(super) fn serve(
    device: &UblkDev,
    path: DataPath,
    image: &Arc<ServedImage>,
    port: &Arc<CompletionPort>,
    up: &SyncSender<io::Result<()>>,
) {
    UblkCtrl::init_queue_thread();
    // Before the first fetch: so the kernel does not scan the device for partitions.
    if let Err(error) = capabilities::drop_all_of_this_thread() {
        tracing::warn!(%error, "a queue thread keeps its capabilities");
    }
    let mut queue = match Queue::new(device, path, image, port) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = up.send(Err(error));
            return;
        }
    };
    // The receiver waits for nothing else, or has given up: then the device is deleted and the fetches abort.
    let _ = up.send(Ok(()));
    if let Err(error) = queue.run() {
        fatal("the ring of a queue", &error);
    }
}

fn fatal(what: &str, error: &io::Error) -> ! {
    tracing::error!(%error, "ublk: {what} failed; aborting, so that the device can be recovered");
    std::process::abort();
}

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speed {
    /// It lies in memory.
    NeverWaits,
    /// A read can be told not to wait for the disk.
    MayWait,
    /// It cannot.
    Waits,
}

/// What the tag is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The kernel has it: it answers the last request, if there is one, and waits for the next.
    Fetching,
    /// Its request waits for chunks.
    Parked,
    /// Its request is read, piece by piece.
    Reading {
        piece: usize,
        /// Bytes of the piece that are read.
        done_bytes: u32,
        retries: u32,
    },
    /// The device was stopped.
    Ended,
}

/// A tag and its request.
struct Tag {
    state: State,
    start_block: u32,
    len_blocks: u32,
    read: DeviceRead,
    /// The request was counted as answered before that was certain.
    is_counted: bool,
    plan: Plan,
    plans_in_vain: u32,
}

struct Queue {
    ring: UblkRing,
    image: Arc<ServedImage>,
    port: Arc<CompletionPort>,
    tags: Vec<Tag>,
    /// Tags that have not ended.
    live_tags: usize,
    /// Of each file of the image.
    speeds: Vec<Speed>,
    /// Zeros are read from here: a file without data, as long as a request can be.
    zeros: File,
    /// Reads that are to go the longer way.
    reads_after_wait: u32,
    reader: Option<Reader>,
    request_len_bytes: u32,
    has_buffers_in_use: bool,
}

impl Queue {
    fn new(device: &UblkDev, path: DataPath, image: &Arc<ServedImage>, port: &Arc<CompletionPort>) -> io::Result<Self> {
        let (depth, request_len_bytes) = (device.dev_info.queue_depth, device.dev_info.max_io_buf_bytes);
        // The first is the character device.
        let ring = UblkRing::new(device.tgt.fds[0], port.event(), depth, request_len_bytes as usize, path)?;
        let zeros = File::from(rustix::fs::memfd_create("ublkimg-zeros", MemfdFlags::CLOEXEC)?);
        zeros.set_len(u64::from(request_len_bytes))?;
        // It is in memory too.
        speed(&zeros)?;
        let kicked = Arc::clone(port);
        let tag = || Tag {
            state: State::Fetching,
            start_block: 0,
            len_blocks: 0,
            read: DeviceRead::default(),
            is_counted: false,
            plan: Plan::new(),
            plans_in_vain: 0,
        };
        Ok(Self {
            ring,
            image: Arc::clone(image),
            port: Arc::clone(port),
            tags: (0..depth).map(|_| tag()).collect(),
            live_tags: usize::from(depth),
            speeds: image.files().iter().map(|file| speed(file)).collect::<io::Result<_>>()?,
            zeros,
            reads_after_wait: 0,
            reader: image.reader(move || kicked.signal()),
            request_len_bytes,
            has_buffers_in_use: false,
        })
    }

    /// Returns when the last tag has ended.
    fn run(&mut self) -> io::Result<()> {
        for tag in 0..self.tags.len() {
            self.ring.fetch(number(tag))?;
        }
        self.ring.watch_event()?;
        while self.live_tags > 0 {
            let limit = self.has_buffers_in_use.then_some(BUFFERS_KEPT);
            let is_idle = !self.ring.wait(limit)?;
            if let Some(reader) = &mut self.reader {
                reader.end();
            }
            if is_idle {
                self.has_buffers_in_use = false;
                if !self.tags.iter().any(|tag| matches!(tag.state, State::Reading { .. })) {
                    self.ring.trim();
                }
            }
            while let Some(completion) = self.ring.next() {
                match completion {
                    Completion::Command { tag, result: 0 } => self.begin(tag)?,
                    Completion::Command { tag, result: sys::UBLK_IO_RES_ABORT } => self.end(tag),
                    Completion::Command { result, .. } => return Err(os_error(result)),
                    Completion::Read { tag, result } => self.has_read(tag, result)?,
                    Completion::Event { result: 8 } => self.look_at_news()?,
                    Completion::Event { result } if is_temporary(result) => self.ring.watch_event()?,
                    Completion::Event { result } => return Err(os_error(result)),
                }
            }
        }
        self.end_watch()
    }

    /// Ends the read of the eventfd, which must not outlive what it reads into.
    fn end_watch(&mut self) -> io::Result<()> {
        self.port.signal();
        loop {
            self.ring.wait(None)?;
            while let Some(completion) = self.ring.next() {
                if matches!(completion, Completion::Event { .. }) {
                    return Ok(());
                }
            }
        }
    }

    fn tag(&mut self, tag: u16) -> &mut Tag {
        &mut self.tags[usize::from(tag)]
    }

    fn end(&mut self, tag: u16) {
        self.tag(tag).state = State::Ended;
        self.live_tags -= 1;
    }

    /// The tag has a request.
    fn begin(&mut self, tag: u16) -> io::Result<()> {
        let request = self.ring.request(tag);
        let blocks = in_blocks(request.start_sector).zip(in_blocks(u64::from(request.sectors)));
        let of_tag = &mut self.tags[usize::from(tag)];
        of_tag.read = DeviceRead::default();
        of_tag.is_counted = false;
        match (request.operation, blocks) {
            (sys::UBLK_IO_OP_READ, Some((start_block, len_blocks)))
                if len_blocks <= self.request_len_bytes / BLOCK_SIZE_BYTES =>
            {
                (of_tag.start_block, of_tag.len_blocks) = (start_block, len_blocks);
                of_tag.plans_in_vain = 0;
                of_tag.read = self.image.begin(start_block, len_blocks);
                self.plan(tag)
            }
            (sys::UBLK_IO_OP_READ, _) => self.commit(tag, Err(libc::EINVAL)),
            (sys::UBLK_IO_OP_FLUSH, _) => self.commit(tag, Ok(0)),
            _ => self.commit(tag, Err(libc::EROFS)),
        }
    }

    /// Answers the tag's request, or reads what it asks for, or has it fetched.
    fn plan(&mut self, tag: u16) -> io::Result<()> {
        if let Some(reader) = &mut self.reader {
            reader.begin();
        }
        let of_tag = &mut self.tags[usize::from(tag)];
        of_tag.plans_in_vain += 1;
        if of_tag.plans_in_vain > PLANS_PER_REQUEST_MAX {
            let (start_block, len_blocks) = (of_tag.start_block, of_tag.len_blocks);
            tracing::error!(start_block, len_blocks, "a request misses blocks after {PLANS_PER_REQUEST_MAX} fetches");
            return self.commit(tag, Err(libc::EIO));
        }
        match self.image.plan(of_tag.start_block, of_tag.len_blocks, &mut of_tag.plan) {
            Readiness::Ready => match self.in_one_read(tag) {
                Some(read) => self.answer(tag, read),
                None => self.read_from(tag, 0),
            },
            Readiness::Missing if self.port.is_stopping() => self.commit(tag, Err(libc::EIO)),
            Readiness::Missing => {
                // Before its waiter is given away, which may run at once.
                of_tag.state = State::Parked;
                let waited = self.image.wait(&mut of_tag.read);
                self.image.demand(&of_tag.plan, waited, self.port.waiter(tag));
                Ok(())
            }
        }
    }

    /// The read that brings all of the tag's request, if one does and it need not wait.
    fn in_one_read(&mut self, tag: u16) -> Option<FileRead> {
        let of_tag = &self.tags[usize::from(tag)];
        let &[Piece::File { file, offset_bytes, len_bytes }] = of_tag.plan.pieces() else { return None };
        // In memory that is given to another chunk meanwhile, data is overwritten: such reads are checked.
        let is_checked = usize::from(file) + 1 == self.speeds.len() && self.speeds.len() > 1;
        let must_not_wait = match self.speeds.get(usize::from(file))? {
            Speed::NeverWaits => false,
            Speed::MayWait => true,
            Speed::Waits => return None,
        };
        // A request that was answered in part cannot be: this was tried before.
        if is_checked || of_tag.is_counted || len_bytes != of_tag.len_blocks * BLOCK_SIZE_BYTES {
            return None;
        }
        if must_not_wait && self.reads_after_wait > 0 {
            self.reads_after_wait -= 1;
            return None;
        }
        let file = self.image.files().get(usize::from(file))?.as_raw_fd();
        Some(FileRead { file, offset_bytes, len_bytes, must_not_wait })
    }

    fn answer(&mut self, tag: u16, read: FileRead) -> io::Result<()> {
        self.has_buffers_in_use = true;
        let of_tag = &mut self.tags[usize::from(tag)];
        // That it was is heard only with the next request.
        self.image.answered(&of_tag.read, Ok(read.len_bytes));
        of_tag.read = DeviceRead::default();
        of_tag.is_counted = true;
        of_tag.state = State::Fetching;
        self.ring.answer(tag, read)
    }

    fn has_read(&mut self, tag: u16, result: i32) -> io::Result<()> {
        let State::Reading { piece, done_bytes, retries } = self.tag(tag).state else {
            // It was to answer the request, and has failed.
            match -result {
                libc::EAGAIN => self.reads_after_wait = READS_AFTER_WAIT,
                libc::EOPNOTSUPP => {
                    let speeds = self.speeds.iter_mut().filter(|speed| **speed == Speed::MayWait);
                    speeds.for_each(|speed| *speed = Speed::Waits);
                }
                _ => {}
            }
            // Not from the plan that there is: what it says may be gone.
            return self.plan(tag);
        };
        if result > 0 {
            let done_bytes = done_bytes + u32::try_from(result).unwrap_or(0);
            self.tag(tag).state = State::Reading { piece, done_bytes, retries };
            return self.read_on(tag);
        }
        if is_temporary(result) && retries < READ_RETRIES_MAX {
            self.tag(tag).state = State::Reading { piece, done_bytes, retries: retries + 1 };
            return self.read_on(tag);
        }
        let of_tag = &self.tags[usize::from(tag)];
        let Some(&Piece::File { file, offset_bytes, len_bytes }) = of_tag.plan.pieces().get(piece) else {
            return self.commit(tag, Err(libc::EIO));
        };
        // Zero: the file is shorter than it should be.
        let error = os_error(result);
        tracing::error!(file, offset_bytes, %error, "reading a file of the store");
        if self.image.cannot_read(file, offset_bytes + u64::from(done_bytes), len_bytes - done_bytes) {
            self.plan(tag)
        } else {
            self.commit(tag, Err(libc::EIO))
        }
    }

    fn read_from(&mut self, tag: u16, piece: usize) -> io::Result<()> {
        self.has_buffers_in_use = true;
        self.tag(tag).state = State::Reading { piece, done_bytes: 0, retries: 0 };
        self.read_on(tag)
    }

    /// Reads what comes next, or answers the request if all is read.
    fn read_on(&mut self, tag: u16) -> io::Result<()> {
        let of_tag = &self.tags[usize::from(tag)];
        let State::Reading { piece: number, done_bytes, .. } = of_tag.state else { return Ok(()) };
        let pieces = of_tag.plan.pieces();
        let len_of = |piece: &Piece| {
            let (Piece::File { len_bytes, .. } | Piece::Zero { len_bytes }) = piece;
            *len_bytes
        };
        let at_bytes = pieces.iter().take(number).map(len_of).sum::<u32>() + done_bytes;
        let read = |file: &File, offset_bytes: u64, len_bytes| FileRead {
            file: file.as_raw_fd(),
            offset_bytes: offset_bytes + u64::from(done_bytes),
            len_bytes: len_bytes - done_bytes,
            must_not_wait: false,
        };
        match pieces.get(number) {
            Some(piece) if len_of(piece) == done_bytes => self.read_from(tag, number + 1),
            Some(&Piece::Zero { len_bytes }) => self.ring.read(tag, at_bytes, read(&self.zeros, 0, len_bytes)),
            Some(&Piece::File { file, offset_bytes, len_bytes }) => match self.image.files().get(usize::from(file)) {
                Some(file) => self.ring.read(tag, at_bytes, read(file, offset_bytes, len_bytes)),
                None => self.commit(tag, Err(libc::EIO)),
            },
            None if at_bytes != of_tag.len_blocks * BLOCK_SIZE_BYTES => {
                tracing::error!("a plan is not as long as its request");
                self.commit(tag, Err(libc::EIO))
            }
            None if self.image.was_there(&of_tag.plan) => self.commit(tag, Ok(at_bytes)),
            None => {
                // Something was evicted meanwhile, anywhere: that is no fault of this request.
                self.tag(tag).plans_in_vain -= 1;
                self.plan(tag)
            }
        }
    }

    /// Answers the request: its length, or a positive errno.
    fn commit(&mut self, tag: u16, outcome: Result<u32, i32>) -> io::Result<()> {
        let of_tag = &mut self.tags[usize::from(tag)];
        if !of_tag.is_counted || outcome.is_err() {
            self.image.answered(&of_tag.read, outcome);
        }
        of_tag.state = State::Fetching;
        let result = match outcome {
            Ok(len_bytes) => i32::try_from(len_bytes).unwrap_or(-libc::EIO),
            Err(errno) => -errno,
        };
        self.ring.commit(tag, result)
    }

    /// Goes on with the parked requests that there is news for.
    fn look_at_news(&mut self) -> io::Result<()> {
        self.ring.watch_event()?;
        let port = Arc::clone(&self.port);
        let mut outcome = Ok(());
        port.drain(|tag, news| {
            if outcome.is_ok() {
                outcome = self.resolve(tag, news);
            }
        });
        outcome?;
        if port.is_stopping() {
            for tag in 0..self.tags.len() {
                self.resolve(number(tag), Err(libc::EIO))?;
            }
        }
        Ok(())
    }

    fn resolve(&mut self, tag: u16, news: Outcome) -> io::Result<()> {
        match (self.tags.get(usize::from(tag)).map(|tag| tag.state), news) {
            (Some(State::Parked), Ok(())) => self.plan(tag),
            (Some(State::Parked), Err(errno)) => self.commit(tag, Err(errno)),
            // It does not wait, or not any more.
            _ => Ok(()),
        }
    }
}

/// Tags are numbered below the depth, which is a u16.
fn number(tag: usize) -> u16 {
    u16::try_from(tag).unwrap_or(u16::MAX)
}

fn in_blocks(sectors: u64) -> Option<u32> {
    sectors.is_multiple_of(SECTORS_PER_BLOCK).then(|| u32::try_from(sectors / SECTORS_PER_BLOCK).ok()).flatten()
}

fn is_temporary(result: i32) -> bool {
    matches!(-result, libc::EINTR | libc::EAGAIN)
}

/// Of a negative errno.
fn os_error(result: i32) -> io::Error {
    io::Error::from_raw_os_error(-result)
}

/// How a file can be read. One in memory is told to be so: io_uring would hand its reads to another thread.
fn speed(file: &File) -> io::Result<Speed> {
    if rustix::fs::fstatfs(file)?.f_type.cast_unsigned() != TMPFS_MAGIC {
        return Ok(Speed::MayWait);
    }
    rustix::fs::fcntl_setfl(file, rustix::fs::fcntl_getfl(file)? | OFlags::NONBLOCK)?;
    Ok(Speed::NeverWaits)
}
