//! The io_uring of a ublk queue: requests come out of it, answers go into it.
//!
//! A request that is read from one file is answered by two operations that are linked: the read, and the commit, which runs
//! when the read has brought every byte and never otherwise. The read reports itself only if it fails; then the commit is
//! called off and reports nothing. So each tag has one completion under way at any time, and a hit costs one system call.
//!
//! The data gets into the request in one of two ways ([`DataPath`]): the kernel lends the pages of the request to the ring
//! (automatic buffer registration, 6.16), so a read of a file lands in them at once; or the read lands in a buffer of the
//! tag, which the kernel copies when the request is committed.
//!
//! Source of numbers and layouts: `include/uapi/linux/ublk_cmd.h`, through `libublk::sys`.

#![expect(unsafe_code, reason = "mapped memory that the kernel shares, and operations that point into it")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use serde::{Deserialize, Serialize};

/// How the bytes of a file get into a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataPath {
    /// A read lands in the pages of the request.
    ZeroCopy,
    /// A read lands in a buffer, which the kernel copies into the request.
    Copy,
}

/// What a tag is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// `UBLK_IO_OP_*`.
    pub(super) operation: u32,
    pub(super) start_sector: u64,
    pub(super) sectors: u32,
}

/// Something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Completion {
    /// A command of the tag ended: with 0 there is a request, [`UblkRing::request`].
    Command { tag: u16, result: i32 },
    /// A read of the tag ended: how many bytes, or a negative errno.
    Read { tag: u16, result: i32 },
    /// The eventfd was written to, or a negative errno.
    Event { result: i32 },
}

/// Bytes of a file for a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileRead {
    pub(super) file: RawFd,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u32,
    /// Fails with EAGAIN rather than wait for the disk.
    pub(super) must_not_wait: bool,
}

/// Kinds of operations, in the upper half of their user data; the tag is in the lower one.
const KIND_COMMAND: u64 = 0;
const KIND_READ: u64 = 1;
const KIND_EVENT: u64 = 2;
const KIND_SHIFT: u32 = 32;

/// `RWF_NOWAIT` of preadv2(2).
const RWF_NOWAIT: i32 = 8;

/// See the module. Belongs to the thread that made it.
pub(super) struct UblkRing {
    ring: IoUring,
    character_device: RawFd,
    event: RawFd,
    /// What the last read of the eventfd brought. On the heap: it stays where it is when this moves.
    event_counter: Box<u64>,
    descriptors: Mapping,
    /// One a tag; none with [`DataPath::ZeroCopy`].
    buffers: Option<Mapping>,
    depth: u16,
    buffer_len_bytes: usize,
}

impl UblkRing {
    /// The ring of queue 0 of a device. The file descriptors must stay open as long as it exists.
    ///
    /// # Errors
    /// What the kernel refuses: memory, or a ring.
    pub(super) fn new(
        character_device: RawFd,
        event: BorrowedFd<'_>,
        depth: u16,
        buffer_len_bytes: usize,
        path: DataPath,
    ) -> io::Result<Self> {
        // At most a read and a commit a tag, and the read of the eventfd.
        let (entries, completions) = (2 * u32::from(depth) + 2, 2 * u32::from(depth) + 2);
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(completions.next_power_of_two())
            .build(entries)?;
        let buffers = match path {
            DataPath::ZeroCopy => {
                ring.submitter().register_buffers_sparse(u32::from(depth))?;
                None
            }
            DataPath::Copy => Some(Mapping::anonymous(usize::from(depth) * buffer_len_bytes)?),
        };
        let descriptors = Mapping::of(
            character_device,
            i64::from(sys::UBLKSRV_CMD_BUF_OFFSET),
            usize::from(depth) * size_of::<sys::ublksrv_io_desc>(),
        )?;
        let event_counter = Box::new(0);
        let event = event.as_raw_fd();
        Ok(Self { ring, character_device, event, event_counter, descriptors, buffers, depth, buffer_len_bytes })
    }

    /// What the tag is asked for, after its command ended with 0.
    pub(super) fn request(&self, tag: u16) -> Request {
        let at = usize::from(tag.min(self.depth - 1)) * size_of::<sys::ublksrv_io_desc>();
        // SAFETY: within the mapping, aligned as the kernel lays it out; the kernel wrote it before the completion that we
        // have seen, and writes it again only after the next commit.
        let descriptor =
            unsafe { ptr::read_volatile(self.descriptors.start.as_ptr().add(at).cast::<sys::ublksrv_io_desc>()) };
        let (operation, sectors) = (descriptor.op_flags & 0xff, descriptor.nr_sectors);
        Request { operation, start_sector: descriptor.start_sector, sectors }
    }

    /// Asks for the first request of the tag.
    pub(super) fn fetch(&mut self, tag: u16) -> io::Result<()> {
        let command = self.command(sys::UBLK_U_IO_FETCH_REQ, tag, -1);
        self.push(&[command])
    }

    /// Answers the tag's request with a length or a negative errno, and asks for the next. All bytes of that length must
    /// have been read into it.
    pub(super) fn commit(&mut self, tag: u16, result: i32) -> io::Result<()> {
        let command = self.command(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, result);
        self.push(&[command])
    }

    /// Reads into the tag's request, `at_bytes` from its start.
    pub(super) fn read(&mut self, tag: u16, at_bytes: u32, read: FileRead) -> io::Result<()> {
        let entry = self.read_entry(tag, at_bytes, read);
        self.push(&[entry])
    }

    /// Answers the tag's request, which is as long as `read`, with what is read. If that fails, it is not answered, and the
    /// read is the one that completes.
    pub(super) fn answer(&mut self, tag: u16, read: FileRead) -> io::Result<()> {
        let linked = squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS;
        let entry = self.read_entry(tag, 0, read).flags(linked);
        let result = i32::try_from(read.len_bytes).unwrap_or(-libc::EINVAL);
        let command = self.command(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, result);
        self.push(&[entry, command])
    }

    /// Waits for the eventfd.
    pub(super) fn watch_event(&mut self) -> io::Result<()> {
        let counter = ptr::from_mut(self.event_counter.as_mut()).cast::<u8>();
        let entry = opcode::Read::new(types::Fd(self.event), counter, 8).build().user_data(KIND_EVENT << KIND_SHIFT);
        self.push(&[entry])
    }

    /// Submits everything and waits until something happens; false after `limit` without it. When this returns `Ok`, reads
    /// that must not wait are over.
    pub(super) fn wait(&mut self, limit: Option<Duration>) -> io::Result<bool> {
        loop {
            let outcome = match limit {
                None => self.ring.submit_and_wait(1),
                Some(limit) => {
                    let limit = types::Timespec::from(limit);
                    self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
                }
            };
            match outcome {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ETIME) => return Ok(false),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(error) => return Err(error),
            }
            if self.ring.submission().is_empty() && !self.ring.completion().is_empty() {
                return Ok(true);
            }
        }
    }

    /// The next thing that has happened.
    pub(super) fn next(&mut self) -> Option<Completion> {
        let entry: cqueue::Entry = self.ring.completion().next()?;
        let (kind, result) = (entry.user_data() >> KIND_SHIFT, entry.result());
        let tag = u16::try_from(entry.user_data() & u64::from(u16::MAX)).unwrap_or(0);
        Some(match kind {
            KIND_COMMAND => Completion::Command { tag, result },
            KIND_READ => Completion::Read { tag, result },
            _ => Completion::Event { result },
        })
    }

    /// Gives the memory of buffers back. No read may be under way, and no answer.
    pub(super) fn trim(&mut self) {
        if let Some(buffers) = &self.buffers {
            buffers.drop_contents();
        }
    }

    fn command(&self, operation: u32, tag: u16, result: i32) -> squeue::Entry {
        let buffer = self.buffer(tag).map_or(0, |buffer| buffer.as_ptr() as u64);
        // `struct ublksrv_io_cmd`: queue, tag, result, address.
        let mut bytes = [0; 16];
        bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&result.to_ne_bytes());
        bytes[8..].copy_from_slice(&buffer.to_ne_bytes());
        let mut command = opcode::UringCmd16::new(types::Fd(self.character_device), operation).cmd(bytes);
        if self.buffers.is_none() {
            // `struct ublk_auto_buf_reg`: the place in the ring's table, and no flags.
            command = command.addr(Some(u64::from(tag)));
        }
        command.build().user_data(KIND_COMMAND << KIND_SHIFT | u64::from(tag))
    }

    fn read_entry(&self, tag: u16, at_bytes: u32, read: FileRead) -> squeue::Entry {
        let FileRead { file, offset_bytes, len_bytes, must_not_wait } = read;
        let flags = if must_not_wait { RWF_NOWAIT } else { 0 };
        let entry = match self.buffer(tag) {
            Some(buffer) => {
                let room = self.buffer_len_bytes.saturating_sub(at_bytes as usize);
                let len_bytes = len_bytes.min(u32::try_from(room).unwrap_or(u32::MAX));
                let target = buffer.as_ptr().wrapping_add(at_bytes as usize);
                opcode::Read::new(types::Fd(file), target, len_bytes).offset(offset_bytes).rw_flags(flags).build()
            }
            None => {
                // The address of a registered buffer of a request is an offset in it; the kernel checks both ends.
                let target = ptr::without_provenance_mut(at_bytes as usize);
                let read = opcode::ReadFixed::new(types::Fd(file), target, len_bytes, tag);
                read.offset(offset_bytes).rw_flags(flags).build()
            }
        };
        entry.user_data(KIND_READ << KIND_SHIFT | u64::from(tag))
    }

    fn buffer(&self, tag: u16) -> Option<NonNull<u8>> {
        let buffers = self.buffers.as_ref()?;
        let at = usize::from(tag.min(self.depth - 1)) * self.buffer_len_bytes;
        // SAFETY: the mapping has a buffer for each tag.
        Some(unsafe { buffers.start.add(at) })
    }

    /// Queues entries that belong together: all or none of them are submitted at a time.
    fn push(&mut self, entries: &[squeue::Entry]) -> io::Result<()> {
        let queue = self.ring.submission();
        let has_room = queue.capacity() - queue.len() >= entries.len();
        drop(queue);
        if !has_room {
            self.ring.submit()?;
        }
        // SAFETY: reads point into the tag's buffer or request, or the counter, which stay until the ring is gone, and the
        // files stay open as long. A ring that is dropped has none under way: the kernel ended every command, and before it its reads.
        unsafe { self.ring.submission().push_multiple(entries) }.map_err(|_full| io::ErrorKind::OutOfMemory.into())
    }
}

/// Memory that was mapped.
struct Mapping {
    start: NonNull<u8>,
    len_bytes: usize,
}

impl Mapping {
    /// Empty memory, which takes no room before it is touched.
    fn anonymous(len_bytes: usize) -> io::Result<Self> {
        Self::new(
            len_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    }

    /// Memory of a device, to be read.
    fn of(file: RawFd, offset_bytes: i64, len_bytes: usize) -> io::Result<Self> {
        Self::new(len_bytes, libc::PROT_READ, libc::MAP_SHARED | libc::MAP_POPULATE, file, offset_bytes)
    }

    fn new(len_bytes: usize, protection: i32, flags: i32, file: RawFd, offset_bytes: i64) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), len_bytes, protection, flags, file, offset_bytes) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len_bytes })
    }

    fn drop_contents(&self) {
        // SAFETY: our own anonymous memory, in which nobody looks for anything; it reads as zeros afterwards.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len_bytes, libc::MADV_DONTNEED) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody has a pointer into it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}
