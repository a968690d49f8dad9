//! Small files whose sync nobody waits for.
//!
//! What an attach keeps (manifests, metadata, what a name means) is there for the next process as soon as it is written;
//! only a power cut needs it on the disk. A sync takes milliseconds on a quiet disk and seconds on a busy one, and an attach
//! would wait for a dozen of them. So the sync thread does it a moment later, with the blocks'. After a power cut such a file may
//! be there in part: whoever reads one checks it against its digest, or takes what it cannot read for absent.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind as IoErrorKind;
use std::path::PathBuf;

use parking_lot::Mutex;

use super::disk;
use crate::error::{Error, Result};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    /// As many as are written between two syncs.
    pub(super) files: Mutex<BTreeSet<PathBuf>>,
    /// Held by the one that syncs, so that another one returns when those files are on the disk too.
    syncing: Mutex<()>,
}

impl Unsynced {
    /// A file was written, and is complete under its name.
    pub(super) fn note(&self, path: PathBuf) {
        self.files.lock().insert(path);
    }

    /// Brings the files and their names to the disk, all that were noted before. The first of the errors; what failed is not
    /// tried again.
    pub(super) fn sync(&self) -> Result<()> {
        let _syncing = self.syncing.lock();
        let files = std::mem::take(&mut *self.files.lock());
        let mut outcome = Ok(());
        let mut directories = BTreeSet::new();
        for path in files {
            let synced = match File::open(&path) {
                Ok(file) => disk::sync(&path, &file),
                // It was removed meanwhile.
                Err(error) if error.kind() == IoErrorKind::NotFound => continue,
                Err(error) => Err(error),
            };
            outcome = outcome.and(synced.map_err(|error| Error::path("sync", &path, error)));
            directories.extend(path.parent().map(ToOwned::to_owned));
        }
        for directory in directories {
            let synced = disk::sync_directory(&directory);
            outcome = outcome.and(synced.map_err(|error| Error::path("sync", &directory, error)));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_syncs_waits_for_files_that_another_one_is_syncing() {
        let unsynced = Unsynced::default();
        let other = unsynced.syncing.lock();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| unsynced.sync().unwrap());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished());
            drop(other);
        });
    }
}
