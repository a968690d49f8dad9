//! dm-verity over a device: the kernel checks each block that a reader gets against a tree of digests, down to the last
//! step, which our own checks do not see (the store's disk, the memory of the server, ublk).
//!
//! The tree lies behind the device that it is over, on the same ublk device, and is fetched like the rest of it. The kernel's
//! verity target makes a device of its own of the two, a mapped device, that is as long as the tree covers. The commands set
//! it up and take it down: the server has nothing to do with it, and one that is killed leaves it as it is, like a mount.
//! A mapped device that is to be mounted is told to go by itself when it is unmounted, so nothing is left of it whatever
//! happens to the commands. One that is left over a device that is gone (its server gave up) keeps that device's number, which
//! no other device gets meanwhile: so the number tells whether a mapped device is over this device.
//!
//! Numbers and layouts: `include/uapi/linux/dm-ioctl.h`; the table: admin-guide/device-mapper/verity. The crate `devicemapper` (0.34)
//! would bring bindgen, and so libclang, to every build, for six commands.

#![expect(unsafe_code, reason = "the ioctls of the device mapper")]

use std::ffi::c_ulong;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ublkimg_image::{BLOCK_SIZE, DeviceMap};
use ublkimg_registry::erofs_manifest::ErofsManifest;

use crate::error::{Error, ErrorKind, Result};
use crate::mounts::{self, DeviceNumber};

const CONTROL_PATH: &str = "/dev/mapper/control";
const DIRECTORY: &str = "/dev/mapper";
/// Bytes of `struct dm_ioctl`.
const HEADER_LEN: usize = 312;
/// Bytes of `struct dm_target_spec`.
const TARGET_LEN: usize = 40;
/// Bytes of all that is passed: a table of two paths, two digests and a few numbers is far shorter than what is left.
const BUFFER_LEN: usize = 4096;
/// Longest name of a mapped device.
const NAME_LEN_MAX: usize = 127;
/// Sectors of a block.
const BLOCK_SECTORS: u64 = BLOCK_SIZE as u64 / 512;

const DEV_CREATE: c_ulong = 3;
const DEV_REMOVE: c_ulong = 4;
const DEV_SUSPEND: c_ulong = 6;
const DEV_STATUS: c_ulong = 7;
const TABLE_LOAD: c_ulong = 9;
const TABLE_DEPS: c_ulong = 11;
const READONLY: u32 = 1;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// What the kernel needs to check a device, from its image's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerityTable {
    /// Digest of the tree's top block, 64 hexadecimal digits.
    pub root: String,
    /// What is hashed before each block, in hexadecimal digits.
    pub salt: String,
    /// Blocks that are covered; the tree starts behind them.
    pub data_blocks: u32,
}

impl VerityTable {
    /// The table of an image whose device is laid out so; none without a tree, which is the last blob.
    pub(crate) fn of(manifest: &ErofsManifest, map: &DeviceMap) -> Option<Self> {
        let verity = manifest.verity.as_ref()?;
        let salt = manifest.metadata.uncompressed_digest.hex();
        Some(Self { root: verity.root.hex(), salt, data_blocks: map.end_of(manifest.layers.len()) })
    }

    /// The parameters of the target over `device`, which has data and tree.
    fn parameters(&self, device: &Path) -> String {
        let Self { root, salt, data_blocks } = self;
        let device = device.display();
        format!("1 {device} {device} {BLOCK_SIZE} {BLOCK_SIZE} {data_blocks} {data_blocks} sha256 {root} {salt}")
    }
}

/// A mapped device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Where it is.
    pub path: PathBuf,
    /// Its number.
    pub number: DeviceNumber,
}

/// Where the mapped device over the device with this name is, if there is one.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(mapped_name(name))
}

fn mapped_name(name: &str) -> String {
    format!("ublkimg-{name}")
}

/// Sets the verity target up over `device`, the device with this name. The mapped device is found if it is there already.
///
/// # Errors
/// [`ErrorKind::Unsupported`] without device mapper or verity target; [`ErrorKind::Invalid`] for a name that is too long;
/// [`ErrorKind::Busy`] when an earlier device of this name is still mapped and in use.
pub fn open(name: &str, device: &Path, table: &VerityTable) -> Result<Mapped> {
    // One command after the other; gone with the file, whatever happens.
    let node = File::open(device).map_err(|error| Error::path("open", device, error))?;
    node.lock().map_err(|error| Error::path("lock", device, error))?;
    let control = Control::open()?;
    if let Some(mapped) = find(name)? {
        if control.call(TABLE_DEPS, name, 0, &[])?.is_over(mounts::device_number(device)?) {
            return Ok(mapped);
        }
        // Half made by a command that was killed, or over a device that is gone.
        control.call(DEV_REMOVE, name, 0, &[]).map_err(|error| {
            let mapped = mapped.path.display();
            let what = format!("{mapped} is over an earlier device and in use: unmount it, or give another --name");
            Error::caused(error.kind(), what, error)
        })?;
    }
    let number = control.call(DEV_CREATE, name, READONLY, &[])?.number();
    let sectors = u64::from(table.data_blocks) * BLOCK_SECTORS;
    let loaded = control
        .call(TABLE_LOAD, name, READONLY, &target(sectors, &table.parameters(device)))
        // Resumed: the table that was loaded is the one in use.
        .and_then(|_| control.call(DEV_SUSPEND, name, 0, &[]));
    let made = loaded.map_err(|error| {
        let what = format!("set up dm-verity over {} (does the kernel have dm-verity and SHA-256?)", device.display());
        Error::caused(ErrorKind::Unsupported, what, error)
    });
    let made = made.and_then(|_| make_link(name, number));
    if let Err(error) = made {
        let _ = control.call(DEV_REMOVE, name, 0, &[]);
        return Err(error);
    }
    Ok(Mapped { path: path(name), number })
}

/// The mapped device over the device with this name.
///
/// # Errors
/// When the kernel does not tell.
pub fn find(name: &str) -> Result<Option<Mapped>> {
    // Without the device mapper there is nothing mapped, nor under a name that it does not take.
    if !Path::new(CONTROL_PATH).exists() || mapped_name(name).len() > NAME_LEN_MAX {
        return Ok(None);
    }
    match Control::open()?.call(DEV_STATUS, name, 0, &[]) {
        Ok(answer) => Ok(Some(Mapped { path: path(name), number: answer.number() })),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes a mapped device down; at once, or as soon as nobody has it open. One that is not there is no error.
///
/// # Errors
/// [`ErrorKind::Busy`] when it is open and is not to be waited for.
pub fn close(name: &str, when_unused: bool) -> Result<()> {
    if find(name)?.is_none() {
        remove_link(name);
        return Ok(());
    }
    let flags = if when_unused { DEFERRED_REMOVE } else { 0 };
    match Control::open()?.call(DEV_REMOVE, name, flags, &[]) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if find(name)?.is_none() {
        remove_link(name);
    }
    Ok(())
}

/// What udev makes too, where it runs.
fn make_link(name: &str, number: DeviceNumber) -> Result<()> {
    let (link, target) = (path(name), format!("../dm-{}", number.minor));
    if link.read_link().is_ok_and(|old| old != Path::new(&target)) {
        remove_link(name);
    }
    match std::os::unix::fs::symlink(target, &link) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::path("make", &link, error)),
        _ => Ok(()),
    }
}

/// For a mapped device that is gone. What the link leads to may be there a little longer.
fn remove_link(name: &str) {
    let link = path(name);
    if link.is_symlink() {
        let _ = std::fs::remove_file(link);
    }
}

/// A `struct dm_target_spec` with its parameters, for a target from the first sector on.
fn target(sectors: u64, parameters: &str) -> Vec<u8> {
    let mut target = vec![0; TARGET_LEN];
    target[8..16].copy_from_slice(&sectors.to_ne_bytes());
    target[24..30].copy_from_slice(b"verity");
    target.extend_from_slice(parameters.as_bytes());
    target.push(0);
    target.resize(target.len().next_multiple_of(8), 0);
    let len = u32::try_from(target.len()).unwrap_or(u32::MAX);
    target[20..24].copy_from_slice(&len.to_ne_bytes());
    target
}

struct Control(File);

/// What was passed, as the kernel gave it back: a `struct dm_ioctl`, and more behind it.
struct Reply([u8; BUFFER_LEN]);

impl Reply {
    fn number(&self) -> DeviceNumber {
        self.device_at(40)
    }

    /// Of a `struct dm_target_deps`: whether the mapped device has a table, over this device and no other.
    fn is_over(&self, device: DeviceNumber) -> bool {
        self.0[HEADER_LEN..HEADER_LEN + 4] == 1_u32.to_ne_bytes() && self.device_at(HEADER_LEN + 8) == device
    }

    /// As the kernel's `huge_encode_dev` has it.
    fn device_at(&self, at: usize) -> DeviceNumber {
        let device = u64::from_ne_bytes(self.0[at..at + 8].try_into().unwrap_or_default());
        let minor = (device & 0xff) | ((device >> 12) & 0xf_ff00);
        let part = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        DeviceNumber { major: part((device >> 8) & 0xfff), minor: part(minor) }
    }
}

impl Control {
    fn open() -> Result<Self> {
        let opened = OpenOptions::new().read(true).write(true).open(CONTROL_PATH);
        opened.map(Self).map_err(|error| {
            let what = format!("open {CONTROL_PATH}: run `modprobe dm-verity`; it needs root");
            Error::caused(ErrorKind::Unsupported, what, error)
        })
    }

    /// One command about the mapped device over the device with this name.
    fn call(&self, command: c_ulong, name: &str, flags: u32, payload: &[u8]) -> Result<Reply> {
        let mapped = mapped_name(name);
        if mapped.len() > NAME_LEN_MAX || HEADER_LEN + payload.len() > BUFFER_LEN {
            return Err(Error::new(ErrorKind::Invalid, format!("{name} is too long a name for dm-verity")));
        }
        let mut buffer = [0_u8; BUFFER_LEN];
        let mut put = |at: usize, value: u32| buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "both are small constants")]
        let (buffer_len, header_len) = (BUFFER_LEN as u32, HEADER_LEN as u32);
        // Version 4.0.0 is what all kernels take.
        put(0, 4);
        put(12, buffer_len);
        put(16, header_len);
        put(20, u32::from(!payload.is_empty()));
        put(28, flags);
        buffer[48..48 + mapped.len()].copy_from_slice(mapped.as_bytes());
        buffer[HEADER_LEN..HEADER_LEN + payload.len()].copy_from_slice(payload);
        // _IOWR(0xfd, command, struct dm_ioctl)
        let request = 3 << 30 | (HEADER_LEN as c_ulong) << 16 | 0xfd << 8 | command;
        // SAFETY: the kernel reads and writes as many bytes as `data_size` says: those of the buffer.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), request, buffer.as_mut_ptr()) } == 0 {
            return Ok(Reply(buffer));
        }
        let error = io::Error::last_os_error();
        let kind = match error.raw_os_error() {
            Some(libc::ENXIO) => ErrorKind::NotFound,
            Some(libc::EBUSY) => ErrorKind::Busy,
            Some(libc::EPERM | libc::EACCES) => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Err(Error::caused(kind, format!("mapped device {mapped}"), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_laid_out_as_the_kernel_has_it() {
        let table = VerityTable { root: "aa".to_owned(), salt: "bb".to_owned(), data_blocks: 300 };
        let parameters = table.parameters(Path::new("/dev/ublkb0"));
        assert_eq!(parameters, "1 /dev/ublkb0 /dev/ublkb0 4096 4096 300 300 sha256 aa bb");
        let target = target(2400, &parameters);
        assert_eq!(target.len() % 8, 0);
        assert_eq!(target[20..24], u32::try_from(target.len()).unwrap().to_ne_bytes());
        assert_eq!(target[TARGET_LEN..TARGET_LEN + parameters.len()], *parameters.as_bytes());
        assert_eq!(target[TARGET_LEN + parameters.len()], 0);
    }

    #[test]
    fn what_a_mapped_device_is_and_is_over() {
        let mut reply = Reply([0; BUFFER_LEN]);
        let encoded = |major: u64, minor: u64| ((minor & 0xff) | major << 8 | (minor & !0xff) << 12).to_ne_bytes();
        reply.0[40..48].copy_from_slice(&encoded(253, 300));
        assert_eq!(reply.number(), DeviceNumber { major: 253, minor: 300 });
        let below = DeviceNumber { major: 259, minor: 7 };
        reply.0[HEADER_LEN + 8..HEADER_LEN + 16].copy_from_slice(&encoded(259, 7));
        assert!(!reply.is_over(below), "no table");
        reply.0[HEADER_LEN..HEADER_LEN + 4].copy_from_slice(&1_u32.to_ne_bytes());
        assert!(reply.is_over(below));
        assert!(!reply.is_over(DeviceNumber { minor: 8, ..below }));
    }
}
