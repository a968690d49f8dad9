//! The guard: keeps a server running, and gives readers an error when no server will.
//!
//! A ublk device whose server died waits for the next one: readers block. That is right for the time a restart takes and
//! wrong for ever. So the guard starts the server again at once, and after [`FAILURES_MAX`] failures within
//! [`FAILURE_WINDOW`] it deletes the devices that the records name, which turns waiting reads into EIO.
//!
//! A guard that is started while a server of a killed guard still runs watches that server instead of starting a second:
//! nobody notices the change. Invariant: at most one guard per run directory (a file lock), at most one server per root
//! (the store's lock).

use std::collections::VecDeque;
use std::fs::File;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use tokio::process::Command;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::protocol::{Answer, Request};
use super::state::{Records, boot_id};
use super::{Directories, client};
use crate::device::ublk;
use crate::error::{Error, ErrorKind, Result};

/// A server may fail this often within [`FAILURE_WINDOW`] before the guard gives its devices up.
const FAILURES_MAX: usize = 5;

/// See [`FAILURES_MAX`]. Long enough that failures after START_TIMEOUT-like waits still count together.
const FAILURE_WINDOW: Duration = Duration::from_secs(60);

/// The pause before the n-th restart in a row is n times this.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// How long a server may take to answer a ping when a guard looks for one that is there already.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// How a guard ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Another guard holds the lock; this one did nothing.
    AlreadyRunning,
    /// The server ended as it was asked to.
    Stopped,
}

/// Runs until the server ends well. `server_command` makes the command of a server in the foreground.
///
/// # Errors
/// The server cannot be kept up; its devices have then been deleted. The kind is that of the server's exit code.
pub fn run(directories: &Directories, mut server_command: impl FnMut() -> Command) -> Result<Outcome> {
    directories.create().map_err(|(path, error)| Error::io(format!("cannot create {}", path.display()), error))?;
    let Some(_lock) = lock(directories)? else { return Ok(Outcome::AlreadyRunning) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the guard".to_owned(), error))?;
    runtime.block_on(watch(directories, &mut server_command))
}

fn lock(directories: &Directories) -> Result<Option<File>> {
    let path = directories.guard_lock();
    let file = File::create(&path).map_err(|error| Error::io(format!("cannot create {}", path.display()), error))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => Ok(None),
        Err(std::fs::TryLockError::Error(error)) => Err(Error::io(format!("cannot lock {}", path.display()), error)),
    }
}

/// Whether a guard is at work.
#[must_use]
pub fn is_running(directories: &Directories) -> bool {
    File::open(directories.guard_lock())
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock)))
}

async fn watch(directories: &Directories, server_command: &mut impl FnMut() -> Command) -> Result<Outcome> {
    let mut stop = StopSignals::new()?;
    let mut failures = VecDeque::new();
    adopt(directories, &mut stop).await;
    loop {
        let status = run_server(server_command(), &mut stop).await?;
        if status.success() {
            return Ok(Outcome::Stopped);
        }
        tracing::error!("the server ended: {status}");
        if stop.seen {
            return Ok(Outcome::Stopped);
        }
        failures.push_back(Instant::now());
        failures.retain(|at| at.elapsed() < FAILURE_WINDOW);
        let devices = Records::new(directories.devices()).read_all()?;
        if devices.is_empty() || failures.len() >= FAILURES_MAX {
            delete_devices(directories)?;
            let kind = status.code().and_then(ErrorKind::from_exit_code).unwrap_or(ErrorKind::Internal);
            return Err(Error::new(kind, format!("the server does not stay up ({status})")));
        }
        tokio::time::sleep(RESTART_PAUSE * u32::try_from(failures.len()).unwrap_or(1)).await;
    }
}

/// Starts one server and waits until it ends, passing a stop signal on to it.
async fn run_server(mut command: Command, stop: &mut StopSignals) -> Result<ExitStatus> {
    let mut child = command.spawn().map_err(|error| Error::io("cannot start the server".to_owned(), error))?;
    tokio::select! {
        status = child.wait() => return status.map_err(|error| Error::io("cannot wait for the server".to_owned(), error)),
        () = stop.wait() => {}
    }
    if let Some(pid) = child.id() {
        terminate(pid);
    }
    child.wait().await.map_err(|error| Error::io("cannot wait for the server".to_owned(), error))
}

/// Waits for the end of a server that an earlier guard started, if there is one.
async fn adopt(directories: &Directories, stop: &mut StopSignals) {
    let Ok(Some(Answer::Pong { pid })) = client::ask(directories, &Request::Ping, PING_TIMEOUT) else { return };
    let Some(process) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return };
    let Ok(handle) = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()) else { return };
    tracing::info!(pid, "watching the server that is there");
    // A pidfd is readable when its process has ended (pidfd_open(2)).
    let ended = tokio::task::spawn_blocking(move || {
        let mut watched = [PollFd::new(&handle, PollFlags::IN)];
        while rustix::event::poll(&mut watched, None) == Err(rustix::io::Errno::INTR) {}
    });
    tokio::pin!(ended);
    tokio::select! {
        _ = &mut ended => return,
        () = stop.wait() => terminate(pid),
    }
    let _ = ended.await;
}

fn terminate(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

/// Deletes the devices of this boot that the records name and no server holds. Records stay: they say what was lost.
fn delete_devices(directories: &Directories) -> Result<()> {
    let boot = boot_id()?;
    let ids = Records::new(directories.devices()).read_all()?.into_iter();
    for record in ids.filter(|record| record.boot_id == boot) {
        let Some(id) = record.ublk_id else { continue };
        tracing::error!(device = record.name, id, "no server stays up: deleting the device, its readers get EIO");
        if let Err(error) = ublk::delete(id) {
            tracing::error!(device = record.name, id, "cannot delete the device: {error}");
        }
    }
    Ok(())
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    seen: bool,
}

impl StopSignals {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).map_err(|error| Error::io("cannot handle signals".to_owned(), error));
        Ok(Self { terminate: on(SignalKind::terminate())?, interrupt: on(SignalKind::interrupt())?, seen: false })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        self.seen = true;
    }
}
