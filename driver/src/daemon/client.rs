//! The commands' end of the socket: ask the server, and start a daemon when there is none.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::protocol::{ANSWER_MAX_BYTES, Answer, Request};
use super::{Directories, guard};
use crate::error::{Error, ErrorKind, Result};

/// A daemon that is started must answer within this time: taking back devices takes milliseconds each.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a daemon that is starting is asked whether it is there.
const START_POLL: Duration = Duration::from_millis(2);

/// What is read of a log to find out why a daemon ended.
const LOG_READ_BYTES_MAX: u64 = 64 << 10;

/// What a line of a log may add to an error message.
const LOG_LINE_CHARS_MAX: usize = 400;

/// Time for the server to answer beyond what the request itself may take.
pub const ANSWER_MARGIN: Duration = Duration::from_secs(45);

/// Asks the server; `None` if there is none.
///
/// # Errors
/// What the server answers as failed, with its kind; [`ErrorKind::TimedOut`] without an answer within `timeout`.
pub fn ask(directories: &Directories, request: &Request, timeout: Duration) -> Result<Option<Answer>> {
    let socket = directories.socket();
    let stream = match UnixStream::connect(&socket) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(Error::io(format!("cannot reach the daemon at {}", socket.display()), error)),
    };
    let line = exchange(stream, request, timeout).map_err(|error| match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => Error::new(
            ErrorKind::TimedOut,
            format!("the daemon did not answer within {} s; see {}", timeout.as_secs(), directories.log().display()),
        ),
        _ => Error::io(format!("the daemon at {} hung up; see its log", socket.display()), error),
    })?;
    match serde_json::from_str(&line) {
        Ok(Answer::Failed(fault)) => Err(Error::new(fault.kind, fault.message)),
        Ok(answer) => Ok(Some(answer)),
        Err(error) => Err(Error::caused(
            ErrorKind::Internal,
            format!("the daemon at {} is of another version: stop and start it", socket.display()),
            error,
        )),
    }
}

fn exchange(mut stream: UnixStream, request: &Request, timeout: Duration) -> std::io::Result<String> {
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    BufReader::new(stream.take(ANSWER_MAX_BYTES as u64)).read_line(&mut answer)?;
    if answer.ends_with('\n') { Ok(answer) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// Asks the server, starting a daemon by `daemon_command` first if there is none. The command gets the log as its
/// stderr and must run in the foreground of its own session.
///
/// # Errors
/// As [`ask`]; and [`ErrorKind::Internal`] with the end of the log if the daemon does not come up.
pub fn ask_or_start(
    directories: &Directories,
    daemon_command: impl FnMut() -> Command,
    request: &Request,
    timeout: Duration,
) -> Result<Answer> {
    if let Some(answer) = ask(directories, request, timeout)? {
        return Ok(answer);
    }
    start(directories, daemon_command)?;
    ask(directories, request, timeout)?.ok_or_else(|| {
        Error::new(ErrorKind::Internal, format!("the daemon ended at once; see {}", directories.log().display()))
    })
}

fn start(directories: &Directories, mut command: impl FnMut() -> Command) -> Result<()> {
    let log_path = directories.log();
    directories.create().map_err(|(path, error)| Error::io(format!("cannot create {}", path.display()), error))?;
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|error| Error::io(format!("cannot write {}", log_path.display()), error))?;
    let log_start = log.metadata().map_or(0, |metadata| metadata.len());
    let mut spawn = || {
        let log = log.try_clone()?;
        command().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()
    };
    let cannot = |error| Error::io("cannot start the daemon".to_owned(), error);
    let mut child = spawn().map_err(cannot)?;
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if matches!(ask(directories, &Request::Ping, START_TIMEOUT), Ok(Some(_))) {
            return Ok(());
        }
        match child.try_wait().ok().flatten() {
            Some(status) if !status.success() => {
                let kind = status.code().and_then(ErrorKind::from_exit_code).unwrap_or(ErrorKind::Internal);
                let why = why_it_ended(directories, log_start);
                return Err(Error::new(kind, format!("the daemon could not start: {why}")));
            }
            // A guard that ends well found another one at work: its server is on the way up, or down.
            Some(_) if !guard::is_running(directories) => child = spawn().map_err(cannot)?,
            _ => {}
        }
        if Instant::now() > deadline {
            let (seconds, log) = (START_TIMEOUT.as_secs(), log_path.display());
            return Err(Error::new(ErrorKind::TimedOut, format!("the daemon did not start in {seconds} s; see {log}")));
        }
        std::thread::sleep(START_POLL);
    }
}

/// What the log says about this start, so that the user need not open it: the error of the first process that ended with
/// one, which is the server and not the guard that gave it up.
fn why_it_ended(directories: &Directories, log_start: u64) -> String {
    let mut new = Vec::new();
    let read = File::open(directories.log()).and_then(|mut log| {
        log.seek(SeekFrom::Start(log_start))?;
        log.take(LOG_READ_BYTES_MAX).read_to_end(&mut new)
    });
    let text = String::from_utf8_lossy(&new);
    let line = text.lines().find_map(|line| line.strip_prefix("ublkimg: ")).or(text.lines().next_back());
    match line.filter(|_| read.is_ok()) {
        Some(line) => line.chars().take(LOG_LINE_CHARS_MAX).collect(),
        None => format!("see {}", directories.log().display()),
    }
}
