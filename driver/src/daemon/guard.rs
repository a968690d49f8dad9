//! The guard: keeps a server running, and gives readers an error when no server will.
//!
//! A ublk device whose server died waits for the next one: readers block. That is right for the time a restart takes and
//! wrong for ever. So the guard starts the server again at once, and when servers do not come to serve any more
//! ([`FAILED_STARTS_MAX`]), or die again and again ([`CRASHES_MAX`]), it deletes the devices that the records name, which
//! turns waiting reads into EIO.
//!
//! A guard that is started while a server of a killed guard still runs watches that server instead of starting a second:
//! nobody notices the change. A server makes its socket when it has its devices back, and removes it when it ends well:
//! so the socket tells a server that served from one that did not, and the end of a watched server, whose exit code is not
//! ours to see, from its death. Invariant: at most one guard per run directory (a file lock), at most
//! one server per root (the store's lock). A root whose server belongs to another run directory is left to that one.

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

/// This many servers in a row may end before they serve; then the guard gives their devices up.
const FAILED_STARTS_MAX: u32 = 5;

/// A server that serves may die this often within [`CRASH_WINDOW`]: often enough for somebody who kills it again and
/// again, and a reader whose read kills it gets its error within seconds.
const CRASHES_MAX: usize = 50;

/// See [`CRASHES_MAX`].
const CRASH_WINDOW: Duration = Duration::from_secs(60);

/// The pause before a restart; before the n-th one in a row that does not come to serve, n times this.
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
    let Some(lock) = lock(directories)? else { return Ok(Outcome::AlreadyRunning) };
    // Until the process has ended, not only until this returns: that is what whoever waits for the lock waits for.
    std::mem::forget(lock);
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
    let mut failures = Failures::default();
    loop {
        if adopt(directories, &mut stop).await && (stop.seen || !directories.socket().exists()) {
            return Ok(Outcome::Stopped);
        }
        let _ = std::fs::remove_file(directories.socket());
        let status = run_server(server_command(), &mut stop).await?;
        if status.success() {
            return Ok(Outcome::Stopped);
        }
        tracing::error!("the server ended: {status}");
        if stop.seen {
            return Ok(Outcome::Stopped);
        }
        failures.note(directories.socket().exists());
        let kind = status.code().and_then(ErrorKind::from_exit_code).unwrap_or(ErrorKind::Internal);
        // Busy: another server has the root. If it is one of ours that was just coming up, it is watched from now on.
        let busy = kind == ErrorKind::Busy && !answers(directories);
        // Who waits for a first server is told at once why there is none.
        let nothing_to_keep = failures.starts > 0 && Records::new(directories.devices()).read_all()?.is_empty();
        if busy || nothing_to_keep || failures.too_many() {
            delete_devices(directories)?;
            return Err(Error::new(kind, format!("the server does not stay up ({status})")));
        }
        tokio::time::sleep(RESTART_PAUSE * failures.starts.max(1)).await;
    }
}

/// How servers have failed lately.
#[derive(Default)]
struct Failures {
    /// In a row, before they served.
    starts: u32,
    /// Within [`CRASH_WINDOW`]; at most [`CRASHES_MAX`].
    crashes: VecDeque<Instant>,
}

impl Failures {
    fn note(&mut self, had_served: bool) {
        if had_served {
            self.starts = 0;
            self.crashes.push_back(Instant::now());
            self.crashes.retain(|at| at.elapsed() < CRASH_WINDOW);
        } else {
            self.starts += 1;
        }
    }

    fn too_many(&self) -> bool {
        self.starts >= FAILED_STARTS_MAX || self.crashes.len() >= CRASHES_MAX
    }
}

/// Whether a server answers on our socket.
fn answers(directories: &Directories) -> bool {
    matches!(client::ask(directories, &Request::Ping, PING_TIMEOUT), Ok(Some(_)))
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

/// Waits for the end of a server that an earlier guard started; false if there is none.
async fn adopt(directories: &Directories, stop: &mut StopSignals) -> bool {
    let Ok(Some(Answer::Pong { pid })) = client::ask(directories, &Request::Ping, PING_TIMEOUT) else { return false };
    let Some(process) = process(pid) else { return false };
    let Ok(handle) = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()) else { return false };
    tracing::info!(pid, "watching the server that is there");
    // A pidfd is readable when its process has ended (pidfd_open(2)).
    let ended = tokio::task::spawn_blocking(move || {
        let mut watched = [PollFd::new(&handle, PollFlags::IN)];
        while rustix::event::poll(&mut watched, None) == Err(rustix::io::Errno::INTR) {}
    });
    tokio::pin!(ended);
    tokio::select! {
        _ = &mut ended => return true,
        () = stop.wait() => terminate(pid),
    }
    let _ = ended.await;
    true
}

fn process(pid: u32) -> Option<rustix::process::Pid> {
    i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw)
}

fn terminate(pid: u32) {
    if let Some(pid) = process(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

/// Deletes the devices of this boot that the records name and no server holds. Records stay: they say what was lost.
fn delete_devices(directories: &Directories) -> Result<()> {
    let boot = boot_id()?;
    let records = Records::new(directories.devices()).read_all()?;
    let mut ids =
        records.into_iter().filter(|record| record.boot_id == boot).filter_map(|r| r.ublk_id.map(|id| (r, id)));
    let Some(first) = ids.next() else { return Ok(()) };
    let devices = ublk::devices()?;
    for (record, id) in std::iter::once(first).chain(ids) {
        // Another server may have come for it, one of another guard.
        if !devices.iter().any(|device| device.id == id && !u32::try_from(device.server_pid).is_ok_and(process_lives)) {
            continue;
        }
        tracing::error!(device = record.name, id, "no server stays up: deleting the device, its readers get EIO");
        if let Err(error) = ublk::delete(id) {
            tracing::error!(device = record.name, id, "cannot delete the device: {error}");
        }
    }
    Ok(())
}

/// Whether there is a process of this id; one that is not ours to ask about is taken to live.
pub(super) fn process_lives(pid: u32) -> bool {
    process(pid).is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_served_may_die_more_often_than_those_that_did_not() {
        let mut failures = Failures::default();
        for _ in 1..FAILED_STARTS_MAX {
            failures.note(false);
            assert!(!failures.too_many());
        }
        failures.note(true);
        assert!(!failures.too_many(), "it served: the count of failed starts is over");
        for _ in 1..FAILED_STARTS_MAX {
            failures.note(false);
        }
        assert!(!failures.too_many());
        failures.note(false);
        assert!(failures.too_many());
        let mut failures = Failures::default();
        for _ in 0..CRASHES_MAX {
            assert!(!failures.too_many());
            failures.note(true);
        }
        assert!(failures.too_many());
    }

    #[test]
    fn processes_live_until_they_are_gone() {
        assert!(process_lives(std::process::id()));
        assert!(!process_lives(0) && !process_lives(u32::MAX));
    }
}
