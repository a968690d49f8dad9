//! The queue thread of a ublk device: one task a tag, all on one io_uring.
//!
//! ```text
//! fetch ─► plan ─ready──► READ of the files into the tag's buffer ─► commit, fetch the next
//!            ▲  └missing─► demand, sleep until the waiter ran ─┐
//!            └─────────────────────────────────────────────────┘
//! ```
//! The thread sleeps in its ring only: it performs no I/O of its own, takes no lock held across I/O and knows no network.
//! A miss costs nothing but its tag, so hits go on while others wait. The kernel copies from the tag's buffer when the
//! request is committed; a request is committed with all its bytes or with an error, never with bytes left over from
//! another one.
//!
//! The thread ends when the kernel aborts the fetches (STOP_DEV). Should it panic, or should the kernel refuse a commit,
//! the process is aborted: a process without its queue thread would leave readers hanging on a device that looks live,
//! a process that died is recovered without an error.

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use io_uring::{opcode, types};
use libublk::ctrl::UblkCtrl;
use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkQueue};
use libublk::uring_async::ublk_submit_sqe_async;
use libublk::{BufDesc, UblkError, UblkUringData, sys};
use smol::LocalExecutor;

use super::completion::{CompletionPort, Parking};
use crate::capabilities;
use crate::first_reads::DeviceRead;
use crate::image::{BLOCK_SIZE_BYTES, Piece, Plan, Readiness, ServedImage};

/// How often a request is planned in vain before it fails. More than one demand is needed only when a chunk is evicted
/// between its arrival and the next plan, or cannot be read from the disk.
const PLANS_PER_REQUEST_MAX: u32 = 16;
/// What [`Queue::read`] fails with when the range is to be planned again.
const PLAN_AGAIN: i32 = libc::ESTALE;
/// How often one read is tried again after EINTR or EAGAIN.
const READ_RETRIES_MAX: u32 = 1000;
/// Sectors of 512 bytes per block.
const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE_BYTES as u64 / 512;

/// Serves queue 0 until the kernel aborts it. Says on `up` whether the queue could be set up; the fetches follow.
pub(super) fn serve(
    device: &UblkDev,
    image: &Arc<ServedImage>,
    port: &Arc<CompletionPort>,
    up: &SyncSender<Result<(), UblkError>>,
) {
    UblkCtrl::init_queue_thread();
    // Before the first fetch: so the kernel does not scan the device for partitions.
    if let Err(error) = capabilities::drop_all_of_this_thread() {
        tracing::warn!(%error, "a queue thread keeps its capabilities");
    }
    let queue = match UblkQueue::new(0, device) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = up.send(Err(error));
            return;
        }
    };
    // The receiver waits for nothing else, or has given up: then the device is deleted and the fetches abort.
    let _ = up.send(Ok(()));
    let tags = device.dev_info.queue_depth;
    let queue = Rc::new(Queue {
        tags: Cell::new(tags),
        parking: Parking::new(tags),
        image: Arc::clone(image),
        port: Arc::clone(port),
        buffer_len_bytes: device.dev_info.max_io_buf_bytes as usize,
        ring: queue,
    });
    let executor = LocalExecutor::new();
    let mut tasks: Vec<_> = (0..tags).map(|tag| executor.spawn(Rc::clone(&queue).serve_tag(tag))).collect();
    tasks.push(executor.spawn(Rc::clone(&queue).serve_completions()));
    let run = || while executor.try_tick() {};
    let done = || tasks.iter().all(smol::Task::is_finished);
    let outcome = smol::future::block_on(libublk::wait_and_handle_io_events(&queue.ring, None, run, done));
    if let Err(error) = outcome {
        fatal("the ring of a queue", &error);
    }
}

fn fatal(what: &str, error: &UblkError) -> ! {
    tracing::error!(%error, ?error, "ublk: {what} failed; aborting, so that the device can be recovered");
    std::process::abort();
}

struct Queue<'device> {
    ring: UblkQueue<'device>,
    image: Arc<ServedImage>,
    port: Arc<CompletionPort>,
    parking: Parking,
    buffer_len_bytes: usize,
    /// Tags whose task has not ended.
    tags: Cell<u16>,
}

impl Queue<'_> {
    async fn serve_tag(self: Rc<Self>, tag: u16) {
        match self.answer_requests(tag).await {
            UblkError::QueueIsDown => {}
            error => fatal("a tag", &error),
        }
        self.tags.set(self.tags.get() - 1);
        if self.tags.get() == 0 {
            self.port.signal();
        }
    }

    /// Returns why it ended: [`UblkError::QueueIsDown`] when the device was stopped.
    async fn answer_requests(&self, tag: u16) -> UblkError {
        let mut buffer = IoBuf::<u8>::new(self.buffer_len_bytes);
        let mut plan = Plan::new();
        let mut fetched = self.ring.submit_io_prep_cmd(tag, BufDesc::Slice(buffer.as_slice()), 0, Some(&buffer)).await;
        loop {
            match fetched {
                Ok(0) => {}
                Ok(unknown) => return UblkError::UringIOError(unknown),
                Err(error) => return error,
            }
            let mut read = DeviceRead::default();
            let outcome = self.answer(tag, &mut read, &mut buffer, &mut plan).await;
            self.image.answered(&read, outcome);
            let result = match outcome {
                Ok(len_bytes) => i32::try_from(len_bytes).unwrap_or(-libc::EIO),
                Err(errno) => -errno,
            };
            fetched = self.ring.submit_io_commit_cmd(tag, BufDesc::Slice(buffer.as_slice()), result).await;
        }
    }

    /// Answers the request of a tag into its buffer: its length, or a positive errno.
    async fn answer(
        &self,
        tag: u16,
        read: &mut DeviceRead,
        buffer: &mut IoBuf<u8>,
        plan: &mut Plan,
    ) -> Result<u32, i32> {
        let request = self.ring.get_iod(tag);
        match request.op_flags & 0xff {
            sys::UBLK_IO_OP_READ => {}
            sys::UBLK_IO_OP_FLUSH => return Ok(0),
            _ => return Err(libc::EROFS),
        }
        let sectors = u64::from(request.nr_sectors);
        let in_blocks = |sectors: u64| {
            let whole = sectors.is_multiple_of(SECTORS_PER_BLOCK);
            whole.then(|| u32::try_from(sectors / SECTORS_PER_BLOCK).ok()).flatten().ok_or(libc::EINVAL)
        };
        let (start_block, len_blocks) = (in_blocks(request.start_sector)?, in_blocks(sectors)?);
        let len_bytes = len_blocks.checked_mul(BLOCK_SIZE_BYTES).ok_or(libc::EINVAL)?;
        if len_bytes as usize > buffer.len() {
            return Err(libc::EINVAL);
        }
        *read = self.image.begin(start_block, len_blocks);
        let mut plans_in_vain = 0;
        while plans_in_vain < PLANS_PER_REQUEST_MAX {
            plans_in_vain += 1;
            match self.image.plan(start_block, len_blocks, plan) {
                Readiness::Ready => match self.read(plan, &mut buffer.as_mut_slice()[..len_bytes as usize]).await {
                    Ok(()) if self.image.was_there(plan) => return Ok(len_bytes),
                    // Something was evicted meanwhile, anywhere: that is no fault of this request.
                    Ok(()) => plans_in_vain -= 1,
                    Err(PLAN_AGAIN) => {}
                    Err(errno) => return Err(errno),
                },
                Readiness::Missing if self.port.is_stopping() => return Err(libc::EIO),
                Readiness::Missing => {
                    self.parking.park(tag);
                    self.image.demand(plan, self.image.wait(read), self.port.waiter(tag));
                    self.parking.outcome(tag).await?;
                }
            }
        }
        tracing::error!(start_block, len_blocks, "a request still misses blocks after {PLANS_PER_REQUEST_MAX} fetches");
        Err(libc::EIO)
    }

    /// Fills the buffer, all of it, with the pieces of the plan.
    async fn read(&self, plan: &Plan, buffer: &mut [u8]) -> Result<(), i32> {
        let mut rest = buffer;
        for piece in plan.pieces() {
            let (Piece::File { len_bytes, .. } | Piece::Zero { len_bytes }) = *piece;
            let Some((part, after)) = rest.split_at_mut_checked(len_bytes as usize) else {
                tracing::error!("a plan is longer than its request");
                return Err(libc::EIO);
            };
            match *piece {
                Piece::Zero { .. } => part.fill(0),
                Piece::File { file, offset_bytes, .. } => self.read_file(file, offset_bytes, part).await?,
            }
            rest = after;
        }
        if !rest.is_empty() {
            tracing::error!("a plan is shorter than its request");
            return Err(libc::EIO);
        }
        Ok(())
    }

    async fn read_file(&self, file: u16, offset_bytes: u64, part: &mut [u8]) -> Result<(), i32> {
        let Some(handle) = self.image.files().get(usize::from(file)) else { return Err(libc::EIO) };
        let (mut done, mut retries) = (0, 0);
        while done < part.len() {
            let rest = &mut part[done..];
            let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
            let read = opcode::Read::new(types::Fd(handle.as_raw_fd()), rest.as_mut_ptr(), len)
                .offset(offset_bytes + done as u64)
                .build();
            // The buffer belongs to the tag's task, which does not end before this read did: nothing here is cancelled.
            let result = ublk_submit_sqe_async(read, UblkUringData::Target as u64).await.unwrap_or(-libc::EIO);
            match result {
                len @ 1.. => done += usize::try_from(len).unwrap_or(0),
                errno if (errno == -libc::EINTR || errno == -libc::EAGAIN) && retries < READ_RETRIES_MAX => {
                    retries += 1;
                }
                // Zero: the file is shorter than it should be.
                errno => {
                    let error = std::io::Error::from_raw_os_error(-errno);
                    tracing::error!(file, offset_bytes, %error, "reading a file of the store");
                    let again = self.image.cannot_read(file, offset_bytes + done as u64, len);
                    return Err(if again { PLAN_AGAIN } else { libc::EIO });
                }
            }
        }
        Ok(())
    }

    /// Keeps a read of the port's eventfd armed, and wakes the tags that it has news for. Ends after the last tag: the
    /// read must not outlive its buffer.
    async fn serve_completions(self: Rc<Self>) {
        let mut counter = Box::new([0u8; 8]);
        while self.tags.get() > 0 {
            let event = types::Fd(self.port.event().as_raw_fd());
            let read = opcode::Read::new(event, counter.as_mut_ptr(), 8).build();
            match ublk_submit_sqe_async(read, UblkUringData::Target as u64).await {
                Ok(8) => {}
                Ok(errno) if errno == -libc::EINTR || errno == -libc::EAGAIN => continue,
                Ok(errno) => fatal("the eventfd of a queue", &UblkError::UringIOError(errno)),
                Err(error) => fatal("the eventfd of a queue", &error),
            }
            self.port.drain(|tag, outcome| self.parking.resolve(tag, outcome));
            if self.port.is_stopping() {
                self.parking.resolve_all(Err(libc::EIO));
            }
        }
    }
}
