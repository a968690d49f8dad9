//! A host that has nothing of any image: an empty store with a daemon of its own, and all of it gone with the value.

use std::path::{Path, PathBuf};

use ublkimg_driver::daemon::protocol::Request;
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::Error;
use ublkimg_driver::mounts;

use super::super::daemon;
use crate::args::Global;

/// A directory of our own with all below.
pub(super) struct Tree(PathBuf);

impl Tree {
    pub(super) fn create(path: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&path)
            .map_err(|error| Error::io(format!("cannot create {}", path.display()), error))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // What is mounted there is not ours to delete.
        let is_free = |all: Vec<mounts::Mount>| !all.iter().any(|mount| mount.mount_point.starts_with(&self.0));
        let removed = match mounts::list().is_ok_and(is_free) {
            true => std::fs::remove_dir_all(&self.0),
            false => Err(std::io::ErrorKind::ResourceBusy.into()),
        };
        if let Err(error) = removed {
            eprintln!("ublkimg: cannot remove {}: {error}", self.0.display());
        }
    }
}

/// A daemon of our own.
struct Daemon(Directories);

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = daemon::stop(&self.0, false) {
            eprintln!("ublkimg: a daemon did not end: {error:#}");
        }
    }
}

/// See the module. The daemon ends before its directories go.
pub(super) struct Host {
    pub(super) global: Global,
    pub(super) directories: Directories,
    _daemon: Daemon,
    _trees: [Tree; 2],
}

impl Host {
    /// With a daemon that runs, as on a host that has had others before.
    pub(super) fn new(global: &Global, store: PathBuf, run: PathBuf) -> anyhow::Result<Self> {
        let trees = [Tree::create(store.clone())?, Tree::create(run.clone())?];
        let global = Global { root: store.clone(), run_dir: run.clone(), ..global.clone() };
        let directories = Directories { root: store, run };
        let ended = Daemon(directories.clone());
        let executable = std::env::current_exe()?;
        let command = || daemon::background(&executable, &global, &directories);
        client::ask_or_start(&directories, command, &Request::Ping, client::ANSWER_MARGIN)?;
        Ok(Self { global, directories, _daemon: ended, _trees: trees })
    }
}
