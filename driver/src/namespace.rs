//! The server's own mount namespace, in which no image is mounted.
//!
//! When the last process of a mount namespace ends, it unmounts everything in it, and unmounting a file system may read
//! its device. A ublk server that is that process and has such a mount would wait for itself: an unkillable hang. So the
//! server moves to a namespace of its own, lets mounts neither in nor out, and takes out of it every mount of a ublk
//! device, whoever made it: another server may be dead as well. An overlay keeps the mounts of its layers alive, unseen; so
//! overlays go too, except those that the server itself stands on. So does every other EROFS: an image of the FUSE
//! transport lies on a loop device, which a copy of the mount here would keep after its users have unmounted it.

#![expect(unsafe_code, reason = "unshare")]

use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

use crate::error::{Error, ErrorKind, Result};
use crate::mounts::{self, DeviceNumber, Mount};

/// Moves the process, which must have one thread, into a mount namespace of its own and detaches there every mount that
/// could keep a ublk device busy. `keep` are the paths that the process goes on using (store, run directory); they must
/// exist. Returns where mounts were detached.
///
/// # Errors
/// [`ErrorKind::Io`] without CAP_SYS_ADMIN; [`ErrorKind::Invalid`] with more than one thread; [`ErrorKind::Busy`] when the
/// process itself stands on a ublk device, or when mounts keep appearing.
pub fn enter_private(keep: &[&Path]) -> Result<Vec<PathBuf>> {
    let threads = Path::new("/proc/self/task");
    if threads.read_dir().map_err(|error| Error::path("read", threads, error))?.count() != 1 {
        return Err(Error::new(ErrorKind::Invalid, "a mount namespace is entered before threads are started"));
    }
    // SAFETY: file descriptors stay shared (no CLONE_FILES), and there is one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(|error| Error::io("a mount namespace of our own (needs root)", error.into()))?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|error| Error::io("make the mount namespace private", error.into()))?;
    detach_all(keep)
}

/// Detaches one mount after the other until none is left to detach.
fn detach_all(keep: &[&Path]) -> Result<Vec<PathBuf>> {
    let mut detached = Vec::new();
    // The namespace is private, so mounts only go: there are not more rounds than mounts.
    let rounds_max = mounts::list()?.len() + 1;
    for _ in 0..rounds_max {
        let mounts = mounts::list()?;
        let kept = mounts_under(&mounts, keep)?;
        let devices = ublk_devices();
        let Some(mut doomed) = mounts
            .iter()
            .find(|mount| devices.contains(&mount.device) || (holds_images(mount) && !kept.contains(&mount.id)))
        else {
            return Ok(detached);
        };
        // Unmounting goes by path, so what hides the place goes first; and what hides that, not more often than there are
        // mounts.
        for _ in 0..mounts.len() {
            match hiding(&mounts, doomed) {
                Some(hiding) => doomed = hiding,
                None => break,
            }
        }
        if kept.contains(&doomed.id) {
            let what =
                format!("the server needs {}, which lies on or over a ublk device", doomed.mount_point.display());
            return Err(Error::new(ErrorKind::Busy, what));
        }
        mounts::detach(&doomed.mount_point)?;
        detached.push(doomed.mount_point.clone());
    }
    Err(Error::new(ErrorKind::Busy, format!("mounts of ublk devices remain after {rounds_max} rounds")))
}

/// A mount that stands between a mount and its path: mounted at the same place on it or on one that it lies on, or beside
/// one of these on a directory above.
fn hiding<'a>(mounts: &'a [Mount], mount: &Mount) -> Option<&'a Mount> {
    let (mut below, mut current) = (None, mount);
    // A chain of parents is not longer than the table; the bound is for tables that change while they are read.
    for _ in 0..=mounts.len() {
        let hides = |other: &&Mount| {
            let on_it = other.parent_id == current.id && other.mount_point == current.mount_point;
            let beside = other.parent_id == current.parent_id && current.mount_point.starts_with(&other.mount_point);
            // The root of an initramfs is its own parent.
            let other_chain = other.id != current.id && other.id != current.parent_id && Some(other.id) != below;
            other_chain && (on_it || beside)
        };
        if let Some(found) = mounts.iter().find(hides) {
            return Some(found);
        }
        below = Some(current.id);
        current = mounts.iter().find(|other| other.id == current.parent_id && other.id != current.id)?;
    }
    None
}

/// The mounts that hold `/` and the paths, and those that these lie on.
fn mounts_under(mounts: &[Mount], keep: &[&Path]) -> Result<Vec<u32>> {
    let mut kept = Vec::new();
    for path in keep.iter().copied().chain([Path::new("/")]) {
        let real = fs::canonicalize(path).map_err(|error| Error::path("find", path, error))?;
        let mut next = real
            .ancestors()
            .find_map(|ancestor| mounts.iter().rfind(|mount| mount.mount_point == ancestor))
            .map(|mount| mount.id);
        while let Some(mount) = next.and_then(|id| mounts.iter().find(|mount| mount.id == id)) {
            if kept.contains(&mount.id) {
                break;
            }
            kept.push(mount.id);
            next = Some(mount.parent_id);
        }
    }
    Ok(kept)
}

/// Whether it may be an image, or keep one busy.
fn holds_images(mount: &Mount) -> bool {
    matches!(mount.fs_type.as_str(), "overlay" | "erofs")
}

/// Numbers of all ublk block devices and their partitions.
fn ublk_devices() -> Vec<DeviceNumber> {
    let Ok(entries) = fs::read_dir("/sys/class/block") else { return Vec::new() };
    let mut devices = Vec::new();
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with("ublkb") {
            continue;
        }
        let number = fs::read_to_string(entry.path().join("dev")).unwrap_or_default();
        let Some((major, minor)) = number.trim().split_once(':') else { continue };
        if let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) {
            devices.push(DeviceNumber { major, minor });
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(id: u32, parent_id: u32, place: &str) -> Mount {
        Mount {
            id,
            parent_id,
            device: DeviceNumber { major: 0, minor: id },
            root: "/".into(),
            mount_point: place.into(),
            shared: None,
            master: None,
            fs_type: "overlay".into(),
            source: "overlay".into(),
            super_options: String::new(),
        }
    }

    #[test]
    fn what_the_server_stands_on_is_kept() {
        let mounts = [
            mount(1, 0, "/"),
            mount(2, 1, "/proc"),
            mount(3, 1, "/other"),
            mount(4, 2, "/proc/self"),
            mount(5, 1, "/"),
        ];
        let mut kept = mounts_under(&mounts, &[Path::new("/proc")]).unwrap();
        kept.sort_unstable();
        assert_eq!(kept, [1, 2, 5]);
    }

    #[test]
    fn what_hides_a_mount() {
        let mounts = [mount(1, 0, "/"), mount(2, 1, "/a"), mount(3, 2, "/a"), mount(4, 2, "/a/b"), mount(5, 3, "/a/b")];
        let hiding_id = |index: usize| hiding(&mounts, &mounts[index]).map(|mount: &Mount| mount.id);
        assert_eq!(hiding_id(0), None);
        assert_eq!(hiding_id(1), Some(3), "something is mounted on it");
        assert_eq!(hiding_id(2), None);
        assert_eq!(hiding_id(3), Some(3), "its parent is covered");
        assert_eq!(hiding_id(4), None);
        let beside = [mount(1, 0, "/"), mount(2, 1, "/a/b"), mount(3, 1, "/a")];
        assert_eq!(hiding(&beside, &beside[1]).map(|mount| mount.id), Some(3), "a directory above is covered");
        let initramfs = [mount(1, 1, "/"), mount(2, 1, "/tmp"), mount(3, 2, "/tmp/a")];
        assert!(initramfs.iter().all(|mount| hiding(&initramfs, mount).is_none()));
    }
}
