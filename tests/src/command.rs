//! Running the command line as a user would.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longer than any command of a test may take on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Said by `add` on a host without ublk, whatever comes after it.
const FALLBACK_NOTICE: &str = "no ublk here";

/// After a command has ended, nobody else may hold its output open for longer than this.
const OUTPUT_GRACE: Duration = Duration::from_secs(5);

/// The program: `$UBLKIMG_BIN`, or `ublkimg` where cargo puts it beside the test.
///
/// # Panics
///
/// It is not there: a test of the program is not skipped because somebody forgot to build it.
pub fn ublkimg_path() -> PathBuf {
    let beside = || -> Option<PathBuf> { Some(std::env::current_exe().ok()?.parent()?.parent()?.join("ublkimg")) };
    let path = std::env::var_os("UBLKIMG_BIN").map(PathBuf::from).or_else(beside).unwrap_or_default();
    assert!(path.exists(), "{} is not there: `cargo build -p ublkimg` in the same profile first", path.display());
    path
}

/// A command being put together.
pub struct Invocation {
    command: Command,
    timeout: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` for a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// From start to exit.
    pub elapsed: Duration,
}

/// `ublkimg` with its state and sockets below `root`, and no credentials or settings of the user.
pub fn ublkimg(root: &Path) -> Invocation {
    Invocation { command: isolated(Command::new(ublkimg_path()), root), timeout: TIMEOUT }
}

/// A line of shell with the same; `ublkimg` in it is what PATH finds.
pub fn shell(root: &Path, line: &str) -> Invocation {
    let mut shell = Command::new("sh");
    shell.arg("-ec").arg(line);
    Invocation { command: isolated(shell, root), timeout: TIMEOUT }
}

/// Such a command, that may run `ublkimg` in its turn.
pub(crate) fn isolated(mut command: Command, root: &Path) -> Command {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("UBLKIMG_") || text.starts_with("XDG_") || text.to_lowercase().ends_with("_proxy") {
            command.env_remove(&name);
        }
    }
    command
        .env_remove("REGISTRY_AUTH_FILE")
        .env_remove("DOCKER_CONFIG")
        .env("HOME", root)
        .env("UBLKIMG_CONFIG", "/dev/null")
        // Figures of starts are exact where nobody reads ahead of the reader; tests of that ask for it.
        .env("UBLKIMG_WARM", "off")
        .env("UBLKIMG_HOSTS_DIR", root.join("certs.d"))
        .env("TMPDIR", root)
        .env("UBLKIMG_ROOT", root.join("store"))
        .env("UBLKIMG_RUN_DIR", root.join("run"));
    command
}

impl Invocation {
    /// Another program.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), timeout: TIMEOUT }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Another time limit than two minutes.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    ///
    /// It does not start, does not end in time (it is killed then), or a process that it left behind holds its output
    /// open, which would hang every shell that captures it.
    pub fn run(mut self) -> Outcome {
        let shown = self.shown();
        let start = Instant::now();
        let mut child = self
            .command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{shown}: {error}"));
        let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
        let code = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status.code(),
                Ok(None) if start.elapsed() < self.timeout => std::thread::sleep(Duration::from_millis(2)),
                other => {
                    // It may have ended meanwhile; both calls then do nothing.
                    drop(child.kill());
                    drop(child.wait());
                    let stderr = stderr.recv_timeout(OUTPUT_GRACE).unwrap_or_default();
                    panic!("{shown}: not done after {:?} ({other:?}); stderr:\n{stderr}", start.elapsed());
                }
            }
        };
        let elapsed = start.elapsed();
        let [stdout, stderr] = [("stdout", stdout), ("stderr", stderr)].map(|(name, output)| {
            output.recv_timeout(OUTPUT_GRACE).unwrap_or_else(|_| panic!("{shown}: something holds its {name} open"))
        });
        Outcome { code, stdout, stderr, elapsed }
    }

    fn shown(&self) -> String {
        let words: Vec<OsString> =
            std::iter::once(self.command.get_program()).chain(self.command.get_args()).map(OsStr::to_owned).collect();
        words.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }
}

/// Reads in a thread of its own, so that a full pipe does not stop the command.
fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read: io::Result<usize> = pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut bytes));
        drop((read, sender.send(String::from_utf8_lossy(&bytes).into_owned())));
    });
    receiver
}

impl Outcome {
    /// It ended well.
    ///
    /// # Panics
    ///
    /// It did not.
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "stderr:\n{}", self.stderr);
        self
    }

    /// It ended with `code`, said nothing on stdout, and ended with one line of error that names each of `names`. (What
    /// it says before is progress, or that it falls back to FUSE.)
    ///
    /// # Panics
    ///
    /// It did not.
    #[track_caller]
    pub fn refused(&self, code: i32, names: &[&str]) {
        assert_eq!(self.code, Some(code), "stderr:\n{}", self.stderr);
        assert_eq!(self.stdout, "", "nothing is printed on stdout by a command that fails");
        let is_error = |line: &&str| line.starts_with("ublkimg: ") && !line.contains(FALLBACK_NOTICE);
        let errors: Vec<&str> = self.stderr.lines().filter(is_error).collect();
        assert_eq!(errors.as_slice(), self.stderr.lines().last().as_slice(), "one line of error:\n{}", self.stderr);
        for name in names {
            assert!(errors[0].contains(name), "{name:?} is not named by {:?}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_exit_code() {
        let outcome = Invocation::new("sh").args(["-c", "echo out; echo err line >&2; exit 3"]).run();
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(3), "out\n"));
        Invocation::new("sh")
            .args(["-c", "echo progress >&2; echo ublkimg: err line >&2; exit 3"])
            .run()
            .refused(3, &["line"]);
    }

    #[test]
    #[should_panic(expected = "not done after")]
    fn a_command_that_hangs() {
        Invocation::new("sleep").arg("60").timeout(Duration::from_millis(50)).run();
    }
}
