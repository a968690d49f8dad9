//! Leases: which containers use a device, so that `rm` does not pull it away from under them.
//!
//! A lease is a file `leases/NAME/ID` in the run directory with the process that it is for. One whose process has ended
//! without giving it back (the runtime was killed) counts for nothing: a process is known by its id and by when it began,
//! since ids are used again. Who changes what belongs to a device's leases holds its lock meanwhile.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ublkimg_driver::daemon::Directories;
use ublkimg_driver::error::{Error, ErrorKind};

/// Longest id of a container that is taken: runtimes use theirs as names of files too.
const ID_LEN_MAX: usize = 200;

/// Stays when the leases are gone: who waits for a lock must wait for the same file as who comes later. No id begins with
/// a dot.
const LOCK: &str = ".lock";

/// A process that lives as long as a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pid: u32,
    /// In ticks since the machine was started.
    began_ticks: u64,
}

impl Process {
    /// None if there is no such process.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything; the state after it is the third field.
        let (_name, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        if fields.first() == Some(&"Z") {
            return None;
        }
        Some(Self { pid, began_ticks: fields.get(19)?.parse().ok()? })
    }

    fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// The leases of one device.
#[derive(Debug, Clone)]
pub(crate) struct Leases(PathBuf);

impl Leases {
    pub(crate) fn of(directories: &Directories, name: &str) -> Self {
        Self(directories.run.join("leases").join(name))
    }

    /// Holds the lock of the device's leases until the result is dropped.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(crate) fn lock(&self) -> anyhow::Result<File> {
        let path = self.0.join(LOCK);
        let failed = |error| Error::io(format!("cannot lock {}", path.display()), error);
        std::fs::create_dir_all(&self.0).map_err(failed)?;
        let file = File::create(&path).map_err(failed)?;
        file.lock().map_err(failed)?;
        Ok(file)
    }

    /// Takes a lease for a container, or renews it.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an id that is no name; when the file cannot be written.
    pub(crate) fn take(&self, id: &str, process: Process) -> anyhow::Result<()> {
        let path = self.path(id)?;
        let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
        std::fs::create_dir_all(&self.0).map_err(failed)?;
        Ok(std::fs::write(&path, serde_json::to_vec(&process)?).map_err(failed)?)
    }

    /// Gives a lease back; tells whether there was one.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an id that is no name.
    pub(crate) fn give_back(&self, id: &str) -> anyhow::Result<bool> {
        Ok(std::fs::remove_file(self.path(id)?).is_ok())
    }

    /// A container that uses the device; others of which nothing is left are forgotten.
    pub(crate) fn holder(&self) -> Option<String> {
        for entry in std::fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if entry.file_name() == LOCK {
                continue;
            }
            let process = std::fs::read(entry.path()).ok();
            let process = process.and_then(|bytes| serde_json::from_slice::<Process>(&bytes).ok());
            if process.is_some_and(Process::lives) {
                return Some(entry.file_name().to_string_lossy().into_owned());
            }
            let _ = std::fs::remove_file(entry.path());
        }
        None
    }

    /// Forgets all of them.
    pub(crate) fn forget(&self) {
        while let Some(id) = self.holder() {
            if !self.give_back(&id).unwrap_or(false) {
                break;
            }
        }
    }

    fn path(&self, id: &str) -> anyhow::Result<PathBuf> {
        let is_name = !id.is_empty() && id.len() <= ID_LEN_MAX && !id.starts_with('.') && !id.contains('/');
        if !is_name {
            return Err(Error::new(ErrorKind::Invalid, format!("{id:?} is no id of a container")).into());
        }
        Ok(self.0.join(Path::new(id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_with_its_process() {
        let run = tempfile::tempdir().unwrap();
        let directories = Directories { root: run.path().join("store"), run: run.path().to_owned() };
        let leases = Leases::of(&directories, "x");
        assert_eq!(leases.holder(), None);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        leases.take("c1", Process::of(child.id()).unwrap()).unwrap();
        assert_eq!(leases.holder().as_deref(), Some("c1"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(leases.holder(), None);
        assert!(!leases.give_back("c1").unwrap(), "it is forgotten");
        leases.take("c2", Process::of(std::process::id()).unwrap()).unwrap();
        assert!(leases.give_back("c2").unwrap());
        leases.forget();
        for id in ["", ".", "..", "a/b", &"x".repeat(300)] {
            assert!(leases.take(id, Process::of(std::process::id()).unwrap()).is_err(), "{id}");
        }
    }

    #[test]
    fn another_process_with_the_same_id_holds_nothing() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.lives());
        assert!(!Process { began_ticks: own.began_ticks + 1, ..own }.lives());
    }
}
