//! The way of ublkimg: attach the image as a block device, mount it, start at once.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::cleanup::Finally;

/// The program, with a store and a daemon of its own.
#[derive(Debug, Clone)]
pub struct Ublkimg {
    /// The binary.
    pub program: PathBuf,
    /// `--root`: the store.
    pub root: PathBuf,
    /// `--run-dir`: sockets and state.
    pub run_dir: PathBuf,
}

/// An attached and mounted image; detached with the value, and the daemon after it.
#[derive(Debug)]
pub struct Attached {
    /// The block device, `/dev/ublkb0` or a loop device.
    pub device: String,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    // in this order
    _detach: Finally,
    _stop_daemon: Finally,
}

impl Ublkimg {
    /// `ublkimg convert`.
    ///
    /// # Errors
    ///
    /// As [`Ublkimg::call`].
    pub fn convert(&self, source: &str, destination: &str) -> Result<()> {
        let tmpdir = self.run_dir.join("tmp");
        std::fs::create_dir_all(&tmpdir)?;
        let tmpdir = tmpdir.to_str().context("a path that is not UTF-8")?;
        self.call(&["convert", "--tmpdir", tmpdir, source, destination]).map(|_stdout| ())
    }

    /// `ublkimg add --mount` with more options.
    ///
    /// # Errors
    ///
    /// As [`Ublkimg::call`].
    pub fn add(&self, reference: &str, name: &str, mount_point: &Path, options: &[&str]) -> Result<Attached> {
        std::fs::create_dir_all(mount_point)?;
        let mut stop = self.command();
        stop.args(["daemon", "--stop"]);
        let stop_daemon = Finally::run(stop);
        let dir = mount_point.to_str().context("a path that is not UTF-8")?;
        let mut arguments = vec!["add", reference, "--name", name, "--mount", dir];
        arguments.extend(options);
        let stdout = self.call(&arguments)?;
        let mut remove = self.command();
        remove.args(["rm", name]);
        let detach = Finally::run(remove);
        let (device, dir) = stdout
            .trim_end()
            .split_once(' ')
            .with_context(|| format!("add printed {stdout:?} instead of a device and a mount point"))?;
        let (device, mount_point) = (device.to_owned(), PathBuf::from(dir));
        Ok(Attached { device, mount_point, _detach: detach, _stop_daemon: stop_daemon })
    }

    /// `ublkimg status NAME --json`.
    ///
    /// # Errors
    ///
    /// As [`Ublkimg::call`], or it is no JSON.
    pub fn status(&self, name: &str) -> Result<Value> {
        let stdout = self.call(&["status", name, "--json"])?;
        serde_json::from_str(&stdout).with_context(|| format!("status printed {stdout:?}"))
    }

    /// Runs it with these arguments; returns what it printed.
    ///
    /// # Errors
    ///
    /// It does not end with 0.
    pub fn call(&self, args: &[&str]) -> Result<String> {
        let mut command = self.command();
        command.args(args);
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("ublkimg {} ended with {}", args.join(" "), output.status);
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// It, to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.root).arg("--run-dir").arg(&self.run_dir);
        command
    }
}
