//! Traces of starts on this host: under the image manifest and the command, as the one zstd frame that they are pushed
//! as. They order fetches, they vouch for nothing.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use ublkimg_image::Sha256;

use super::Store;
use super::disk;
use super::layout::replace_file;
use super::objects::open_if_there;
use crate::error::{Error, Result};

/// The longest trace that is kept: a million entries of at most 16 bytes.
pub const TRACE_BYTES_MAX: u64 = 16 << 20;

/// Traces kept on this host, some 100 KiB each; the oldest go first.
const TRACES_MAX: usize = 1024;

/// Extension of a finished trace.
const TRACE: &str = "trace";

/// Extension of the log of a recording under way.
const LOG: &str = "log";

impl Store {
    /// Keeps the trace of a start of this image with this command, in place of an older one.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn put_host_trace(&self, manifest: Sha256, command: Sha256, stored: &[u8]) -> Result<PathBuf> {
        let path = self.host_trace_path(manifest, command);
        replace_file(&path, true, &[stored])?;
        self.drop_old_traces()?;
        Ok(path)
    }

    /// The trace of a start of this image with this command, as it was stored; nobody has checked it.
    ///
    /// # Errors
    /// `Io`.
    pub fn host_trace(&self, manifest: Sha256, command: Sha256) -> Result<Option<Vec<u8>>> {
        let path = self.host_trace_path(manifest, command);
        let Some(file) = open_if_there(&path)? else { return Ok(None) };
        let failed = |error| Error::path("read", &path, error);
        if file.metadata().map_err(failed)?.len() > TRACE_BYTES_MAX {
            return Ok(None);
        }
        fs::read(&path).map(Some).map_err(failed)
    }

    /// Where the device `name` logs a recording.
    pub(crate) fn recording_log(&self, name: &str) -> PathBuf {
        self.layout.traces().join(format!("{name}.{LOG}"))
    }

    /// Logs that are there: at the start of a server, those that an earlier one left.
    pub(crate) fn recording_logs(&self) -> Result<Vec<PathBuf>> {
        self.list_traces(LOG)
    }

    /// Where [`Store::put_host_trace`] puts it.
    #[must_use]
    pub fn host_trace_path(&self, manifest: Sha256, command: Sha256) -> PathBuf {
        self.layout.traces().join(format!("{}-{}.{TRACE}", manifest.hex(), command.hex()))
    }

    fn list_traces(&self, extension: &str) -> Result<Vec<PathBuf>> {
        let directory = self.layout.traces();
        let failed = |error| Error::path("list", &directory, error);
        let entries = fs::read_dir(&directory).map_err(failed)?;
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        let paths: Vec<PathBuf> = paths.collect::<std::io::Result<_>>().map_err(failed)?;
        Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|own| own == extension)).collect())
    }

    fn drop_old_traces(&self) -> Result<()> {
        let mut paths = self.list_traces(TRACE)?;
        if paths.len() <= TRACES_MAX {
            return Ok(());
        }
        let written =
            |path: &PathBuf| fs::metadata(path).and_then(|it| it.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        paths.sort_by_cached_key(written);
        let remove = |path: &PathBuf| disk::remove(path).map_err(|error| Error::path("remove", path, error));
        paths[..paths.len() - TRACES_MAX].iter().try_for_each(remove)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_found_by_image_and_command_and_the_last_one_counts() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let [image, one, other] = [1, 2, 3].map(|byte| Sha256([byte; 32]));
        assert_eq!(store.host_trace(image, one).unwrap(), None);
        store.put_host_trace(image, one, b"older").unwrap();
        store.put_host_trace(image, one, b"newer").unwrap();
        store.put_host_trace(image, other, b"other").unwrap();
        assert_eq!(store.host_trace(image, one).unwrap().unwrap(), b"newer");
        assert_eq!(store.host_trace(other, one).unwrap(), None);
        drop(store);
        let store = Store::open(root.path()).unwrap();
        assert_eq!(store.host_trace(image, other).unwrap().unwrap(), b"other");
    }

    #[test]
    fn the_oldest_traces_go() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let command = Sha256([0; 32]);
        for number in 0..TRACES_MAX + 3 {
            fs::write(store.host_trace_path(Sha256::of(&number.to_le_bytes()), command), b"x").unwrap();
        }
        store.put_host_trace(Sha256([9; 32]), command, b"last").unwrap();
        assert_eq!(store.list_traces(TRACE).unwrap().len(), TRACES_MAX);
        assert_eq!(store.host_trace(Sha256([9; 32]), command).unwrap().unwrap(), b"last");
    }
}
