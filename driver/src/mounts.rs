//! Mounts: who has a device mounted, in every mount namespace, and mounting and unmounting EROFS.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Number of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceNumber {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// One line of a `mountinfo` (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Unique while the mount lives.
    pub id: u32,
    /// The mount it lies on.
    pub parent_id: u32,
    /// Device of its files.
    pub device: DeviceNumber,
    /// Which directory of the file system is mounted.
    pub root: PathBuf,
    /// Where, as the process sees it.
    pub mount_point: PathBuf,
    /// Type of the file system.
    pub fs_type: String,
    /// What was mounted, as the file system tells it.
    pub source: PathBuf,
    /// Options of the file system itself.
    pub super_options: String,
}

/// A mount namespace in which a device is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Inode of the namespace.
    pub namespace: u64,
    /// One process in it, the lowest id.
    pub pid: u32,
    /// Where, as that process sees it.
    pub mount_points: Vec<PathBuf>,
}

/// The number of a block device node.
///
/// # Errors
/// [`ErrorKind::Invalid`] when it is not a block device.
pub fn device_number(node: &Path) -> Result<DeviceNumber> {
    Err(Error::new(ErrorKind::Unsupported, format!("{}: not written yet", node.display())))
}

/// The mounts that this process sees, in the order of the kernel: a later one covers an earlier one at the same place.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn list() -> Result<Vec<Mount>> {
    Err(Error::new(ErrorKind::Unsupported, "not written yet"))
}

/// Every mount namespace that has a process and in which the device is mounted.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn holders(device: DeviceNumber) -> Result<Vec<Holder>> {
    Err(Error::new(ErrorKind::Unsupported, format!("{device:?}: not written yet")))
}

/// Mounts an EROFS read-only. Reads the superblock through the device: run it in a process that may be killed, never in
/// the server.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the kernel has no EROFS (the text says what to do); [`ErrorKind::NotFound`].
pub fn mount_erofs(device: &Path, directory: &Path) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, format!("{} {}: not written yet", device.display(), directory.display())))
}

/// Unmounts the topmost mount at a directory.
///
/// # Errors
/// [`ErrorKind::Busy`] while files are open there; [`ErrorKind::Invalid`] when nothing is mounted there.
pub fn unmount(directory: &Path) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, format!("{}: not written yet", directory.display())))
}

/// Takes the topmost mount at a directory out of the tree at once; it ends when its last file is closed.
///
/// # Errors
/// [`ErrorKind::Invalid`] when nothing is mounted there.
pub fn detach(directory: &Path) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, format!("{}: not written yet", directory.display())))
}
