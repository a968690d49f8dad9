//! Where things lie under the root of the store, and how a file gets there whole.
//!
//! ```text
//! lock                          held by the one process that owns the store
//! links.json                    what is believed of the links to registries
//! blobs/<index digest>.data     raw blocks of a layer blob, or of a hot blob, sparse
//!                     .live     which of them are there, for this boot
//!                     .durable  which of them are on the disk for certain
//! objects/<digest>              manifests and metadata blobs as they were fetched
//! metadata/<digest>             metadata image as it is served, named by the blob that it was made from
//! traces/<manifest>-<command>.trace  trace of a start on this host
//! traces/<device>.log           recording under way
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ublkimg_image::Sha256;

use crate::error::{Error, Result};

const TEMPORARY: &str = "tmp";

/// The root directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

/// The three files of a layer blob.
#[derive(Debug, Clone)]
pub(crate) struct BlobPaths {
    pub(crate) data: PathBuf,
    pub(crate) live: PathBuf,
    pub(crate) durable: PathBuf,
}

impl Layout {
    /// Makes the directories, and removes what an interrupted write left. For the owner of the store only.
    pub(crate) fn prepare(&self) -> Result<()> {
        for directory in [self.blobs(), self.objects(), self.metadata_directory(), self.traces()] {
            fs::create_dir_all(&directory).map_err(|error| Error::path("make directory", &directory, error))?;
            let entries = fs::read_dir(&directory).map_err(|error| Error::path("list", &directory, error))?;
            for entry in entries {
                let path = entry.map_err(|error| Error::path("list", &directory, error))?.path();
                if path.extension().is_some_and(|extension| extension == TEMPORARY) {
                    fs::remove_file(&path).map_err(|error| Error::path("remove", &path, error))?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links.json")
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    fn objects(&self) -> PathBuf {
        self.root.join("objects")
    }

    fn metadata_directory(&self) -> PathBuf {
        self.root.join("metadata")
    }

    pub(crate) fn traces(&self) -> PathBuf {
        self.root.join("traces")
    }

    pub(crate) fn blob(&self, index: Sha256) -> BlobPaths {
        let path = |extension| self.blobs().join(index.hex()).with_extension(extension);
        BlobPaths { data: path("data"), live: path("live"), durable: path("durable") }
    }

    pub(crate) fn object(&self, digest: Sha256) -> PathBuf {
        self.objects().join(digest.hex())
    }

    pub(crate) fn metadata(&self, digest: Sha256) -> PathBuf {
        self.metadata_directory().join(digest.hex())
    }
}

/// Writes a file beside `path` and moves it there: readers see the old one or all of the new one. `durable` = it is on
/// the disk, under its name, on return.
pub(crate) fn replace_file(path: &Path, durable: bool, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<()> {
    // Two may write the same object at a time, each its own file: an attach that was given up is one of them.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.{TEMPORARY}", NEXT.fetch_add(1, Ordering::Relaxed)));
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary)
        .and_then(|mut file| {
            write(&mut file)?;
            if durable { file.sync_all() } else { Ok(()) }
        })
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // What cannot be removed now is removed when the store is opened again.
        let _ = fs::remove_file(&temporary);
        return Err(Error::path("write", path, error));
    }
    if durable { sync_directory_of(path) } else { Ok(()) }
}

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_directory_of(path: &Path) -> Result<()> {
    let directory = path.parent().unwrap_or(path);
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::path("sync", directory, error))
}
