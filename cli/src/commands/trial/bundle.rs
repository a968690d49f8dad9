//! The bundle of a run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ublkimg_driver::error::Error;

use super::cleanup::Container;

/// A bundle directory whose `rootfs` holds the image.
pub(in crate::commands) struct Bundle {
    directory: PathBuf,
    state: PathBuf,
}

impl Bundle {
    /// `directory/rootfs` is to be the tree; `state` is where runc keeps its own.
    pub(in crate::commands) fn new(directory: &Path, state: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory.join("rootfs"))?;
        Ok(Self { directory: directory.to_owned(), state: state.to_owned() })
    }

    pub(in crate::commands) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(in crate::commands) fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// Runs it. What it prints goes to our stderr: stdout is for results.
    pub(in crate::commands) fn run(&self, id: &str) -> anyhow::Result<Container> {
        use std::os::fd::AsFd;
        use std::os::unix::process::CommandExt;
        let stderr = std::io::stderr();
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(&self.state).arg("run").arg("--bundle").arg(&self.directory).arg(id);
        // In a process group of its own: an interrupt is ours to handle.
        runc.stdin(Stdio::null()).stdout(stderr.as_fd().try_clone_to_owned()?).process_group(0);
        let child = runc.spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::caused(ublkimg_driver::error::ErrorKind::Unsupported, "cannot run runc: install it", error)
            }
            _ => Error::io("cannot run runc", error),
        })?;
        Ok(Container::new(child, self.state.clone(), id.to_owned()))
    }
}
