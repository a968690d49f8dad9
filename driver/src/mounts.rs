//! Mounts: who has a device mounted, in every mount namespace, and mounting and unmounting EROFS.
//!
//! What is mounted is read from `/proc/PID/mountinfo` (proc_pid_mountinfo(5)), one process for each mount namespace. A
//! device is known by its number: names and paths differ between namespaces. The mount tables of other processes are
//! theirs to fill, so everything here is bounded and a line that cannot be parsed is skipped.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::error::{Error, ErrorKind, Result};

/// Longest mount table that is read; the kernel allows 100 000 mounts a namespace (`fs.mount-max`), about 200 bytes each.
const MOUNTINFO_LEN_MAX: u64 = 32 << 20;

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
    /// Peer group to which it belongs, if it is shared.
    pub shared: Option<u32>,
    /// Peer group from which it receives, if it is a slave.
    pub master: Option<u32>,
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
/// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] when it is not a block device.
pub fn device_number(node: &Path) -> Result<DeviceNumber> {
    let metadata = node.metadata().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::caused(ErrorKind::NotFound, node.display().to_string(), error),
        _ => Error::path("look at", node, error),
    })?;
    if !metadata.file_type().is_block_device() {
        return Err(Error::new(ErrorKind::Invalid, format!("{} is not a block device", node.display())));
    }
    let number = metadata.rdev();
    Ok(DeviceNumber { major: rustix::fs::major(number), minor: rustix::fs::minor(number) })
}

/// The mounts that this process sees, in the order of the kernel: a later one covers an earlier one at the same place.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn list() -> Result<Vec<Mount>> {
    let path = Path::new("/proc/self/mountinfo");
    read_table(path).map_err(|error| Error::path("read", path, error))
}

/// The topmost mount at a directory, in the namespace of this process; none when nothing is mounted exactly there.
///
/// # Errors
/// When `/proc` or the directory cannot be read. A directory on a device that does not answer can block.
pub fn at(directory: &Path) -> Result<Option<Mount>> {
    let real = directory.canonicalize().map_err(|error| Error::path("find", directory, error))?;
    Ok(list()?.into_iter().rfind(|mount| mount.mount_point == real))
}

/// Every mount namespace that has a process and in which the device is mounted, by pid. Namespaces that are kept alive by
/// a file only (`ip netns` style) cannot be seen; a device mounted there stays busy.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn holders(device: DeviceNumber) -> Result<Vec<Holder>> {
    let mut holders = Vec::new();
    for (pid, namespace, mounts) in tables()? {
        let mount_points: Vec<_> =
            mounts.into_iter().filter(|mount| mount.device == device).map(|mount| mount.mount_point).collect();
        if !mount_points.is_empty() {
            holders.push(Holder { namespace, pid, mount_points });
        }
    }
    Ok(holders)
}

/// Mounts an EROFS read-only. Reads the superblock through the device: run it in a process that may be killed, never in
/// the server.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the kernel has no EROFS (the text says what to do); [`ErrorKind::NotFound`];
/// [`ErrorKind::Corrupt`] when the device holds no EROFS.
pub fn mount_erofs(device: &Path, directory: &Path) -> Result<()> {
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    rustix::mount::mount(device, directory, c"erofs", flags, None).map_err(|errno| {
        let (kind, hint) = match errno {
            Errno::NODEV => (ErrorKind::Unsupported, ": the kernel has no EROFS, run `modprobe erofs`"),
            Errno::PERM | Errno::ACCESS => (ErrorKind::Unsupported, ": mounting needs root (CAP_SYS_ADMIN)"),
            Errno::NOENT | Errno::NOTDIR => (ErrorKind::NotFound, ": no such device or directory"),
            Errno::BUSY => (ErrorKind::Busy, ": the device is mounted there already, or in use otherwise"),
            Errno::INVAL | Errno::UCLEAN => (ErrorKind::Corrupt, ": not an EROFS that this kernel reads, see `dmesg`"),
            _ => (ErrorKind::Io, ""),
        };
        let what = format!("mount {} on {}{hint}", device.display(), directory.display());
        Error::caused(kind, what, io::Error::from(errno))
    })
}

/// Has the kernel read the first `len_bytes` of a device into its page cache, where EROFS finds its metadata: directories
/// and inodes are then read without a request of 4 KiB each. Blocks while the device does: never to be called by the
/// server.
///
/// # Errors
/// When the device cannot be opened, or the kernel refuses the advice.
pub fn warm(device: &Path, len_bytes: u64) -> Result<()> {
    let file = File::open(device).map_err(|error| Error::path("open", device, error))?;
    let mut offset_bytes = 0;
    while let Some(left_bytes) = std::num::NonZeroU64::new(len_bytes.saturating_sub(offset_bytes)) {
        let step = left_bytes.min(WARM_STEP_BYTES);
        rustix::fs::fadvise(&file, offset_bytes, Some(step), rustix::fs::Advice::WillNeed)
            .map_err(|errno| Error::path("read ahead on", device, errno.into()))?;
        offset_bytes += step.get();
    }
    Ok(())
}

/// The kernel takes up to one request of the device for each advice and drops the rest: this is what every device takes.
const WARM_STEP_BYTES: std::num::NonZeroU64 = std::num::NonZeroU64::new(128 << 10).expect("not zero");

/// Unmounts the topmost mount at a directory.
///
/// # Errors
/// [`ErrorKind::Busy`] while files are open there; [`ErrorKind::Invalid`] when nothing is mounted there.
pub fn unmount(directory: &Path) -> Result<()> {
    unmount_with(directory, UnmountFlags::NOFOLLOW)
}

/// Takes the topmost mount at a directory out of the tree at once; it ends when its last file is closed.
///
/// # Errors
/// [`ErrorKind::Invalid`] when nothing is mounted there.
pub fn detach(directory: &Path) -> Result<()> {
    unmount_with(directory, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
}

fn unmount_with(directory: &Path, flags: UnmountFlags) -> Result<()> {
    rustix::mount::unmount(directory, flags).map_err(|errno| {
        let (kind, hint) = match errno {
            Errno::BUSY => (ErrorKind::Busy, ": files in it are open, or something is mounted in it"),
            Errno::INVAL => (ErrorKind::Invalid, ": nothing is mounted there"),
            Errno::NOENT => (ErrorKind::NotFound, ": no such directory"),
            Errno::PERM => (ErrorKind::Unsupported, ": unmounting needs root (CAP_SYS_ADMIN)"),
            _ => (ErrorKind::Io, ""),
        };
        Error::caused(kind, format!("unmount {}{hint}", directory.display()), io::Error::from(errno))
    })
}

/// The mount table of each mount namespace, with a process in it, the lowest id, and the namespace's inode.
pub(crate) fn tables() -> Result<impl Iterator<Item = (u32, u64, Vec<Mount>)>> {
    Ok(namespaces()?.into_iter().filter_map(|(pid, namespace)| {
        // The process may have ended: then another one speaks for the namespace next time, or nobody is left in it.
        let mounts = read_table(&PathBuf::from(format!("/proc/{pid}/mountinfo"))).ok()?;
        Some((pid, namespace, mounts))
    }))
}

/// One process, the lowest id, of each mount namespace.
fn namespaces() -> Result<BTreeMap<u32, u64>> {
    let proc = Path::new("/proc");
    let mut pids: Vec<u32> = Vec::new();
    for entry in proc.read_dir().map_err(|error| Error::path("read", proc, error))? {
        let name = entry.map_err(|error| Error::path("read", proc, error))?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    pids.sort_unstable();
    let mut first = BTreeMap::new();
    for pid in pids {
        // Gone, or somebody else's and we are not root.
        let Ok(metadata) = std::fs::metadata(format!("/proc/{pid}/ns/mnt")) else { continue };
        first.entry(metadata.ino()).or_insert(pid);
    }
    Ok(first.into_iter().map(|(namespace, pid)| (pid, namespace)).collect())
}

fn read_table(path: &Path) -> io::Result<Vec<Mount>> {
    let mut table = Vec::new();
    File::open(path)?.take(MOUNTINFO_LEN_MAX).read_to_end(&mut table)?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`, with any number of fields before
/// the dash.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = text(fields.next()?)?.parse().ok()?;
    let parent_id = text(fields.next()?)?.parse().ok()?;
    let (major, minor) = text(fields.next()?)?.split_once(':')?;
    let device = DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let root = unescape(fields.next()?);
    let mount_point = unescape(fields.next()?);
    let (mut shared, mut master) = (None, None);
    // Behind the options of the mount.
    for field in fields.by_ref().skip(1) {
        match text(field)?.split_once(':') {
            Some(("shared", group)) => shared = Some(group.parse().ok()?),
            Some(("master", group)) => master = Some(group.parse().ok()?),
            _ if field == b"-" => break,
            _ => {}
        }
    }
    let fs_type = text(fields.next()?)?.to_owned();
    let source = unescape(fields.next()?);
    let super_options = String::from_utf8_lossy(fields.next().unwrap_or_default()).into_owned();
    Some(Mount { id, parent_id, device, root, mount_point, shared, master, fs_type, source, super_options })
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

/// Space, tab, newline and backslash are written as `\040`, `\011`, `\012`, `\134`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        if let [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] = rest {
            bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_everything() {
        let line =
            br"36 35 259:3 /a\040b /mnt/c\134d rw,noatime shared:7 master:1 propagate_from:2 - erofs /dev/ublkb0 ro,user_xattr";
        let mount = parse_line(line).unwrap();
        assert_eq!((mount.id, mount.parent_id), (36, 35));
        assert_eq!(mount.device, DeviceNumber { major: 259, minor: 3 });
        assert_eq!(mount.root, Path::new("/a b"));
        assert_eq!(mount.mount_point, Path::new(r"/mnt/c\d"));
        assert_eq!((mount.shared, mount.master), (Some(7), Some(1)));
        assert_eq!(mount.fs_type, "erofs");
        assert_eq!(mount.source, Path::new("/dev/ublkb0"));
        assert_eq!(mount.super_options, "ro,user_xattr");
    }

    #[test]
    fn lines_that_are_none() {
        for line in
            [&b""[..], b"36", b"36 35 98 / / rw - ext3 /dev/root rw", b"36 35 98:0 / / rw master:1 ext3 /dev/root rw"]
        {
            assert_eq!(parse_line(line), None, "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn an_escape_that_is_cut_off_is_text() {
        assert_eq!(unescape(br"a\04"), Path::new(r"a\04"));
        assert_eq!(unescape(br"\"), Path::new(r"\"));
    }

    #[test]
    fn this_process_has_a_root_and_holds_its_device() {
        let root = list().unwrap().into_iter().rfind(|mount| mount.mount_point == Path::new("/")).unwrap();
        assert!(holders(root.device).unwrap().iter().any(|holder| holder.mount_points.contains(&PathBuf::from("/"))));
    }

    #[test]
    fn what_is_mounted_at_a_directory() {
        assert_eq!(at(Path::new("/proc/")).unwrap().unwrap().fs_type, "proc");
        assert_eq!(at(Path::new("/proc/self/task")).unwrap(), None);
    }

    #[test]
    fn errors_name_the_thing() {
        let missing = Path::new("/does/not/exist");
        assert_eq!(device_number(missing).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(device_number(Path::new("/")).unwrap_err().kind(), ErrorKind::Invalid);
        assert!(unmount(missing).unwrap_err().to_string().contains("/does/not/exist"));
    }
}
