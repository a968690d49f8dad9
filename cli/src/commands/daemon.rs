//! `ublkimg daemon`: the guard with its server, or one of them alone; and how other commands start it.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ublkimg_driver::daemon::guard::{GuardOptions, Role};
use ublkimg_driver::daemon::protocol::{Limits, Request};
use ublkimg_driver::daemon::{Directories, ServerOptions, client, guard, run_server, takeover};
use ublkimg_driver::error::{Error, ErrorKind};

use crate::args::cache::LimitArguments;
use crate::args::{Daemon, Global};

/// How long a server may take to end: its devices are left or gone by then.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn run(global: &Global, command: &Daemon) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    if command.stop {
        return stop(&directories, command.keep_devices);
    }
    if command.server {
        let (limits, takes_over, recovery_timeout) = (limits(command), command.takeover, command.recovery_timeout);
        return Ok(run_server(ServerOptions { directories, limits, takes_over, recovery_timeout })?);
    }
    if command.takeover {
        return Ok(takeover::request(&directories, &std::env::current_exe()?)?);
    }
    if command.background {
        // Fails only for a process group leader, which then has a session already.
        let _ = rustix::process::setsid();
        let _ = std::env::set_current_dir("/");
    }
    let options = GuardOptions { recovery_timeout: command.recovery_timeout, server_pid: command.guard_of };
    let outcome = guard::run(&directories, &options, &|program, role| {
        let mut made = Command::new(program);
        pass_global(&mut made, global, &directories);
        made.arg("daemon");
        match role {
            Role::Server => made.arg("--server"),
            Role::Successor => made.args(["--server", "--takeover"]),
            Role::Guard { server_pid } => made.args(["--guard-of", &server_pid.to_string()]),
        };
        pass_limits(&mut made, command);
        made
    })?;
    if outcome == guard::Outcome::AlreadyRunning {
        tracing::warn!("a daemon runs already for {}", directories.run.display());
    }
    Ok(())
}

fn limits(command: &Daemon) -> Limits {
    Limits { cache_bytes_max: command.limits.cache_limit, free_bytes_min: command.limits.free_floor }
}

/// Ends the daemon, if there is one, and waits until it has ended.
pub(super) fn stop(directories: &Directories, keep_devices: bool) -> anyhow::Result<()> {
    let Some(_) = client::ask(directories, &Request::Stop { keep_devices }, STOP_TIMEOUT)? else { return Ok(()) };
    let deadline = std::time::Instant::now() + STOP_TIMEOUT;
    while guard::is_running(directories)
        || matches!(client::ask(directories, &Request::Ping, STOP_TIMEOUT), Ok(Some(_)))
    {
        if std::time::Instant::now() > deadline {
            return Err(Error::new(ErrorKind::TimedOut, "the daemon does not end".to_owned()).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The command by which other commands start a daemon.
pub(super) fn background(executable: &Path, global: &Global, directories: &Directories) -> Command {
    let mut command = Command::new(executable);
    // Not by the name that this process was called by, which may be the runtime's.
    command.arg0("ublkimg");
    pass_global(&mut command, global, directories);
    command.args(["daemon", "--background"]);
    command
}

/// What a daemon of a new program is to keep to as well.
fn pass_limits(made: &mut Command, command: &Daemon) {
    let LimitArguments { cache_limit, free_floor } = command.limits;
    for (name, bytes) in [("--cache-limit", cache_limit), ("--free-floor", free_floor)] {
        made.args(bytes.into_iter().flat_map(|bytes| [name.to_owned(), bytes.to_string()]));
    }
    made.args(["--recovery-timeout".to_owned(), format!("{}ms", command.recovery_timeout.as_millis())]);
}

pub(super) fn pass_global(command: &mut Command, global: &Global, directories: &Directories) {
    command.args(global.config.iter().flat_map(|file| [Path::new("--config"), file]));
    command.arg("--root").arg(&directories.root).arg("--run-dir").arg(&directories.run).args(["--log", &global.log]);
    command.args(["--log-format", &global.log_format.name()]);
}
