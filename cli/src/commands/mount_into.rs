//! `ublkimg mount-into`: a mount of this namespace, put into a container that is being made.
//!
//! A process of its own: it changes its mount namespace, which only a process with one thread can, and never comes back.
//! Links in the container's tree lead nowhere out of it, and a directory is only ever made below its root.

use std::fs::File;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
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
        use std::os::fd::AsFd;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(failed(format!("cannot enter the mount namespace of process {pid}")))?;
    }
    crate::bundle::make_directory(&command.root, &command.path)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, &command.root, flags, Mode::empty())
        .map_err(failed(format!("cannot open {}", command.root.display())))?;
    let target = rustix::fs::openat2(&root, &command.path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .map_err(failed(format!("cannot open {} in the container", command.path)))?;
    let place = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&source, "", &target, "", place).map_err(|errno| {
        let kind = if errno == Errno::NOSYS { ErrorKind::Unsupported } else { ErrorKind::Io };
        let what = format!("cannot mount {} at {} in the container", command.source.display(), command.path);
        Error::caused(kind, what, std::io::Error::from(errno)).into()
    })
}
