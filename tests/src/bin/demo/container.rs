//! One run of the image's command in a runc container.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::cleanup::Finally;

/// A bundle directory for runc: `config.json`, and `rootfs` for the caller to mount on.
#[derive(Debug)]
pub(crate) struct Bundle {
    dir: PathBuf,
    state_dir: PathBuf,
}

impl Bundle {
    /// Writes `config.json`: runc's own default for a container, with this command and no terminal.
    pub(crate) fn create(dir: &Path, state_dir: &Path, args: &[String], env: &[String]) -> Result<Self> {
        std::fs::create_dir_all(dir.join("rootfs"))?;
        let output = Command::new("runc").arg("spec").current_dir(dir).output().context("cannot run runc")?;
        if !output.status.success() {
            bail!("runc spec failed: {}", String::from_utf8_lossy(&output.stderr).trim_end());
        }
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        config["process"]["args"] = json!(args);
        config["process"]["env"] = json!(env);
        config["process"]["terminal"] = json!(false);
        config["root"] = json!({ "path": "rootfs", "readonly": false });
        std::fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(Self { dir: dir.to_owned(), state_dir: state_dir.to_owned() })
    }

    /// Where the image's tree belongs.
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Runs the command to its end and tells how long that took.
    ///
    /// # Errors
    /// When it exits with anything but 0, or not within `limit`.
    pub(crate) fn run(&self, name: &str, limit: Duration) -> Result<Duration> {
        let mut delete = self.runc();
        delete.args(["delete", "--force", name]);
        let _delete = Finally::attempt(delete);
        let began = Instant::now();
        let mut child = self.runc().args(["run", "--bundle"]).arg(&self.dir).arg(name).stdin(Stdio::null()).spawn()?;
        loop {
            if let Some(status) = child.try_wait()? {
                if !status.success() {
                    bail!("the container ended with {status}");
                }
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                let mut kill = self.runc();
                kill.args(["kill", name, "KILL"]);
                drop(Finally::attempt(kill));
                let _ = child.kill();
                child.wait()?;
                bail!("the container did not end within {} s", limit.as_secs());
            }
            // Fine enough for a figure of seconds, and invisible beside the container's own work.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn runc(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.state_dir);
        command
    }
}
