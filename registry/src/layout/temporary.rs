//! A file that gets its name when it is complete.
//!
//! Its maker holds a lock on it. The lock ends with the process, however that ends; so a temporary file that can be locked was
//! left behind, and [`remove_leftovers`] removes it, whichever container made it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

const PREFIX: &str = ".ublkimg-";
const SUFFIX: &str = ".tmp";
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
            let path = dir.join(format!("{PREFIX}{}-{number}{SUFFIX}", std::process::id()));
            attempts += 1;
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) if is_ours(&file) => return Ok(Self { file, path }),
                // Taken for a leftover in the moment before it was locked.
                Ok(_) if attempts < MAX_ATTEMPTS => {}
                Ok(_) => return Err(writing(&path, ErrorKind::ResourceBusy.into())),
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

/// Locks a new file; false if somebody else had it first, to remove it.
fn is_ours(file: &File) -> bool {
    file.try_lock().is_ok() && file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
}

/// Removes the temporary files of processes that are gone from `dir`. What cannot be removed does no harm.
pub(super) fn remove_leftovers(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_temporary = name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
        if is_temporary && File::open(entry.path()).is_ok_and(|file| is_named(&file) || file.try_lock().is_ok()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether a temporary file has its name beside this one: nobody writes it any more. The lock would not tell, since whoever
/// removes leftovers may hold it under that name.
fn is_named(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.nlink() > 1)
}

/// A rename is durable when the directory is.
pub(super) fn sync_parent(place: &Path) -> Result<()> {
    let Some(parent) = place.parent() else { return Ok(()) };
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|cause| writing(place, cause))
}

pub(super) fn writing(path: &Path, cause: std::io::Error) -> Error {
    Error::io(format_args!("writing {}", path.display()), cause)
}
