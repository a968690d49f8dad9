//! The conversion cache: what is known of layers that were converted on this host.
//!
//! A directory with a file for each layer and settings, without the blobs: those are in registries. A file appears whole
//! under its name or not at all: it is written without a name and linked. Its name says what it is of; its first 32 bytes
//! are the SHA-256 of the others, so that what a disk did to it is found out. It holds what this host's user has verified or
//! made, so the directory is for the user alone.

use std::fs::{self, DirBuilder, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ublkimg_image::Sha256;
use ublkimg_registry::Digest;

use super::entry::Entry;
use crate::error::{Error, Result};

/// Most bytes of the cache. A layer of 10,000 files takes some 300 KB.
const CACHE_BYTES_MAX: u64 = 1 << 30;

/// Most files of the cache: bounds the time to list it.
const CACHE_FILES_MAX: usize = 16_384;

/// Largest file that is kept, in bytes.
const FILE_BYTES_MAX: u64 = CACHE_BYTES_MAX / 4;

#[derive(Clone, Debug)]
pub(super) struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// What is known of the layer, if anything. A file that is not what it was when it was written is removed.
    pub(super) fn get(&self, diff_id: &Digest, settings: &str) -> Option<Entry> {
        let path = self.path(diff_id, settings);
        let file = File::open(&path).ok()?;
        match read(&file) {
            Ok(entry) if entry.is_of(diff_id, settings) => {
                // Used now, so removed late. Only the order of removal depends on it.
                let _ = file.set_modified(SystemTime::now());
                return Some(entry);
            }
            Ok(_) => tracing::warn!("{}: an entry for another layer; removed", path.display()),
            Err(error) => tracing::warn!("{}: {error}; removed", path.display()),
        }
        let _ = fs::remove_file(&path);
        None
    }

    /// Remembers a layer, and forgets the least recently used ones if there are too many.
    ///
    /// # Errors
    /// `DiskFull` or `Io`.
    pub(super) fn put(&self, diff_id: &Digest, settings: &str, entry: &Entry) -> Result<()> {
        let path = self.path(diff_id, settings);
        if path.exists() {
            return Ok(());
        }
        let payload = entry.encode()?;
        if payload.len() as u64 > FILE_BYTES_MAX {
            return Ok(());
        }
        let failed = |error| Error::io(format!("conversion cache {}", self.dir.display()), error);
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(failed)?;
        let mut file = tempfile::tempfile_in(&self.dir).map_err(failed)?;
        file.write_all(&Sha256::of(&payload).0).and_then(|()| file.write_all(&payload)).map_err(failed)?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        let follow = rustix::fs::AtFlags::SYMLINK_FOLLOW;
        match rustix::fs::linkat(rustix::fs::CWD, &unnamed, rustix::fs::CWD, &path, follow) {
            // Somebody else was quicker, with the same.
            Ok(()) | Err(rustix::io::Errno::EXIST) => self.trim(),
            Err(error) => Err(failed(error.into())),
        }
    }

    fn path(&self, diff_id: &Digest, settings: &str) -> PathBuf {
        let settings = Sha256::of(settings.as_bytes()).hex();
        self.dir.join(format!("{}.{}", diff_id.hex(), &settings[..16]))
    }

    fn trim(&self) -> Result<()> {
        let failed = |error| Error::io(format!("conversion cache {}", self.dir.display()), error);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Another process may remove it at the same time.
            if let Ok(metadata) = entry.metadata()
                && let Ok(used) = metadata.modified()
            {
                files.push((used, metadata.len(), entry.path()));
            }
        }
        files.sort();
        let mut bytes: u64 = files.iter().map(|(_, len, _)| len).sum();
        let mut count = files.len();
        for (_, len, path) in files {
            if bytes <= CACHE_BYTES_MAX && count <= CACHE_FILES_MAX {
                break;
            }
            let _ = fs::remove_file(path);
            bytes -= len;
            count -= 1;
        }
        Ok(())
    }
}

fn read(file: &File) -> Result<Entry> {
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 33).read_to_end(&mut bytes).map_err(|error| Error::io("reading it", error))?;
    let (digest, payload) = bytes.split_first_chunk::<32>().ok_or_else(|| Error::damaged("too short"))?;
    if Sha256::of(payload).0 != *digest {
        return Err(Error::damaged("damaged"));
    }
    Entry::decode(payload)
}

#[cfg(test)]
mod tests {
    use super::super::entry::tests::entry;
    use super::*;

    #[test]
    fn what_was_put_is_got_and_what_was_changed_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(&dir.path().join("made/when/needed"));
        let entry = entry();
        let origin = entry.layer.reference.origin.clone().unwrap();
        assert!(cache.get(&origin.diff_id, &origin.settings).is_none());
        cache.put(&origin.diff_id, &origin.settings, &entry).unwrap();
        cache.put(&origin.diff_id, &origin.settings, &entry).unwrap();
        let got = cache.get(&origin.diff_id, &origin.settings).unwrap();
        assert_eq!(got.layer.metadata, entry.layer.metadata);
        assert!(cache.get(&origin.diff_id, "other").is_none());
        assert!(cache.get(&Digest::of(b"other"), &origin.settings).is_none());

        let path = cache.path(&origin.diff_id, &origin.settings);
        let bytes = fs::read(&path).unwrap();
        for at in [0, 40, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(&path, changed).unwrap();
            assert!(cache.get(&origin.diff_id, &origin.settings).is_none());
            assert!(!path.exists());
        }
        // A good file under the name of another layer.
        fs::write(cache.path(&Digest::of(b"other"), &origin.settings), bytes).unwrap();
        assert!(cache.get(&Digest::of(b"other"), &origin.settings).is_none());
        assert_eq!(fs::read_dir(&cache.dir).unwrap().count(), 0);
    }
}
