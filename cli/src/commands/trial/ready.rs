//! When a program is ready.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use ublkimg_driver::error::{Error, ErrorKind};

use crate::args::ReadinessArguments;

/// A host that does not answer is asked again after this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A server that has accepted may still have to read what its answer needs; it is not asked twice meanwhile.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What readiness is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::commands) enum Readiness {
    /// An answer from 200 to 399 to a GET.
    Http {
        /// Host and port.
        authority: String,
        /// What the request names.
        path: String,
    },
    /// A shell command on this host that ends with 0.
    Command(String),
    /// The end of the program, with 0.
    Exit,
    /// A time after its start.
    Period(Duration),
}

impl Readiness {
    pub(in crate::commands) fn of(command: &ReadinessArguments) -> anyhow::Result<Self> {
        Ok(match (&command.ready_http, &command.ready_cmd, command.period) {
            (Some(url), _, _) => Self::http(url)?,
            (_, Some(shell), _) => Self::Command(shell.clone()),
            (_, _, Some(period)) => Self::Period(period),
            _ => Self::Exit,
        })
    }

    fn http(url: &str) -> anyhow::Result<Self> {
        let bad = || Error::new(ErrorKind::Invalid, format!("{url:?}: --ready-http wants http://HOST[:PORT][/PATH]"));
        let rest = url.strip_prefix("http://").ok_or_else(bad)?;
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if host.is_empty() || rest.chars().any(|c| c.is_ascii_control() || c == ' ') {
            return Err(bad().into());
        }
        let has_port = host.rsplit(']').next().is_some_and(|after| after.contains(':'));
        let authority = if has_port { host.to_owned() } else { format!("{host}:80") };
        Ok(Self::Http { authority, path: if path.is_empty() { "/".to_owned() } else { path.to_owned() } })
    }

    /// Whether the container needs the host's network, to be asked.
    pub(in crate::commands) fn asks_from_outside(&self) -> bool {
        matches!(self, Self::Http { .. } | Self::Command(_))
    }

    /// Whether the program is ready, which has run for `running` and perhaps ended.
    pub(in crate::commands) fn is_reached(&self, ended: Option<ExitStatus>, running: Duration) -> anyhow::Result<bool> {
        match (self, ended) {
            (Self::Exit, Some(status)) if status.success() => return Ok(true),
            (_, Some(status)) => {
                let text = format!("the command ended with {status} before it was ready");
                return Err(Error::new(ErrorKind::Invalid, text).into());
            }
            _ => {}
        }
        Ok(match self {
            Self::Http { authority, path } => answers(authority, path).unwrap_or(false),
            Self::Command(shell) => succeeds(shell)?,
            Self::Exit => false,
            Self::Period(period) => running >= *period,
        })
    }
}

fn succeeds(shell: &str) -> anyhow::Result<bool> {
    let mut command = Command::new("sh");
    command.args(["-c", shell]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.status().map_err(|error| Error::io("cannot run sh", error))?.success())
}

fn answers(authority: &str, path: &str) -> std::io::Result<bool> {
    let address = authority.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    // In one piece: a server that answers after its first read, and closes, would reset the rest.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {authority}\r\n\r\n").as_bytes())?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(head.starts_with(b"HTTP/1.") && matches!(head[9], b'2' | b'3'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (url, authority, path) in [
            ("http://127.0.0.1:8080", "127.0.0.1:8080", "/"),
            ("http://localhost/lab?x=1", "localhost:80", "/lab?x=1"),
            ("http://[::1]:81/", "[::1]:81", "/"),
            ("http://[::1]/", "[::1]:80", "/"),
        ] {
            let expected = Readiness::Http { authority: authority.to_owned(), path: path.to_owned() };
            assert_eq!(Readiness::http(url).unwrap(), expected);
        }
        for url in ["https://a/", "a:80", "http://", "http:///x", "http://a/b c", "http://a/\r\nX: y"] {
            assert!(Readiness::http(url).is_err(), "{url:?}");
        }
    }

    #[test]
    fn an_answer_that_is_no_error_is_readiness() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let asked = authority.clone();
        let server = std::thread::spawn(move || {
            for answer in ["HTTP/1.1 503 No\r\n\r\n", "HTTP/1.1 204 Yes\r\n\r\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = vec![0; format!("GET /x HTTP/1.0\r\nHost: {asked}\r\n\r\n").len()];
                stream.read_exact(&mut request).unwrap();
                assert!(request.starts_with(b"GET /x HTTP/1.0\r\n"));
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        assert!(!answers(&authority, "/x").unwrap());
        assert!(answers(&authority, "/x").unwrap());
        server.join().unwrap();
        assert!(answers(&authority, "/x").is_err(), "nobody there");
    }

    #[test]
    fn a_program_that_ends_is_ready_only_where_that_is_asked_for() {
        let status = |code: i32| Command::new("sh").arg("-c").arg(format!("exit {code}")).status().unwrap();
        let running = Duration::from_secs(1);
        assert!(Readiness::Exit.is_reached(Some(status(0)), running).unwrap());
        assert!(!Readiness::Exit.is_reached(None, running).unwrap());
        assert!(Readiness::Exit.is_reached(Some(status(3)), running).is_err());
        let period = Readiness::Period(Duration::from_secs(2));
        assert!(!period.is_reached(None, running).unwrap());
        assert!(period.is_reached(None, Duration::from_secs(2)).unwrap());
        assert!(period.is_reached(Some(status(0)), running).is_err());
        assert!(Readiness::Command("true".to_owned()).is_reached(None, running).unwrap());
    }
}
