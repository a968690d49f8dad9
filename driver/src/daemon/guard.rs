//! The guard: keeps a server running, and gives readers an error when no server will.
//!
//! A ublk device whose server died waits for the next one: readers block. That is right for the time a restart takes and
//! wrong for ever. So the guard starts the server again at once and again and again; and when none has come to serve
//! within the limit that the user sets, or servers die again and again ([`CRASHES_MAX`]), it deletes the devices that the
//! records name, which turns waiting reads into EIO.
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
use super::state::{DeviceRecord, Records, boot_id};
use super::{Directories, client};
use crate::device::ublk;
use crate::error::{Error, ErrorKind, Result};

/// A server that serves may die this often within [`CRASH_WINDOW`]: often enough for somebody who kills it again and
/// again, and a reader whose read kills it gets its error within seconds.
const CRASHES_MAX: usize = 50;

/// See [`CRASHES_MAX`].
const CRASH_WINDOW: Duration = Duration::from_secs(60);

/// The pause before a restart; before the n-th one in a row that does not come to serve, n times this.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause before a restart.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(1);

/// A server that is killed must have ended by then, or it hangs in the kernel and is not waited for.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

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

/// Runs until the server ends well. `server_command` makes the command of a server in the foreground. When no server has
/// come to serve for `recovery_timeout`, devices are given up.
///
/// # Errors
/// The server cannot be kept up; its devices have then been deleted. The kind is that of the server's exit code, or
/// [`ErrorKind::TimedOut`].
pub fn run(
    directories: &Directories,
    recovery_timeout: Duration,
    mut server_command: impl FnMut() -> Command,
) -> Result<Outcome> {
    directories.create().map_err(|(path, error)| Error::io(format!("cannot create {}", path.display()), error))?;
    let Some(lock) = lock(directories)? else { return Ok(Outcome::AlreadyRunning) };
    // Until the process has ended, not only until this returns: that is what whoever waits for the lock waits for.
    std::mem::forget(lock);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the guard".to_owned(), error))?;
    runtime.block_on(watch(directories, recovery_timeout, &mut server_command))
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

async fn watch(
    directories: &Directories,
    recovery_timeout: Duration,
    server_command: &mut impl FnMut() -> Command,
) -> Result<Outcome> {
    let mut stop = StopSignals::new()?;
    let mut failures = Failures::new(recovery_timeout);
    loop {
        if adopt(directories, &mut stop).await {
            if stop.seen || !directories.socket().exists() {
                return Ok(Outcome::Stopped);
            }
            failures.note(true);
        }
        let _ = std::fs::remove_file(directories.socket());
        let ended = run_server(directories, server_command(), failures.give_up_at(), &mut stop).await?;
        if stop.seen || ended.is_some_and(|status| status.success()) {
            return Ok(Outcome::Stopped);
        }
        failures.note(directories.socket().exists());
        let (kind, how) = match ended {
            Some(status) => {
                (status.code().and_then(ErrorKind::from_exit_code).unwrap_or(ErrorKind::Internal), status.to_string())
            }
            None => (ErrorKind::TimedOut, "killed, since it did not come to serve".to_owned()),
        };
        tracing::error!("the server ended: {how}");
        if failures.too_many() || nothing_waits(directories, &failures, kind)? {
            delete_devices(directories)?;
            return Err(Error::new(kind, format!("the server does not stay up ({how})")));
        }
        tokio::time::sleep(failures.pause()).await;
    }
}

/// Whether there is no point in trying again: who waits for a first server is told at once why there is none.
fn nothing_waits(directories: &Directories, failures: &Failures, kind: ErrorKind) -> Result<bool> {
    // Another server has the root. If it is one of ours that was just coming up, it is watched from now on.
    if kind == ErrorKind::Busy {
        return Ok(!answers(directories) && waiting_devices(directories)?.is_empty());
    }
    Ok(failures.starts > 0 && Records::new(directories.devices()).read_all()?.is_empty())
}

/// How servers have failed lately.
struct Failures {
    /// In a row, before they served.
    starts: u32,
    /// Since when there has been no server that served.
    since: Instant,
    /// How long that may be.
    recovery_timeout: Duration,
    /// Within [`CRASH_WINDOW`]; at most [`CRASHES_MAX`].
    crashes: VecDeque<Instant>,
}

impl Failures {
    fn new(recovery_timeout: Duration) -> Self {
        Self { starts: 0, since: Instant::now(), recovery_timeout, crashes: VecDeque::new() }
    }

    fn note(&mut self, had_served: bool) {
        if had_served {
            self.starts = 0;
            self.since = Instant::now();
            self.crashes.push_back(self.since);
            self.crashes.retain(|at| at.elapsed() < CRASH_WINDOW);
        } else {
            self.starts += 1;
        }
    }

    /// By when a server must serve.
    fn give_up_at(&self) -> Instant {
        self.since + self.recovery_timeout
    }

    fn too_many(&self) -> bool {
        Instant::now() >= self.give_up_at() || self.crashes.len() >= CRASHES_MAX
    }

    /// Before the next start.
    fn pause(&self) -> Duration {
        let pause = (RESTART_PAUSE * self.starts.max(1)).min(RESTART_PAUSE_MAX);
        pause.min(self.give_up_at().saturating_duration_since(Instant::now()))
    }
}

/// Whether a server answers on our socket.
fn answers(directories: &Directories) -> bool {
    matches!(client::ask(directories, &Request::Ping, PING_TIMEOUT), Ok(Some(_)))
}

/// Starts one server and waits until it ends, passing a stop signal on to it. One that does not serve by `give_up_at` is
/// killed: then there is no status.
async fn run_server(
    directories: &Directories,
    mut command: Command,
    give_up_at: Instant,
    stop: &mut StopSignals,
) -> Result<Option<ExitStatus>> {
    let cannot_wait = |error| Error::io("cannot wait for the server".to_owned(), error);
    let mut child = command.spawn().map_err(|error| Error::io("cannot start the server".to_owned(), error))?;
    tokio::select! {
        status = child.wait() => return status.map(Some).map_err(cannot_wait),
        () = no_server_by(give_up_at, directories) => {
            child.start_kill().map_err(cannot_wait)?;
            let _ = tokio::time::timeout(KILL_TIMEOUT, child.wait()).await;
            return Ok(None);
        }
        () = stop.wait() => {}
    }
    if let Some(pid) = child.id() {
        terminate(pid);
    }
    child.wait().await.map(Some).map_err(cannot_wait)
}

/// Ends at that time, unless there is a server by then.
async fn no_server_by(give_up_at: Instant, directories: &Directories) {
    tokio::time::sleep_until(give_up_at.into()).await;
    if directories.socket().exists() {
        std::future::pending::<()>().await;
    }
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

/// Deletes the devices that wait. Records stay: they say what was lost.
fn delete_devices(directories: &Directories) -> Result<()> {
    for (record, id) in waiting_devices(directories)? {
        tracing::error!(device = record.name, id, "no server stays up: deleting the device, its readers get EIO");
        if let Err(error) = ublk::delete(id) {
            tracing::error!(device = record.name, id, "cannot delete the device: {error}");
        }
    }
    Ok(())
}

/// The devices of this boot that the records name and no server holds: another server may have come for one, one of
/// another guard.
fn waiting_devices(directories: &Directories) -> Result<Vec<(DeviceRecord, u32)>> {
    let boot = boot_id()?;
    let records = Records::new(directories.devices()).read_all()?.into_iter();
    let mut recorded: Vec<_> =
        records.filter(|it| it.boot_id == boot).filter_map(|it| it.ublk_id.map(|id| (it, id))).collect();
    if recorded.is_empty() {
        return Ok(recorded);
    }
    let devices = ublk::devices()?;
    let waits = |id| devices.iter().any(|it| it.id == id && !u32::try_from(it.server_pid).is_ok_and(process_lives));
    recorded.retain(|(_, id)| waits(*id));
    Ok(recorded)
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
    fn servers_may_fail_to_start_for_so_long_and_die_so_often() {
        let mut failures = Failures::new(Duration::from_secs(60));
        for _ in 0..1000 {
            failures.note(false);
        }
        assert!(!failures.too_many(), "there is time left");
        assert_eq!(failures.pause(), RESTART_PAUSE_MAX);
        failures.since -= Duration::from_millis(59_500);
        assert!(!failures.too_many());
        assert!(failures.pause() <= Duration::from_millis(500), "no pause goes beyond the limit");
        failures.since -= Duration::from_millis(500);
        assert!(failures.too_many());
        failures.note(true);
        assert!(!failures.too_many(), "one served: the time begins again");
        let mut failures = Failures::new(Duration::from_secs(60));
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
