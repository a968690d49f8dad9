//! Control commands of the ublk driver (`/dev/ublk-control`), each with a time limit.
//!
//! A command is one io_uring operation, run by a kernel worker. Some never end: ADD_DEV on a few broken kernels, STOP_DEV
//! after a server died in a partition scan on 6.12, DEL_DEV while somebody holds the device. So we wait for the ring with
//! a deadline and give up on the command, not on the thread. libublk's own commands wait for ever, therefore it only adds
//! devices for us (see `ublk.rs`). Source of numbers and layouts: `include/uapi/linux/ublk_cmd.h`, through `libublk::sys`.

#![expect(unsafe_code, reason = "pushing an io_uring entry and reading the bytes of C structures")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;

use crate::error::{Error, ErrorKind, Result};

/// The driver's control device.
pub(crate) const CONTROL_PATH: &str = "/dev/ublk-control";
/// How long a command may take. The slowest honest one, START_DEV with its partition scan, takes well under a second.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// One command at a time is under way; the kernel rounds up anyway.
const RING_ENTRIES: u32 = 4;
/// Pause before START_USER_RECOVERY is tried again while the kernel still takes the dead server apart.
const RECOVERY_RETRY_PAUSE: Duration = Duration::from_millis(2);

type Ring = IoUring<squeue::Entry128, cqueue::Entry>;

/// The argument of a command that points to memory. Owned, so that it can outlive us when a command does not end.
trait Argument: Copy + 'static {}
impl Argument for u64 {}
impl Argument for sys::ublksrv_ctrl_dev_info {}
impl Argument for sys::ublk_params {}

/// An open control device.
pub(super) struct Control {
    file: File,
    ring: Ring,
}

impl Control {
    /// Opens the control device.
    pub(super) fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL_PATH).map_err(|source| {
            let remedy = match source.kind() {
                io::ErrorKind::NotFound => "run `modprobe ublk_drv` (kernel option BLK_DEV_UBLK)",
                _ => "it needs root, and in a container the device itself",
            };
            Error::caused(ErrorKind::Unsupported, format!("open {CONTROL_PATH}: {remedy}"), source)
        })?;
        let ring = IoUring::builder().build(RING_ENTRIES).map_err(|source| {
            let what =
                "io_uring is refused: see /proc/sys/kernel/io_uring_disabled and the container's seccomp profile";
            Error::caused(ErrorKind::Unsupported, what, source)
        })?;
        Ok(Self { file, ring })
    }

    /// `UBLK_F_*` bits of the driver (Linux 6.5).
    pub(super) fn features(&mut self) -> Result<u64> {
        self.with_argument("GET_FEATURES", sys::UBLK_U_CMD_GET_FEATURES, u32::MAX, 0u64)
    }

    /// What the driver knows about a device.
    pub(super) fn info(&mut self, id: u32) -> Result<sys::ublksrv_ctrl_dev_info> {
        let empty = sys::ublksrv_ctrl_dev_info::default();
        self.with_argument("GET_DEV_INFO", sys::UBLK_U_CMD_GET_DEV_INFO, id, empty)
    }

    /// Sets the parameters of a device that is not started.
    pub(super) fn set_params(&mut self, id: u32, mut params: sys::ublk_params) -> Result<()> {
        params.len = u32::try_from(size_of::<sys::ublk_params>()).unwrap_or(u32::MAX);
        self.with_argument("SET_PARAMS", sys::UBLK_U_CMD_SET_PARAMS, id, params).map(drop)
    }

    /// Makes the block device. Its queues must have been fetched by this process.
    pub(super) fn start(&mut self, id: u32) -> Result<()> {
        self.with_number("START_DEV", sys::UBLK_U_CMD_START_DEV, id, own_pid())
    }

    /// Asks for a quiesced device. While the kernel is still busy with its dead server, this tries again.
    pub(super) fn start_recovery(&mut self, id: u32) -> Result<()> {
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        loop {
            match self.with_number("START_USER_RECOVERY", sys::UBLK_U_CMD_START_USER_RECOVERY, id, 0) {
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                    std::thread::sleep(RECOVERY_RETRY_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    /// Serves a device under recovery. Its queues must have been fetched by this process.
    pub(super) fn end_recovery(&mut self, id: u32) -> Result<()> {
        self.with_number("END_USER_RECOVERY", sys::UBLK_U_CMD_END_USER_RECOVERY, id, own_pid())
    }

    /// Takes the block device away; waits for requests that the server has.
    pub(super) fn stop(&mut self, id: u32) -> Result<()> {
        self.with_number("STOP_DEV", sys::UBLK_U_CMD_STOP_DEV, id, 0)
    }

    /// Deletes a device. It is doomed once this was called: when somebody still holds it, the error is
    /// [`ErrorKind::TimedOut`] and the kernel deletes it as soon as they let go.
    pub(super) fn delete(&mut self, id: u32, timeout: Duration) -> Result<()> {
        let command = sys::ublksrv_ctrl_cmd { dev_id: id, queue_id: u16::MAX, ..Default::default() };
        let name = "DEL_DEV";
        let result = self.run(name, sys::UBLK_U_CMD_DEL_DEV, command, timeout)?;
        check(name, id, result)
    }

    fn with_number(&mut self, name: &str, operation: u32, id: u32, number: u64) -> Result<()> {
        let command = sys::ublksrv_ctrl_cmd { dev_id: id, queue_id: u16::MAX, data: [number], ..Default::default() };
        let result = self.run(name, operation, command, COMMAND_TIMEOUT)?;
        check(name, id, result)
    }

    fn with_argument<T: Argument>(&mut self, name: &str, operation: u32, id: u32, argument: T) -> Result<T> {
        let mut argument = Box::new(argument);
        let command = sys::ublksrv_ctrl_cmd {
            dev_id: id,
            queue_id: u16::MAX,
            addr: std::ptr::from_mut(argument.as_mut()) as u64,
            len: u16::try_from(size_of::<T>()).unwrap_or(u16::MAX),
            ..Default::default()
        };
        match self.run(name, operation, command, COMMAND_TIMEOUT) {
            Ok(result) => check(name, id, result).map(|()| *argument),
            Err(error) => {
                // The kernel may still write to it.
                Box::leak(argument);
                Err(error)
            }
        }
    }

    /// Runs a command; gives its result, 0 or a negative errno. An error means that it did not end.
    fn run(&mut self, name: &str, operation: u32, command: sys::ublksrv_ctrl_cmd, timeout: Duration) -> Result<i32> {
        let mut bytes = [0u8; 80];
        // SAFETY: the structure is plain old data of integers without padding (32 bytes; checked by its layout test).
        let raw: [u8; size_of::<sys::ublksrv_ctrl_cmd>()] = unsafe { std::mem::transmute(command) };
        bytes[..raw.len()].copy_from_slice(&raw);
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), operation).cmd(bytes).build();
        // SAFETY: the file lives as long as the ring; memory that the command points to is kept by `with_argument`
        // until the command ended, or for ever.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|source| Error::caused(ErrorKind::Io, format!("ublk {name}: the ring is full"), source))?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(completion) = self.ring.completion().next() {
                return Ok(completion.result());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.timed_out(name, timeout));
            }
            let timespec = types::Timespec::from(left);
            match self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec)) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EAGAIN)) => {}
                Err(error) => return Err(Error::io(format!("ublk {name}: io_uring"), error)),
            }
        }
    }

    /// The command that did not end may end later and take the next one's place: the ring is replaced.
    fn timed_out(&mut self, name: &str, timeout: Duration) -> Error {
        if let Ok(ring) = IoUring::builder().build(RING_ENTRIES) {
            self.ring = ring;
        }
        timed_out(name, timeout)
    }
}

/// The error for a command that does not end.
pub(super) fn timed_out(name: &str, timeout: Duration) -> Error {
    let hint = match name {
        "ADD_DEV" => {
            "; kernels 6.18.4, 6.18.5 and Ubuntu's 6.17.0-10xx are known to hang in it: look for an oops in `dmesg`"
        }
        "STOP_DEV" => "; a server that died while partitions were scanned does that on 6.12: only a reboot clears it",
        "DEL_DEV" => ": somebody still holds the device (a mount, an open file); it goes when they let go",
        _ => ": see `dmesg`",
    };
    Error::new(ErrorKind::TimedOut, format!("ublk {name} did not end within {} s{hint}", timeout.as_secs()))
}

/// The error for a refused command; `errno` is positive. `id` is `u32::MAX` for commands about no device.
pub(super) fn refused(name: &str, id: u32, errno: i32) -> Error {
    let (kind, hint) = match errno {
        libc::ENODEV | libc::ENOENT | libc::EINVAL if id != u32::MAX && name != "SET_PARAMS" => {
            (ErrorKind::NotFound, ": no such device, or not in a state for this")
        }
        libc::EBUSY => (ErrorKind::Busy, ": its server still lives, or has just died"),
        libc::EACCES if name == "ADD_DEV" => {
            (ErrorKind::Busy, ": too many ublk devices (module parameter ublks_max, 64 by default), or no permission")
        }
        libc::EPERM | libc::EACCES => (ErrorKind::Unsupported, ": needs root (CAP_SYS_ADMIN)"),
        libc::EOPNOTSUPP | libc::ENOTTY | 524 => {
            (ErrorKind::Unsupported, ": the ublk driver is too old (6.5 or later)")
        }
        _ => (ErrorKind::Io, ""),
    };
    let device = if id == u32::MAX { String::new() } else { format!(" of device {id}") };
    Error::caused(kind, format!("ublk {name}{device}{hint}"), io::Error::from_raw_os_error(errno))
}

fn check(name: &str, id: u32, result: i32) -> Result<()> {
    if result >= 0 { Ok(()) } else { Err(refused(name, id, -result)) }
}

fn own_pid() -> u64 {
    u64::from(std::process::id())
}
