//! Loop devices: one read-only device over one file. Numbers and layouts: `include/uapi/linux/loop.h`.
//!
//! A device is made in one step (LOOP_CONFIGURE, Linux 5.8) with direct I/O, so that blocks are cached once, as pages of
//! the device, and so that requests reach the file all at once: without it the kernel reads one after another, and a read
//! that waits would hold up the others. Autoclear frees the device when its last user closes it, also after `kill -9`.

#![expect(unsafe_code, reason = "the ioctls of loop devices")]

use std::ffi::c_ulong;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::read_ahead::{self, READ_AHEAD_DEFAULT_KB};
use crate::error::{Error, ErrorKind, Result};
use crate::image::BLOCK_SIZE_BYTES;

/// Gives out loop devices.
pub(crate) const CONTROL_PATH: &str = "/dev/loop-control";
/// Others may take the free device that we were told of before we have it.
const CONFIGURE_ATTEMPTS_MAX: u32 = 32;
/// How long a prober (udev) may hold a device that is going.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

const LOOP_CTL_GET_FREE: c_ulong = 0x4c82;
const LOOP_CONFIGURE: c_ulong = 0x4c0a;
const LOOP_CLR_FD: c_ulong = 0x4c01;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

impl LoopConfig {
    fn new(backing: RawFd, block_size: u32, flags: u32) -> Self {
        let info = LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        };
        // A file descriptor is never negative.
        Self { fd: backing.cast_unsigned(), block_size, info, reserved: [0; 8] }
    }
}

/// A loop device that this process holds.
#[derive(Debug)]
pub(super) struct LoopDevice {
    file: File,
    path: PathBuf,
}

impl LoopDevice {
    /// Binds a free loop device to a file. Falls back from direct I/O and from 4 KiB blocks when the kernel refuses them.
    pub(super) fn attach(backing: &File) -> Result<Self> {
        let control_path = Path::new(CONTROL_PATH);
        let control = OpenOptions::new().read(true).write(true).open(control_path).map_err(|source| {
            let what = format!("open {CONTROL_PATH}: run `modprobe loop`; in a container it needs the device");
            Error::caused(ErrorKind::Unsupported, what, source)
        })?;
        let flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
        let wishes = [(BLOCK_SIZE_BYTES, flags | LO_FLAGS_DIRECT_IO), (0, flags | LO_FLAGS_DIRECT_IO), (0, flags)];
        for _ in 0..CONFIGURE_ATTEMPTS_MAX {
            // SAFETY: the command takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(Error::path("get a free loop device from", control_path, io::Error::last_os_error()));
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = OpenOptions::new().read(true).open(&path).map_err(|error| Error::path("open", &path, error))?;
            for (wish, (block_size, flags)) in wishes.into_iter().enumerate() {
                match configure(&file, backing, block_size, flags) {
                    Ok(()) => {
                        let device = Self { file, path };
                        device.set_read_ahead();
                        device.warn_without_direct_io();
                        return Ok(device);
                    }
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => break,
                    Err(error) if wish + 1 == wishes.len() => return Err(Error::path("set up", &path, error)),
                    Err(_) => {}
                }
            }
        }
        Err(Error::new(ErrorKind::Busy, format!("no loop device after {CONFIGURE_ATTEMPTS_MAX} attempts")))
    }

    /// `/dev/loopN`.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets go of it. True when nobody else holds it: it is free again. Otherwise that happens when they close it.
    pub(super) fn detach(self) -> bool {
        // Once free, it may be anybody's: it is ours as long as it names our file.
        let backing = self.attribute("backing_file");
        let ours = std::fs::read(&backing).ok();
        // SAFETY: the command takes no argument. Autoclear does the same when the last user closes it.
        let _ = unsafe { libc::ioctl(self.file.as_raw_fd(), LOOP_CLR_FD) };
        drop(self.file);
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        while ours.is_some() && std::fs::read(&backing).ok() == ours {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn attribute(&self, name: &str) -> PathBuf {
        let device = self.path.file_name().unwrap_or_default();
        Path::new("/sys/block").join(device).join("loop").join(name)
    }

    fn set_read_ahead(&self) {
        // What the kernel chooses depends on its version and on who used the loop device before.
        if let Err(error) = read_ahead::set_open(&self.file, READ_AHEAD_DEFAULT_KB) {
            tracing::warn!(device = %self.path.display(), %error, "the read-ahead window stays as it is");
        }
    }

    fn warn_without_direct_io(&self) {
        if std::fs::read_to_string(self.attribute("dio")).is_ok_and(|dio| dio.trim() == "0") {
            tracing::warn!(device = %self.path.display(), "the kernel refuses direct I/O: reads wait for each other");
        }
    }
}

impl AsRawFd for LoopDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn configure(device: &File, backing: &File, block_size: u32, flags: u32) -> io::Result<()> {
    let config = LoopConfig::new(backing.as_raw_fd(), block_size, flags);
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which has this layout and lives until the call returns.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_kernel() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(std::mem::offset_of!(LoopConfig, info.flags), 8 + 52);
    }
}
