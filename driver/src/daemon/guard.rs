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
//! ours to see, from its death.
//!
//! When asked to ([`takeover`]), it has the server of another program take over, and then becomes that program itself: the
//! process stays the same, which is what service managers go by.
//!
//! Invariant: at most one guard per run directory (a file lock, with its process id in the file), at most one server per
//! root (the store's lock). A root whose server belongs to another run directory is left to that one.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::protocol::{Answer, Fault, Request};
use super::server_process::{ServerProcess, pid, process_lives};
use super::state::{Listed, Records, boot_id};
use super::{Directories, client, notify, takeover};
use crate::device::Transport;
use crate::device::ublk::{self, Claim};
use crate::error::{Error, ErrorKind, Result};
use crate::kernel;

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

/// How long a new program may prepare its takeover.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(90);

/// How often it is looked whether it serves.
const TAKEOVER_POLL: Duration = Duration::from_millis(10);

/// This process's own program, also when its file was replaced.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// How a guard ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Another guard holds the lock; this one did nothing.
    AlreadyRunning,
    /// The server ended as it was asked to.
    Stopped,
}

/// What a program is started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A server in the foreground.
    Server,
    /// A server that takes over from the one that serves.
    Successor,
    /// The guard of the server with this process id, in place of this process.
    Guard {
        /// The server's.
        server_pid: u32,
    },
}

/// Makes the command of a program in a role.
pub type MakeCommand<'a> = dyn Fn(&Path, Role) -> Command + 'a;

/// What a guard is started with.
#[derive(Debug)]
pub struct GuardOptions {
    /// How long readers wait for a server when none comes to serve.
    pub recovery_timeout: Duration,
    /// The server that this process has started as another program.
    pub server_pid: Option<u32>,
}

/// Runs until the server ends well. When no server has come to serve for so long, devices are given up.
///
/// # Errors
/// The server cannot be kept up; its devices have then been deleted. The kind is that of the server's exit code, or
/// [`ErrorKind::TimedOut`].
pub fn run(directories: &Directories, options: &GuardOptions, make_command: &MakeCommand<'_>) -> Result<Outcome> {
    directories.create().map_err(|(path, error)| Error::io(format!("cannot create {}", path.display()), error))?;
    let Some(lock) = lock(directories)? else { return Ok(Outcome::AlreadyRunning) };
    // Until the process has ended, not only until this returns: that is what whoever waits for the lock waits for.
    std::mem::forget(lock);
    let program = std::env::current_exe().map_err(|error| Error::io("cannot find our own program", error))?;
    // Servers have no right to load modules. Whether any transport works is asked again when one is needed.
    if let Err(error) = kernel::choose(Transport::Auto) {
        tracing::debug!("{}", error.chain());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the guard".to_owned(), error))?;
    runtime.block_on(async {
        let failures = Failures::new(options.recovery_timeout);
        let mut guard = Guard { directories, make_command, program, signals: Signals::new()?, failures };
        if options.server_pid.is_some() {
            takeover::report(directories, &takeover::Outcome::Done);
        }
        let ready = notify::when(|| directories.socket().exists() && server_on(directories).is_some());
        let watching = guard.watch(options.server_pid);
        tokio::pin!(watching);
        tokio::select! {
            outcome = &mut watching => return outcome,
            () = ready => {}
        }
        watching.await
    })
}

fn lock(directories: &Directories) -> Result<Option<File>> {
    let path = directories.guard_lock();
    let cannot = |error| Error::io(format!("cannot write {}", path.display()), error);
    let mut file = File::options().write(true).create(true).truncate(false).open(&path).map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
        Err(std::fs::TryLockError::Error(error)) => {
            return Err(Error::io(format!("cannot lock {}", path.display()), error));
        }
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(cannot)?;
    Ok(Some(file))
}

/// Whether a guard is at work.
#[must_use]
pub fn is_running(directories: &Directories) -> bool {
    File::open(directories.guard_lock())
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock)))
}

/// The guard that is at work.
pub(super) fn running(directories: &Directories) -> Option<rustix::process::Pid> {
    let mut text = String::new();
    File::open(directories.guard_lock()).and_then(|file| file.take(32).read_to_string(&mut text)).ok()?;
    is_running(directories).then(|| text.trim().parse().ok().and_then(pid)).flatten()
}

struct Guard<'a> {
    directories: &'a Directories,
    make_command: &'a MakeCommand<'a>,
    /// Where our program was when we were started.
    program: PathBuf,
    signals: Signals,
    failures: Failures,
}

/// What became of a server.
enum Attended {
    /// It ended as it was asked to.
    Stopped,
    /// It ended otherwise.
    Failed { kind: ErrorKind, how: String },
    /// This one serves in its place.
    Replaced(ServerProcess),
}

impl Guard<'_> {
    async fn watch(&mut self, server_pid: Option<u32>) -> Result<Outcome> {
        let mut next = server_pid.and_then(ServerProcess::watch);
        loop {
            let mut server = match next.take().or_else(|| self.serving()) {
                Some(server) => server,
                None => {
                    let _ = std::fs::remove_file(self.directories.socket());
                    ServerProcess::start((self.make_command)(&self.own_program(), Role::Server))?
                }
            };
            match self.attend(&mut server).await {
                Attended::Stopped => return Ok(Outcome::Stopped),
                Attended::Replaced(successor) => next = Some(successor),
                Attended::Failed { kind, how } => {
                    tracing::error!("the server ended: {how}");
                    self.failures.note(self.directories.socket().exists());
                    if self.failures.too_many() || self.nothing_waits(kind)? {
                        delete_devices(self.directories)?;
                        return Err(Error::new(kind, format!("the server does not stay up ({how})")));
                    }
                    tokio::time::sleep(self.failures.pause()).await;
                }
            }
        }
    }

    /// Waits for the end of a server; ends it, or has it replaced, when asked to.
    async fn attend(&mut self, server: &mut ServerProcess) -> Attended {
        loop {
            tokio::select! {
                status = server.ended() => return how_it_ended(self.directories, status),
                () = no_server_by(self.failures.give_up_at(), self.directories) => {
                    server.kill();
                    let _ = tokio::time::timeout(KILL_TIMEOUT, server.ended()).await;
                    let how = "killed, since it did not come to serve".to_owned();
                    return Attended::Failed { kind: ErrorKind::TimedOut, how };
                }
                () = self.signals.wait() => {}
            }
            if self.signals.stop_seen {
                server.terminate();
                let _ = server.ended().await;
                return Attended::Stopped;
            }
            let Some(program) = takeover::requested(self.directories) else { continue };
            match self.take_over(server, &program).await {
                Takeover::Done(successor) => {
                    self.become_program(&program, &successor);
                    return Attended::Replaced(successor);
                }
                Takeover::Failed { kind, how, old_ended } => {
                    tracing::error!("takeover by {}: {how}", program.display());
                    let after = if old_ended { "is started again" } else { "serves on" };
                    let message = format!("takeover by {}: {how}; the old one {after}", program.display());
                    takeover::report(self.directories, &takeover::Outcome::Failed(Fault { kind, message }));
                    if old_ended {
                        return Attended::Failed { kind, how };
                    }
                }
            }
        }
    }

    /// Has a server of another program take over from ours. See [`takeover`].
    async fn take_over(&mut self, old: &mut ServerProcess, program: &Path) -> Takeover {
        tracing::info!("takeover by {}", program.display());
        let failed = |kind, how, old_ended| Takeover::Failed { kind, how, old_ended };
        let mut new = match ServerProcess::start((self.make_command)(program, Role::Successor)) {
            Ok(new) => new,
            Err(error) => return failed(error.kind(), error.chain(), false),
        };
        let (mut old_ended, mut deadline) = (false, Instant::now() + PREPARE_TIMEOUT);
        loop {
            tokio::select! {
                status = new.ended() => {
                    let how = status.map_or_else(|| "gone".to_owned(), |status| status.to_string());
                    return failed(kind_of(status), format!("its server ended: {how}, see the log"), old_ended);
                }
                _ = old.ended(), if !old_ended => {
                    old_ended = true;
                    deadline = Instant::now() + self.failures.recovery_timeout;
                }
                () = self.signals.wait() => {
                    if self.signals.stop_seen {
                        new.kill();
                        let _ = new.ended().await;
                        return failed(ErrorKind::Busy, "the daemon is to end".to_owned(), old_ended);
                    }
                }
                () = tokio::time::sleep(TAKEOVER_POLL) => {
                    if old_ended && server_on(self.directories) == Some(new.id()) {
                        return Takeover::Done(new);
                    }
                    if Instant::now() > deadline {
                        new.kill();
                        let _ = tokio::time::timeout(KILL_TIMEOUT, new.ended()).await;
                        return failed(ErrorKind::TimedOut, "its server did not come to serve".to_owned(), old_ended);
                    }
                }
            }
        }
    }

    /// Becomes the guard of that program. Returns only if that cannot be.
    fn become_program(&self, program: &Path, server: &ServerProcess) {
        let error = (self.make_command)(program, Role::Guard { server_pid: server.id() }).exec();
        tracing::error!("the guard stays of the old version: cannot become {}: {error}", program.display());
        takeover::report(self.directories, &takeover::Outcome::Done);
    }

    /// The server that is there.
    fn serving(&self) -> Option<ServerProcess> {
        let server = server_on(self.directories).and_then(ServerProcess::watch)?;
        tracing::info!(pid = server.id(), "watching the server that is there");
        Some(server)
    }

    /// The path of our program; another way to it when another file is there now.
    fn own_program(&self) -> PathBuf {
        let same = |a: std::fs::Metadata, b: std::fs::Metadata| a.dev() == b.dev() && a.ino() == b.ino();
        let own = self.program.metadata().and_then(|at_path| Ok(same(at_path, Path::new(OWN_PROGRAM).metadata()?)));
        if own.unwrap_or(false) { self.program.clone() } else { PathBuf::from(OWN_PROGRAM) }
    }

    /// Whether there is no point in trying again: who waits for a first server is told at once why there is none.
    fn nothing_waits(&self, kind: ErrorKind) -> Result<bool> {
        // Another server has the root. If it is one of ours that was just coming up, it is watched from now on.
        if kind == ErrorKind::Busy {
            return Ok(server_on(self.directories).is_none() && waiting_devices(self.directories)?.is_empty());
        }
        let records = Records::new(self.directories.devices());
        Ok(self.failures.starts > 0 && records.list()? == Listed::default())
    }
}

/// How a takeover ended.
enum Takeover {
    /// This one serves.
    Done(ServerProcess),
    /// The old one serves on, unless it has ended.
    Failed { kind: ErrorKind, how: String, old_ended: bool },
}

fn how_it_ended(directories: &Directories, status: Option<ExitStatus>) -> Attended {
    let is_well = status.map_or(!directories.socket().exists(), |status| status.success());
    if is_well {
        return Attended::Stopped;
    }
    let how = status.map_or_else(|| "a server of another guard".to_owned(), |status| status.to_string());
    Attended::Failed { kind: kind_of(status), how }
}

fn kind_of(status: Option<ExitStatus>) -> ErrorKind {
    status.and_then(|status| status.code()).and_then(ErrorKind::from_exit_code).unwrap_or(ErrorKind::Internal)
}

/// The server that answers on our socket.
fn server_on(directories: &Directories) -> Option<u32> {
    match client::ask(directories, &Request::Ping, PING_TIMEOUT) {
        Ok(Some(Answer::Pong { pid })) => Some(pid),
        _ => None,
    }
}

/// Ends at that time, unless there is a server by then.
async fn no_server_by(give_up_at: Instant, directories: &Directories) {
    tokio::time::sleep_until(give_up_at.into()).await;
    if directories.socket().exists() {
        std::future::pending::<()>().await;
    }
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

/// Deletes the devices that wait. Records stay: they say what was lost.
fn delete_devices(directories: &Directories) -> Result<()> {
    for (name, claim) in waiting_devices(directories)? {
        tracing::error!(device = name, id = claim.id, "no server stays up: deleting the device, its readers get EIO");
        if let Err(error) = ublk::delete_claimed(claim) {
            tracing::error!(device = name, id = claim.id, "cannot delete the device: {error}");
        }
    }
    Ok(())
}

/// The devices of this boot that the records name and no server holds: another server may have come for one, one of
/// another guard.
fn waiting_devices(directories: &Directories) -> Result<Vec<(String, Claim)>> {
    let mut claims = Records::new(directories.devices()).list()?.claims(&boot_id()?);
    if claims.is_empty() {
        return Ok(claims);
    }
    let devices = ublk::devices()?;
    let waits = |claim| devices.iter().any(|it| it.is(claim) && !u32::try_from(it.server_pid).is_ok_and(process_lives));
    claims.retain(|(_, claim)| waits(*claim));
    Ok(claims)
}

/// Signals that a guard knows.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    takeover: Signal,
    stop_seen: bool,
}

impl Signals {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).map_err(|error| Error::io("cannot handle signals".to_owned(), error));
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            takeover: on(SignalKind::user_defined1())?,
            stop_seen: false,
        })
    }

    /// Waits for the next one.
    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => self.stop_seen = true,
            _ = self.interrupt.recv() => self.stop_seen = true,
            _ = self.takeover.recv() => {}
        }
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
}
