//! What a run leaves on the host while it lasts, each a value whose end takes it away, also after an error.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::mount::UnmountFlags;
use ublkimg_driver::daemon::protocol::Request;
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::Error;

use super::super::mount_helper;
use crate::overlay;

/// Unmounting a read-only file system flushes nothing: more time means that something hangs.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(10);

/// A directory of our own.
pub(in crate::commands) struct Directory(PathBuf);

impl Directory {
    pub(in crate::commands) fn create(path: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&path)
            .map_err(|error| Error::io(format!("cannot create {}", path.display()), error))?;
        Ok(Self(path))
    }

    pub(in crate::commands) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Never what is below: should a mount be left there, its files are not ours.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A mount.
pub(in crate::commands) struct Mount(PathBuf);

impl Mount {
    pub(in crate::commands) fn new(kind: &str, target: &Path, options: &str) -> anyhow::Result<Self> {
        overlay::mount(kind, target, options)?;
        Ok(Self(target.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if rustix::mount::unmount(&self.0, UnmountFlags::empty()).is_err() {
            // Somebody still looks at it: out of the tree at once, gone when they let go.
            let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
        }
    }
}

/// A device of ours, mounted or not.
pub(in crate::commands) struct Device<'a> {
    pub(in crate::commands) directories: &'a Directories,
    pub(in crate::commands) name: String,
    pub(in crate::commands) mount: PathBuf,
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        let unmounted = mount_helper::unmount(&self.mount, false, UNMOUNT_TIMEOUT)
            .or_else(|_| mount_helper::unmount(&self.mount, true, UNMOUNT_TIMEOUT));
        let request = Request::Remove { name: self.name.clone(), force: true };
        let removed = client::ask(self.directories, &request, client::ANSWER_MARGIN);
        if let Err(error) = unmounted.and_then(|()| Ok(removed.map(drop)?)) {
            eprintln!("ublkimg: cannot remove {}: {error:#}", self.name);
        }
    }
}

/// A container with the `runc` that runs it.
pub(in crate::commands) struct Container {
    child: Child,
    state: PathBuf,
    id: String,
}

impl Container {
    pub(super) fn new(child: Child, state: PathBuf, id: String) -> Self {
        Self { child, state, id }
    }

    pub(super) fn child(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // What has ended already refuses; what has not must end.
        for arguments in [["kill", self.id.as_str(), "KILL"], ["delete", "--force", self.id.as_str()]] {
            let mut runc = Command::new("runc");
            runc.arg("--root").arg(&self.state).args(arguments);
            let _ = runc.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
