//! An image as `/dev/ublkbN`.
//!
//! A device is added with user recovery and re-issue: when its server dies, requests wait, and the next server gets the
//! ones that were under way again. That is safe, since the device is read-only. All of `libublk` 0.4.8 is behind this
//! module and those beside it: it adds and opens devices. Three of its habits shape what is here:
//! dropping a control handle deletes the device unless it was disowned; control handles belong to the thread that made
//! them; its commands wait for ever. So a handle lives for ADD_DEV only, on a thread of its own with a deadline; every
//! other command is our own (`ublk_control`), and so is the queue (`ublk_ring`).
//!
//! Order: everything that a partition scan or a probe reads is in the store before `start`, else 6.12 hangs unkillably
//! when the server dies meanwhile. On the way down: fail what is parked, STOP_DEV, wait for the queue thread (it holds the
//! character device), DEL_DEV.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use libublk::ctrl::UblkCtrlBuilder;
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags, sys};
use serde::{Deserialize, Serialize};

use super::completion::CompletionPort;
use super::ublk_control::{COMMAND_TIMEOUT, Control, refused, timed_out};
use super::ublk_queue;
use super::ublk_ring::DataPath;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{BLOCK_SIZE_BYTES, ServedImage};

/// Requests in flight, so the most misses at a time: 64 misses of 100 ms took 1.5 s at depth 8 and 0.72 s at 128.
pub const QUEUE_DEPTH: u16 = 128;
/// Largest request. The kernel splits larger ones; 1 MiB brought nothing. 128 of these are reserved, touched when used.
const REQUEST_LEN_BYTES: u32 = 512 * 1024;
/// Optimal I/O size, as a power of two. The kernel makes the read-ahead window max(128 KiB, twice this).
const OPTIMAL_IO_SHIFT: u8 = 16;
const BLOCK_SHIFT: u8 = 12;
/// Upper half of the number that the driver keeps with a device for its server (`ublksrv_flags`): this program made it.
/// The lower half is the process that did.
const MADE_BY_US: u32 = u32::from_be_bytes(*b"uimg");
/// A read-only device may have requests re-issued, so always both.
const FLAGS: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;
/// Reads of files land in the pages of requests (6.16; the first bit alone is older and means more work for each request).
const ZERO_COPY_FLAGS: u64 = (sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG) as u64;
/// How long devtmpfs or udev may take to make the node.
const NODE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for holders of a device that is being deleted. The kernel goes on by itself afterwards.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is looked whether a server has let go of its device.
const SERVER_POLL: Duration = Duration::from_millis(2);
/// Where the driver lists its devices.
const CLASS_DIRECTORY: &str = "/sys/class/ublk-char";

/// State of a ublk device as the kernel tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Added but not started, or stopped: there is no block device.
    Dead,
    /// Served.
    Live,
    /// Its server died: reads wait for a new one.
    Quiesced,
    /// Its server died: reads fail until there is a new one.
    Failing,
    /// A state that this program does not know.
    Other(u16),
}

impl From<u16> for DeviceState {
    fn from(state: u16) -> Self {
        match u32::from(state) {
            sys::UBLK_S_DEV_DEAD => Self::Dead,
            sys::UBLK_S_DEV_LIVE => Self::Live,
            sys::UBLK_S_DEV_QUIESCED => Self::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => Self::Failing,
            _ => Self::Other(state),
        }
    }
}

/// A ublk device of this kernel, whoever made it. Our own are told by a mark that the driver keeps for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelDevice {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// What it does.
    pub state: DeviceState,
    /// The process that serves it, or served it last; -1 before the first start.
    pub server_pid: i32,
    /// The process that added it, if that was this program.
    pub creator_pid: Option<u32>,
}

/// A device that somebody remembers. The kernel gives numbers out again, so the number alone says too little.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// The process that added it, if that is remembered.
    pub creator_pid: Option<u32>,
}

impl KernelDevice {
    /// Whether it is that device: one of ours with its number, and by its creator.
    #[must_use]
    pub fn is(&self, claim: Claim) -> bool {
        let creator_fits = |pid| claim.creator_pid.is_none_or(|claimed| claimed == pid);
        self.id == claim.id && self.creator_pid.is_some_and(creator_fits)
    }
}

fn creator_pid(info: &sys::ublksrv_ctrl_dev_info) -> Option<u32> {
    let made_by_us = info.ublksrv_flags >> 32 == u64::from(MADE_BY_US);
    made_by_us.then(|| u32::try_from(info.ublksrv_flags & u64::from(u32::MAX)).ok()).flatten()
}

/// Every ublk device of this kernel, by id.
///
/// # Errors
/// [`ErrorKind::Unsupported`] without ublk; [`ErrorKind::TimedOut`] when the driver does not answer.
pub fn devices() -> Result<Vec<KernelDevice>> {
    let mut control = Control::open()?;
    let mut ids = Vec::new();
    let class = Path::new(CLASS_DIRECTORY);
    let entries = class.read_dir().map_err(|error| Error::path("read", class, error))?;
    for entry in entries {
        let name = entry.map_err(|error| Error::path("read", class, error))?.file_name();
        ids.extend(name.to_str().and_then(|name| name.strip_prefix("ublkc")).and_then(|id| id.parse::<u32>().ok()));
    }
    ids.sort_unstable();
    let mut devices = Vec::new();
    for id in ids {
        devices.extend(device(&mut control, id)?);
    }
    Ok(devices)
}

/// A device that may be gone.
fn device(control: &mut Control, id: u32) -> Result<Option<KernelDevice>> {
    match control.info(id) {
        Ok(info) => Ok(Some(KernelDevice {
            id,
            state: info.state.into(),
            server_pid: info.ublksrv_pid,
            creator_pid: creator_pid(&info),
        })),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Waits until no process serves a device, and says what it is then; readers may be waiting, so it looks often. `None` if
/// it is not there.
///
/// # Errors
/// [`ErrorKind::Busy`] when it is still served after `timeout`; as [`devices`].
pub fn without_server(claim: Claim, timeout: Duration) -> Result<Option<KernelDevice>> {
    let (mut control, deadline) = (Control::open()?, Instant::now() + timeout);
    loop {
        let Some(device) = device(&mut control, claim.id)?.filter(|device| device.is(claim)) else { return Ok(None) };
        if matches!(device.state, DeviceState::Quiesced | DeviceState::Dead) {
            return Ok(Some(device));
        }
        if Instant::now() > deadline {
            let text = format!("process {} still serves /dev/ublkb{}", device.server_pid, claim.id);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        std::thread::sleep(SERVER_POLL);
    }
}

/// Stops and deletes a device, whoever made it: readers that wait get EIO. Bounded: at most about a minute.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::TimedOut`] when somebody still holds it (it goes when they let go) or the kernel
/// does not answer.
pub fn delete(id: u32) -> Result<()> {
    let mut control = Control::open()?;
    control.info(id)?;
    // A device that was never started cannot be stopped.
    if_there(control.stop(id))?;
    control.delete(id, DELETE_TIMEOUT)
}

/// The same, if it is that device.
///
/// # Errors
/// As [`delete`].
pub fn delete_claimed(claim: Claim) -> Result<()> {
    match device(&mut Control::open()?, claim.id)? {
        Some(device) if device.is(claim) => delete(claim.id),
        _ => Err(Error::new(ErrorKind::NotFound, format!("there is no ublk device {} of ours", claim.id))),
    }
}

/// A command for a device that is not there, or not in that state, has nothing left to do.
fn if_there(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Feature bits of the driver (`UBLK_F_*`).
///
/// # Errors
/// [`ErrorKind::Unsupported`] without the driver, or when it is older than 6.5.
pub fn features() -> Result<u64> {
    Control::open()?.features()
}

/// How a queue is set up; what is not said is chosen here.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueOptions {
    /// Zero copy where the kernel has it.
    pub data_path: Option<DataPath>,
    /// [`QUEUE_DEPTH`]; at most that.
    pub depth: Option<u16>,
}

/// A device that was added, or is being recovered, and not started.
pub struct PreparedUblk {
    id: u32,
    recovering: bool,
    device: Option<Box<UblkDev>>,
    path: DataPath,
    image: Arc<ServedImage>,
}

impl PreparedUblk {
    /// Adds a device; the kernel chooses the id.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], also for a data path that the kernel does not have, [`ErrorKind::TimedOut`], or what the
    /// kernel refused.
    pub fn add(image: Arc<ServedImage>, options: QueueOptions) -> Result<Self> {
        let features = Control::open()?.features()?;
        let has_zero_copy = features & ZERO_COPY_FLAGS == ZERO_COPY_FLAGS;
        let path = match options.data_path {
            None if has_zero_copy => DataPath::ZeroCopy,
            None => DataPath::Copy,
            Some(DataPath::ZeroCopy) if !has_zero_copy => {
                let what = "this kernel's ublk driver has no automatic buffer registration (Linux 6.16): no zero copy";
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            Some(path) => path,
        };
        let device_len_bytes = u64::from(image.total_blocks()) * u64::from(BLOCK_SIZE_BYTES);
        let depth = options.depth.unwrap_or(QUEUE_DEPTH);
        let device = with_deadline("ADD_DEV", move || add_device(device_len_bytes, depth, path), discard)??;
        Ok(Self { id: device.dev_info.dev_id, recovering: false, device: Some(Box::new(device)), path, image })
    }

    /// Begins to take over a device whose server died.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] when its server still lives after 30 s; [`ErrorKind::Invalid`] when
    /// the device is not one of ours, was never started, or has another length than the image.
    pub fn recover(image: Arc<ServedImage>, id: u32) -> Result<Self> {
        let mut control = Control::open()?;
        let info = control.info(id)?;
        if creator_pid(&info).is_none() || info.flags & FLAGS != FLAGS || info.nr_hw_queues != 1 {
            return Err(Error::new(ErrorKind::Invalid, format!("ublk device {id} was not made by this program")));
        }
        if DeviceState::from(info.state) == DeviceState::Dead {
            let what = format!("ublk device {id} was never started, or is stopped: delete it and add a new one");
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        check_len(id, &image)?;
        control.start_recovery(id)?;
        let device_len_bytes = u64::from(image.total_blocks()) * u64::from(BLOCK_SIZE_BYTES);
        let zero_copy = info.flags & ZERO_COPY_FLAGS;
        let path = if zero_copy == ZERO_COPY_FLAGS { DataPath::ZeroCopy } else { DataPath::Copy };
        let open = move || open_device(id, info.queue_depth, info.max_io_buf_bytes, device_len_bytes, zero_copy);
        let device = with_deadline("GET_DEV_INFO", open, drop)??;
        Ok(Self { id, recovering: true, device: Some(Box::new(device)), path, image })
    }

    /// N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Serves it.
    ///
    /// # Errors
    /// See [`super::Prepared::start`].
    pub fn start(mut self) -> Result<UblkDevice> {
        let id = self.id;
        let Some(device) = self.device.take() else {
            return Err(Error::new(ErrorKind::Invalid, format!("ublk device {id} was started before")));
        };
        let mut control = Control::open()?;
        let params = device.tgt.params;
        let path = self.path;
        let started = spawn_queue(*device, path, Arc::clone(&self.image)).and_then(|serving| {
            if self.recovering {
                control.end_recovery(id)?;
            } else {
                control.set_params(id, params)?;
                control.start(id)?;
            }
            Ok(serving)
        });
        let (port, ended) = started?;
        let device = UblkDevice { id, path: PathBuf::from(format!("/dev/ublkb{id}")), data_path: path, port, ended };
        if let Err(error) = wait_for_node(&device.path) {
            if !self.recovering {
                self.recovering = true; // It is deleted here, not once more by our own drop.
                if let Err(error) = device.stop() {
                    tracing::warn!(id, %error, "taking back a device whose node did not appear");
                }
            }
            return Err(error);
        }
        self.recovering = true; // It lives: our own drop leaves it alone.
        Ok(device)
    }
}

impl std::fmt::Debug for PreparedUblk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedUblk").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for PreparedUblk {
    fn drop(&mut self) {
        if self.recovering {
            return;
        }
        // Closes the character device, for which DEL_DEV waits.
        self.device = None;
        if let Err(error) = delete(self.id) {
            tracing::warn!(id = self.id, %error, "taking back a device that was not started");
        }
    }
}

/// A device that answers reads.
#[derive(Debug)]
pub struct UblkDevice {
    id: u32,
    path: PathBuf,
    data_path: DataPath,
    port: Arc<CompletionPort>,
    /// Disconnected when the queue thread ended.
    ended: Receiver<()>,
}

impl UblkDevice {
    /// `/dev/ublkbN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// How data gets into requests.
    #[must_use]
    pub fn data_path(&self) -> DataPath {
        self.data_path
    }

    /// See [`super::Device::stop`].
    ///
    /// # Errors
    /// See [`super::Device::stop`].
    pub fn stop(self) -> Result<()> {
        let mut control = Control::open()?;
        self.port.stop();
        // Somebody else may have deleted it: then only our queue thread is left to end.
        if_there(control.stop(self.id))?;
        if self.ended.recv_timeout(COMMAND_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            let what = format!("the queue thread of ublk device {} does not end", self.id);
            return Err(Error::new(ErrorKind::TimedOut, what));
        }
        match control.delete(self.id, DELETE_TIMEOUT) {
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                let what = format!("{} is still held; it disappears when its last user closes it", self.path.display());
                Err(Error::caused(ErrorKind::Busy, what, error))
            }
            outcome => if_there(outcome),
        }
    }

    /// See [`super::Device::abandon`].
    pub fn abandon(self) {}
}

/// ADD_DEV. Deletes it again when it is not as asked for.
fn add_device(device_len_bytes: u64, depth: u16, path: DataPath) -> Result<UblkDev> {
    let flags = match path {
        DataPath::ZeroCopy => FLAGS | ZERO_COPY_FLAGS,
        DataPath::Copy => FLAGS,
    };
    let control = UblkCtrlBuilder::default()
        .name("ublkimg")
        .nr_queues(1)
        .depth(depth)
        .io_buf_bytes(REQUEST_LEN_BYTES)
        .ctrl_flags(flags)
        .ctrl_target_flags(u64::from(MADE_BY_US) << 32 | u64::from(std::process::id()))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(|error| library_error("ADD_DEV", u32::MAX, error))?;
    let info = control.dev_info();
    // The kernel clears flags that it does not know.
    if info.flags & flags != flags {
        let what = format!("the ublk driver leaves out {:#x} of the features that it has", flags & !info.flags);
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let device = UblkDev::new("ublkimg".into(), |device| set_params(device, device_len_bytes), &control)
        .map_err(|error| library_error("opening the character device", info.dev_id, error))?;
    control.disown();
    Ok(device)
}

/// Opens the character device of a device under recovery.
fn open_device(id: u32, depth: u16, request_len_bytes: u32, device_len_bytes: u64, zero_copy: u64) -> Result<UblkDev> {
    let control = UblkCtrlBuilder::default()
        .name("ublkimg")
        .id(i32::try_from(id).unwrap_or(i32::MAX))
        .nr_queues(1)
        .depth(depth)
        .io_buf_bytes(request_len_bytes)
        .ctrl_flags(FLAGS | zero_copy)
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build()
        .map_err(|error| library_error("GET_DEV_INFO", id, error))?;
    UblkDev::new("ublkimg".into(), |device| set_params(device, device_len_bytes), &control)
        .map_err(|error| library_error("opening the character device", id, error))
}

fn set_params(device: &mut UblkDev, device_len_bytes: u64) -> Result<(), UblkError> {
    device.set_default_params(device_len_bytes);
    let basic = &mut device.tgt.params.basic;
    basic.attrs = sys::UBLK_ATTR_READ_ONLY;
    basic.logical_bs_shift = BLOCK_SHIFT;
    basic.physical_bs_shift = BLOCK_SHIFT;
    basic.io_min_shift = BLOCK_SHIFT;
    basic.io_opt_shift = OPTIMAL_IO_SHIFT;
    Ok(())
}

type Serving = (Arc<CompletionPort>, Receiver<()>);

/// Starts the queue thread; returns when its queue is set up.
fn spawn_queue(device: UblkDev, path: DataPath, image: Arc<ServedImage>) -> Result<Serving> {
    let id = device.dev_info.dev_id;
    let port = CompletionPort::new(device.dev_info.queue_depth)
        .map_err(|error| Error::io(format!("ublk device {id}: eventfd"), error))?;
    let (up, is_up) = sync_channel(1);
    let (running, ended) = sync_channel::<()>(0);
    let queue_port = Arc::clone(&port);
    std::thread::Builder::new()
        .name(format!("ublk{id}"))
        .spawn(move || {
            let serve = || ublk_queue::serve(&device, path, &image, &queue_port, &up);
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(serve)).is_err() {
                tracing::error!(id, "the queue thread panicked; aborting, so that the device can be recovered");
                std::process::abort();
            }
            drop(device);
            drop(running);
        })
        .map_err(|error| Error::io(format!("ublk device {id}: queue thread"), error))?;
    match is_up.recv_timeout(COMMAND_TIMEOUT) {
        Ok(Ok(())) => Ok((port, ended)),
        Ok(Err(error)) => Err(Error::io(format!("ublk device {id}: set up the queue"), error)),
        Err(_) => Err(timed_out("queue set-up", COMMAND_TIMEOUT)),
    }
}

/// Runs something that may never end on a thread of its own. What comes after the deadline is given to `late`.
fn with_deadline<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
    late: impl FnOnce(T) + Send + 'static,
) -> Result<T> {
    let (done, outcome) = sync_channel(0);
    std::thread::Builder::new()
        .name("ublk-control".into())
        .spawn(move || {
            if let Err(unwanted) = done.send(work()) {
                late(unwanted.0);
            }
        })
        .map_err(|error| Error::io(format!("ublk {name}: thread"), error))?;
    outcome.recv_timeout(COMMAND_TIMEOUT).map_err(|_| timed_out(name, COMMAND_TIMEOUT))
}

/// Deletes a device that was added after we stopped waiting for it.
fn discard(device: Result<UblkDev>) {
    let Ok(device) = device else { return };
    let id = device.dev_info.dev_id;
    drop(device);
    if let Err(error) = delete(id) {
        tracing::warn!(id, %error, "deleting a device that was added too late");
    }
}

/// A device must not change its length under its readers.
fn check_len(id: u32, image: &ServedImage) -> Result<()> {
    let path = PathBuf::from(format!("/sys/class/block/ublkb{id}/size"));
    let text = std::fs::read_to_string(&path).map_err(|error| Error::path("read", &path, error))?;
    let expected = u64::from(image.total_blocks()) * u64::from(BLOCK_SIZE_BYTES) / 512;
    if text.trim().parse() == Ok(expected) {
        return Ok(());
    }
    let what = format!("ublk device {id} has {} sectors, the image {expected}: not the same image", text.trim());
    Err(Error::new(ErrorKind::Invalid, what))
}

fn wait_for_node(path: &Path) -> Result<()> {
    let deadline = Instant::now() + NODE_TIMEOUT;
    loop {
        match path.metadata() {
            Ok(metadata) if metadata.file_type().is_block_device() => return Ok(()),
            Ok(_) => {
                return Err(Error::new(ErrorKind::Invalid, format!("{} is not a block device", path.display())));
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => {
                let what = format!(
                    "{} did not appear within {} s: is /dev a devtmpfs, or udev running?",
                    path.display(),
                    NODE_TIMEOUT.as_secs()
                );
                return Err(Error::caused(ErrorKind::TimedOut, what, error));
            }
        }
    }
}

fn library_error(doing: &str, id: u32, error: UblkError) -> Error {
    match error {
        UblkError::UringIOError(errno) | UblkError::OtherError(errno) if errno < 0 => refused(doing, id, -errno),
        UblkError::IOError(error) => Error::io(format!("ublk {doing}"), error),
        error => Error::caused(ErrorKind::Io, format!("ublk {doing}"), error),
    }
}
