//! Where things lie under the root of the store, and how a file gets there whole.
//!
//! ```text
//! lock                          held by the one process that owns the store
//! links.json                    what is believed of the links to registries
//! blobs/<index digest>.data     raw blocks of a layer blob, or of a hot blob, sparse
//!                     .sums     a checksum of each
//!                     .live     which of them are there, for this boot
//!                     .durable  which of them are on the disk for certain
//! objects/<digest>              manifests and metadata blobs as they were fetched
//! metadata/<digest>             metadata image as it is served, named by the blob that it was made from
//! pins/<image manifest>          what an image needs that is not to be evicted
//! names/<digest of the name>     what the name of an image meant last
//! traces/<manifest>-<command>.trace  trace of a start on this host
//! traces/<device>.log           recording under way
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ublkimg_image::Sha256;

use super::disk;
use crate::error::{Error, Result};

const TEMPORARY: &str = "tmp";

/// The root directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

/// The files of a layer blob.
#[derive(Debug, Clone)]
pub(crate) struct BlobPaths {
    pub(crate) data: PathBuf,
    pub(crate) sums: PathBuf,
    pub(crate) live: PathBuf,
    pub(crate) durable: PathBuf,
}

impl Layout {
    /// Makes the directories, and removes what an interrupted write left. For the owner of the store only.
    pub(crate) fn prepare(&self) -> Result<()> {
        for directory in [
            self.root.clone(),
            self.blobs(),
            self.objects(),
            self.metadata_directory(),
            self.traces(),
            self.pins(),
            self.names(),
        ] {
            fs::create_dir_all(&directory).map_err(|error| Error::path("make directory", &directory, error))?;
            let entries = fs::read_dir(&directory).map_err(|error| Error::path("list", &directory, error))?;
            for entry in entries {
                let path = entry.map_err(|error| Error::path("list", &directory, error))?.path();
                if path.extension().is_some_and(|extension| extension == TEMPORARY) {
                    disk::remove(&path).map_err(|error| Error::path("remove", &path, error))?;
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

    pub(crate) fn names(&self) -> PathBuf {
        self.root.join("names")
    }

    pub(crate) fn name(&self, digest: Sha256) -> PathBuf {
        self.names().join(digest.hex())
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links.json")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.root.join("objects")
    }

    pub(crate) fn metadata_directory(&self) -> PathBuf {
        self.root.join("metadata")
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.root.join("pins")
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn traces(&self) -> PathBuf {
        self.root.join("traces")
    }

    pub(crate) fn blob(&self, index: Sha256) -> BlobPaths {
        let path = |extension| self.blobs().join(index.hex()).with_extension(extension);
        BlobPaths { data: path("data"), sums: path("sums"), live: path("live"), durable: path("durable") }
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
pub(crate) fn replace_file(path: &Path, durable: bool, parts: &[&[u8]]) -> Result<()> {
    // Two may write the same object at a time, each its own file: an attach that was given up is one of them.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.{TEMPORARY}", NEXT.fetch_add(1, Ordering::Relaxed)));
    let temporary = PathBuf::from(temporary);
    if let Err(error) = write_file(&temporary, durable, parts).and_then(|()| disk::rename(&temporary, path)) {
        // What cannot be removed now is removed when the store is opened again.
        let _ = disk::remove(&temporary);
        return Err(Error::path("write", path, error));
    }
    if durable { sync_directory_of(path) } else { Ok(()) }
}

fn write_file(path: &Path, durable: bool, parts: &[&[u8]]) -> io::Result<()> {
    let file = disk::create(path)?;
    let mut offset_bytes = 0;
    for part in parts {
        disk::write_all_at(path, &file, part, offset_bytes)?;
        offset_bytes += part.len() as u64;
    }
    if durable { disk::sync(path, &file) } else { Ok(()) }
}

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_directory_of(path: &Path) -> Result<()> {
    let directory = path.parent().unwrap_or(path);
    disk::sync_directory(directory).map_err(|error| Error::path("sync", directory, error))
}
