//! A server as its guard sees it: a child, or the server of a guard that was killed, or a child that the guard started
//! before it became another program.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// A process that is a server, or is about to be one.
pub(super) struct ServerProcess {
    pid: Pid,
    watched: Watched,
}

enum Watched {
    Child(Child),
    /// Told by a thread that waits for it; none once it has told.
    ByThread(Option<oneshot::Receiver<()>>),
}

impl ServerProcess {
    /// Starts one.
    pub(super) fn start(command: std::process::Command) -> Result<Self> {
        let cannot = |error| Error::io("cannot start the server".to_owned(), error);
        let child = Command::from(command).spawn().map_err(cannot)?;
        let pid = child.id().and_then(pid).ok_or_else(|| cannot(std::io::ErrorKind::NotFound.into()))?;
        Ok(Self { pid, watched: Watched::Child(child) })
    }

    /// Watches one that is there; nothing if it is gone.
    pub(super) fn watch(id: u32) -> Option<Self> {
        let pid = pid(id)?;
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let (ended, has_ended) = oneshot::channel();
        // A thread of its own: the guard ends also when a server never does.
        let thread = std::thread::Builder::new().name("server".to_owned()).spawn(move || {
            // A pidfd is readable when its process has ended (pidfd_open(2)).
            let mut watched = [PollFd::new(&handle, PollFlags::IN)];
            while rustix::event::poll(&mut watched, None) == Err(rustix::io::Errno::INTR) {}
            let _ = ended.send(());
        });
        thread.ok()?;
        Some(Self { pid, watched: Watched::ByThread(Some(has_ended)) })
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits until it has ended. How is not known of a process that is not our child.
    pub(super) async fn ended(&mut self) -> Option<ExitStatus> {
        match &mut self.watched {
            Watched::Child(child) => child.wait().await.ok(),
            Watched::ByThread(ended) => {
                if let Some(ended) = ended {
                    let _ = ended.await;
                }
                *ended = None;
                let (_, status) = rustix::process::waitpid(Some(self.pid), WaitOptions::NOHANG).ok()??;
                Some(ExitStatus::from_raw(status.as_raw()))
            }
        }
    }

    /// Asks it to end.
    pub(super) fn terminate(&self) {
        let _ = rustix::process::kill_process(self.pid, Signal::TERM);
    }

    /// Ends it.
    pub(super) fn kill(&self) {
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
    }
}

/// Whether there is a process of this id; one that is not ours to ask about is taken to live.
pub(super) fn process_lives(id: u32) -> bool {
    pid(id).is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

pub(super) fn pid(id: u32) -> Option<Pid> {
    i32::try_from(id).ok().and_then(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_live_until_they_are_gone() {
        assert!(process_lives(std::process::id()));
        assert!(!process_lives(0) && !process_lives(u32::MAX));
    }

    #[tokio::test]
    async fn a_child_that_is_only_watched_has_a_status_too() {
        let mut command = std::process::Command::new("sh");
        let child = command.args(["-c", "read _; exit 7"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let mut watched = ServerProcess::watch(child.id()).unwrap();
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(20), watched.ended()).await;
        assert!(waiting.is_err(), "it lives");
        let id = child.id();
        drop(child);
        assert_eq!(watched.ended().await.and_then(|status| status.code()), Some(7));
        assert!(!process_lives(id), "it was waited for");
        assert!(ServerProcess::watch(id).is_none());
    }
}
