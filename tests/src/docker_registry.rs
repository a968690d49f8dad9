//! Debian's `docker-registry`, started for one test: the real thing beside the test registry.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::http::Connection;

/// It takes about 50 ms on an idle machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A port that somebody else took between choosing and listening is a reason to choose another.
const ATTEMPTS: u32 = 5;

/// A running `docker-registry`; ends when dropped.
pub struct DockerRegistry {
    process: Child,
    address: SocketAddr,
}

impl DockerRegistry {
    /// Whether the program is installed.
    pub fn is_installed() -> bool {
        Command::new("docker-registry").arg("--version").stdout(Stdio::null()).status().is_ok()
    }

    /// Starts it with its files below `dir`; it answers when this returns.
    ///
    /// # Errors
    ///
    /// It does not start, or does not answer in time.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        Self::start_with(dir, "")
    }

    /// The same as a pull-through cache of another registry.
    ///
    /// # Errors
    ///
    /// As [`DockerRegistry::start`].
    pub fn start_cache(dir: &Path, of: SocketAddr) -> anyhow::Result<Self> {
        Self::start_with(dir, &format!("proxy: {{remoteurl: 'http://{of}'}}\n"))
    }

    fn start_with(dir: &Path, more: &str) -> anyhow::Result<Self> {
        let mut outcome = Self::start_once(dir, more);
        for _ in 1..ATTEMPTS {
            if outcome.is_ok() {
                break;
            }
            outcome = Self::start_once(dir, more);
        }
        outcome
    }

    fn start_once(dir: &Path, more: &str) -> anyhow::Result<Self> {
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let config = dir.join("docker-registry.yml");
        let data = dir.join("docker-registry");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\nhttp: {{addr: '{address}'}}\n\
                 storage: {{filesystem: {{rootdirectory: '{}'}}, delete: {{enabled: true}}}}\n{more}",
                data.display()
            ),
        )?;
        let log = std::fs::File::create(dir.join("docker-registry.log"))?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("docker-registry")?;
        let mut registry = Self { process, address };
        let deadline = Instant::now() + START_TIMEOUT;
        while Connection::open(address).and_then(|mut client| client.get("/v2/")).is_err() {
            if Instant::now() > deadline || registry.process.try_wait()?.is_some() {
                bail!("docker-registry does not answer on {address}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(registry)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// `ADDR/REPOSITORY:TAG`.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.address)
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
