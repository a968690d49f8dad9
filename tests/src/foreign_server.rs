//! Somebody else's server, started for one test: on a port of its own, and gone with the value.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::http::Connection;

/// They take some 50 ms on an idle machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A port that somebody else took between choosing and listening is a reason to choose another.
const ATTEMPTS: u32 = 5;

/// A running server of HTTP; ends when dropped.
pub(crate) struct ForeignServer {
    process: Child,
    address: SocketAddr,
}

impl ForeignServer {
    /// Runs what `command` makes of an address until it answers at `/v2/`. What goes wrong is in `log`, which it writes.
    ///
    /// # Errors
    ///
    /// It does not start, or does not answer in time.
    pub(crate) fn start(
        mut command: impl FnMut(SocketAddr) -> anyhow::Result<Command>,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let mut once = || {
            let address = free_address()?;
            Self::start_at(address, command(address)?, log)
        };
        let mut outcome = once();
        for _ in 1..ATTEMPTS {
            if outcome.is_ok() {
                break;
            }
            outcome = once();
        }
        outcome
    }

    fn start_at(address: SocketAddr, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let process = command.stdin(Stdio::null()).spawn().with_context(|| name.clone())?;
        let mut server = Self { process, address };
        let deadline = Instant::now() + START_TIMEOUT;
        while Connection::open(address).and_then(|mut client| client.get("/v2/")).is_err() {
            if Instant::now() > deadline || server.process.try_wait()?.is_some() {
                let log = std::fs::read_to_string(log).unwrap_or_default();
                bail!("{name} does not answer on {address}; its log:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for ForeignServer {
    fn drop(&mut self) {
        // Not the child's own `kill`, which would leave workers. Fails only when it has ended already.
        if let Ok(Some(pid)) = i32::try_from(self.process.id()).map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        drop(self.process.wait());
    }
}

/// An address of this host's loopback where nobody listens now.
pub(crate) fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
