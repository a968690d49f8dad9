//! Debian's `docker-registry`, started for one test: the real thing beside the test registry.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::foreign_server::ForeignServer;

/// A running `docker-registry`; ends when dropped.
pub struct DockerRegistry(ForeignServer);

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
        let (config, log) = (dir.join("docker-registry.yml"), dir.join("docker-registry.log"));
        let command = |address| {
            std::fs::write(
                &config,
                format!(
                    "version: 0.1\nlog: {{level: warn}}\nhttp: {{addr: '{address}'}}\n\
                     storage: {{filesystem: {{rootdirectory: '{}'}}, delete: {{enabled: true}}}}\n{more}",
                    dir.join("docker-registry").display()
                ),
            )?;
            let log = std::fs::File::create(&log)?;
            let mut command = Command::new("docker-registry");
            command.arg("serve").arg(&config).stdout(log.try_clone()?).stderr(log);
            Ok(command)
        };
        ForeignServer::start(command, &log).map(Self)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }

    /// `ADDR/REPOSITORY:TAG`.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.addr())
    }
}
