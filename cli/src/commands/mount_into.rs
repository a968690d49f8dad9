//! `ublkimg mount-into`: a mount of this namespace, put into a container that is being made.
//!
//! A process of its own: it changes its mount namespace, which only a process with one thread can, and never comes back.
//! Links in the container's tree lead nowhere out of it, and a directory is only ever made below its root.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use ublkimg_driver::error::{Error, ErrorKind};

use crate::args::hook::MountInto;

pub(super) fn run(command: &MountInto) -> anyhow::Result<()> {
    let failed = |what: String| move |errno: Errno| Error::io(what, std::io::Error::from(errno));
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let source = rustix::mount::open_tree(CWD, &command.source, clone)
        .map_err(failed(format!("cannot take the mount {}", command.source.display())))?;
    if let Some(pid) = command.pid {
        let path = format!("/proc/{pid}/ns/mnt");
        let namespace = File::open(&path).map_err(|error| Error::path("open", Path::new(&path), error))?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(failed(format!("cannot enter the mount namespace of process {pid}")))?;
    }
    crate::bundle::make_directory(&command.root, &command.path)?;
    let target = open_in(&command.root, &command.path)
        .map_err(failed(format!("cannot open {} in the container", command.path)))?;
    // Runtimes that are told of several phases call each of them.
    if is_same_root(&source, &target)? {
        return Ok(());
    }
    let place = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&source, "", &target, "", place).map_err(|errno| {
        let kind = if errno == Errno::NOSYS { ErrorKind::Unsupported } else { ErrorKind::Io };
        let what = format!("cannot mount {} at {} in the container", command.source.display(), command.path);
        Error::caused(kind, what, std::io::Error::from(errno)).into()
    })
}

/// A directory of the container, whose links lead nowhere out of its root.
fn open_in(root: &Path, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    rustix::fs::openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
}

/// Whether something is mounted at a path of the container.
///
/// # Errors
/// When that cannot be seen.
pub(super) fn is_mount(root: &Path, path: &str) -> anyhow::Result<bool> {
    let looked = open_in(root, path)
        .and_then(|directory| rustix::fs::statx(&directory, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS));
    match looked {
        Ok(about) => Ok(about.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => {
            Err(Error::io(format!("cannot look at {path} in the container"), std::io::Error::from(errno)).into())
        }
    }
}

/// Whether the directory shows the root of that mount already.
fn is_same_root(source: impl AsFd, directory: impl AsFd) -> anyhow::Result<bool> {
    let failed = |errno| Error::io("cannot look at a mount", std::io::Error::from(errno));
    let [source, directory] = [rustix::fs::fstat(source), rustix::fs::fstat(directory)];
    let (source, directory) = (source.map_err(failed)?, directory.map_err(failed)?);
    Ok((source.st_dev, source.st_ino) == (directory.st_dev, directory.st_ino))
}
