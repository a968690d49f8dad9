//! A file that gets its name when it is complete.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// More leftovers than this under successive names are no accident.
const MAX_ATTEMPTS: u32 = 1000;
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A new file beside its future place, so that the rename stays inside one file system. Removed when dropped without a
/// name.
#[derive(Debug)]
pub(super) struct Temporary {
    file: File,
    path: PathBuf,
}

impl Temporary {
    pub(super) fn create(dir: &Path) -> Result<Self> {
        let mut attempts = 0;
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = dir.join(format!(".ublkimg-{}-{number}.tmp", std::process::id()));
            attempts += 1;
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { file, path }),
                // Left by a dead process of the same id, or that of another container which shares this directory.
                Err(cause) if cause.kind() == ErrorKind::AlreadyExists && attempts < MAX_ATTEMPTS => {}
                Err(cause) => return Err(writing(&path, cause)),
            }
        }
    }

    pub(super) fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|cause| writing(&self.path, cause))
    }

    /// Syncs the file and gives it its name, in place of a file that may be there.
    pub(super) fn persist(self, place: &Path) -> Result<()> {
        self.file.sync_all().map_err(|cause| writing(place, cause))?;
        fs::rename(&self.path, place).map_err(|cause| writing(place, cause))?;
        sync_parent(place)
    }

    /// Syncs the file and gives it its name, unless that is taken.
    pub(super) fn persist_new(self, place: &Path) -> Result<()> {
        self.file.sync_all().map_err(|cause| writing(place, cause))?;
        match fs::hard_link(&self.path, place) {
            Err(cause) if cause.kind() != ErrorKind::AlreadyExists => Err(writing(place, cause)),
            _ => sync_parent(place),
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing left; otherwise what matters was reported already.
        let _ = fs::remove_file(&self.path);
    }
}

/// A rename is durable when the directory is.
fn sync_parent(place: &Path) -> Result<()> {
    let Some(parent) = place.parent() else { return Ok(()) };
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|cause| writing(place, cause))
}

fn writing(path: &Path, cause: std::io::Error) -> Error {
    Error::io(format_args!("writing {}", path.display()), cause)
}
