//! One run of the image's command in a runc container.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::cleanup::Finally;

/// What docker lets a container do by default; runc's own default is too little for services that change their user.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Fine enough for a figure of seconds, and invisible beside the container's own work.
const POLL: Duration = Duration::from_millis(2);

/// When a container counts as started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// When it has ended with exit code 0.
    Exit,
    /// When it answers a GET of / there with 200.
    Http(SocketAddr),
}

/// A bundle directory for runc: `config.json`, and `rootfs` for the caller to mount on.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    state_dir: PathBuf,
}

impl Bundle {
    /// Writes `config.json`: runc's own default for a container, with this command, no terminal, docker's capabilities
    /// and the network of this machine, so that it can be asked whether it is ready.
    ///
    /// # Errors
    ///
    /// There is no runc, or the directory cannot be written.
    pub fn create(dir: &Path, state_dir: &Path, args: &[String], env: &[String]) -> Result<Self> {
        let path = dir.join("config.json");
        std::fs::create_dir_all(dir.join("rootfs"))?;
        if path.exists() {
            // Of the container before; runc does not write over it.
            std::fs::remove_file(&path)?;
        }
        let output = Command::new("runc").arg("spec").current_dir(dir).output().context("cannot run runc")?;
        if !output.status.success() {
            bail!("runc spec failed: {}", String::from_utf8_lossy(&output.stderr).trim_end());
        }
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        config["process"]["args"] = json!(args);
        config["process"]["env"] = json!(env);
        config["process"]["terminal"] = json!(false);
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(CAPABILITIES);
        }
        config["root"] = json!({ "path": "rootfs", "readonly": false });
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "network");
        }
        std::fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(Self { dir: dir.to_owned(), state_dir: state_dir.to_owned() })
    }

    /// Where the image's tree belongs.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Runs the command until it is ready.
    ///
    /// # Errors
    ///
    /// When it exits with anything but 0, or is not ready within `limit`.
    pub fn start(&self, name: &str, ready: Ready, limit: Duration) -> Result<Running> {
        let command = |arguments: &[&str]| {
            let mut command = self.runc();
            command.args(arguments);
            command
        };
        let began = Instant::now();
        let child = self.runc().args(["run", "--bundle"]).arg(&self.dir).arg(name).stdin(Stdio::null()).spawn()?;
        let mut running = Running {
            took: Duration::ZERO,
            child,
            kill: command(&["kill", name, "KILL"]),
            _delete: Finally::attempt(command(&["delete", "--force", name])),
        };
        running.took = until_ready(&mut running.child, ready, began, limit)?;
        Ok(running)
    }

    fn runc(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.state_dir);
        command
    }
}

/// A container that was ready; ended and deleted with the value.
#[derive(Debug)]
pub struct Running {
    /// From the start of runc until it was ready.
    pub took: Duration,
    child: Child,
    kill: Command,
    _delete: Finally,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // Both may find that it has ended meanwhile.
        let _ = self.kill.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until_ready(child: &mut Child, ready: Ready, began: Instant, limit: Duration) -> Result<Duration> {
    loop {
        if let Some(status) = child.try_wait()? {
            if !status.success() || ready != Ready::Exit {
                bail!("the container ended with {status}");
            }
            return Ok(began.elapsed());
        }
        if let Ready::Http(address) = ready
            && answers(address)
        {
            return Ok(began.elapsed());
        }
        if began.elapsed() > limit {
            bail!("the container was not ready within {} s", limit.as_secs());
        }
        std::thread::sleep(POLL);
    }
}

/// Whether a GET of / is answered with 200 there.
fn answers(address: SocketAddr) -> bool {
    /// A server that has accepted may still have to read what its answer needs.
    const ANSWER_LIMIT: Duration = Duration::from_secs(60);
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.write_all(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        Ok(head.starts_with(b"HTTP/1.") && head.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}
