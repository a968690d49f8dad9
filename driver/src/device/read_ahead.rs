//! The read-ahead window of a block device: what the kernel asks for beyond what a program reads.
//!
//! It is set by an ioctl on the device and not by writing `queue/read_ahead_kb` in sysfs, which shows it: on 6.13 to 6.18
//! that write freezes the queue, so every new read, also one that is in the store, would wait for the misses under way.
//! Files that are open keep the window that they were opened with.

#![expect(unsafe_code, reason = "the ioctl of the read-ahead window")]

use std::ffi::c_ulong;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::error::{Error, Result};

/// What the kernel uses by default, and what a device has once a start is over.
pub const READ_AHEAD_DEFAULT_KB: u32 = 128;

/// Longest window: more than the bytes on the way of a link of 10 Gbit/s and 100 ms bring nothing.
pub const READ_AHEAD_MAX_KB: u32 = 128 << 10;

/// `BLKRASET`: in sectors of 512 bytes.
const BLKRASET: c_ulong = 0x1262;

/// Sets the window of the device at `path`, for files that are opened from now on.
///
/// # Errors
/// `Io`, naming the device.
pub fn set_read_ahead(path: &Path, window_kb: u32) -> Result<()> {
    let device = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let device = device.map_err(|error| Error::path("open", path, error))?;
    set_open(&device, window_kb).map_err(|error| Error::path("set the read-ahead window of", path, error))
}

/// Sets the window of an open device.
pub(super) fn set_open(device: &File, window_kb: u32) -> io::Result<()> {
    let sectors = c_ulong::from(window_kb.min(READ_AHEAD_MAX_KB) * 2);
    // SAFETY: the command takes a number, not a pointer.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKRASET, sectors) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
