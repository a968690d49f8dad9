//! What a start leaves on the machine while it runs, each a value whose end takes it away again, also after an error.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A mount; gone with the value.
#[derive(Debug)]
pub struct Mount {
    target: PathBuf,
}

impl Mount {
    /// An empty file system in memory, at most `size_mb` MiB.
    ///
    /// # Errors
    ///
    /// Not root.
    pub fn tmpfs(target: &Path, size_mb: u32) -> Result<Self> {
        Self::new("tmpfs", target, "tmpfs", &format!("size={size_mb}m,mode=755"))
    }

    /// A writable view of the read-only `lower` directories, the topmost first; what is written lies below `scratch`.
    ///
    /// # Errors
    ///
    /// Not root, or `scratch` lies where overlayfs cannot write.
    pub fn overlay(target: &Path, lower: &[&Path], scratch: &Path) -> Result<Self> {
        let upper = scratch.join("upper");
        let work = scratch.join("work");
        std::fs::create_dir_all(&upper)?;
        std::fs::create_dir_all(&work)?;
        let lower: Vec<_> = lower.iter().map(|path| path.display().to_string()).collect();
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), upper.display(), work.display());
        Self::new("overlay", target, "overlay", &options)
    }

    /// The file system in a file, over a loop device that goes with it.
    ///
    /// # Errors
    ///
    /// Not root, no loop devices, or no file system of that kind.
    pub fn loop_device(file: &Path, target: &Path, kind: &str, options: &str) -> Result<Self> {
        std::fs::create_dir_all(target)?;
        let mut mount = Command::new("mount");
        mount.args(["-t", kind, "-o", &format!("loop,{options}")]).arg(file).arg(target);
        let status = mount.status().context("cannot run mount")?;
        ensure!(status.success(), "mounting {} ended with {status}", file.display());
        Ok(Self { target: target.to_owned() })
    }

    fn new(source: &str, target: &Path, kind: &str, options: &str) -> Result<Self> {
        std::fs::create_dir_all(target)?;
        let data = CString::new(options)?;
        mount(source, target, kind, MountFlags::empty(), Some(data.as_c_str()))
            .with_context(|| format!("cannot mount {kind} on {} with {options}", target.display()))?;
        Ok(Self { target: target.to_owned() })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.target, UnmountFlags::empty()) {
            eprintln!("cannot unmount {}: {error}", self.target.display());
            // Better out of sight than in the way of the next run.
            let _ = unmount(&self.target, UnmountFlags::DETACH);
        }
    }
}

/// A command to run at the end, such as the deletion of a container.
#[derive(Debug)]
pub struct Finally {
    command: Command,
    must_succeed: bool,
}

impl Finally {
    /// Runs `command` when the value goes; a failure is reported.
    pub fn run(command: Command) -> Self {
        Self { command, must_succeed: true }
    }

    /// Runs `command` when the value goes; it may well have nothing left to do.
    pub fn attempt(command: Command) -> Self {
        Self { command, must_succeed: false }
    }
}

impl Drop for Finally {
    fn drop(&mut self) {
        let outcome = self.command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output();
        match outcome {
            Ok(output) if output.status.success() || !self.must_succeed => {}
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                eprintln!("{:?} ended with {}: {}", self.command, output.status, said.trim_end());
            }
            Err(error) => eprintln!("cannot run {:?}: {error}", self.command),
        }
    }
}
