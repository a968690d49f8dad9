//! OCI layout directories (OCI image spec, image-layout.md).
//!
//! Files appear under their final name complete or not at all: a blob is written to a temporary file beside its place,
//! hashed on the way, synced and renamed, or, made by this program in a file without a name, synced and linked;
//! `index.json` as the former. Whoever changes `index.json` holds a lock on the
//! `oci-layout` file, which is never replaced, so processes that push into one directory at once lose none of each other's
//! tags. Readers need no lock. Work here blocks; [`crate::Repository`] runs it on tokio's blocking threads.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, linkat};
use sha2::{Digest as _, Sha256};

use crate::MAX_MANIFEST_BYTES;
use crate::artifact::Artifact;
use crate::blob::BlobSource;
use crate::descriptor::Descriptor;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::repository::{Pushed, Resolved};

mod index;
mod temporary;

use index::Index;
use temporary::{Temporary, remove_leftovers, sync_parent, writing};

/// image-layout.md, "oci-layout file".
const VERSION_FILE: &str = "oci-layout";
const VERSION: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
const INDEX_FILE: &str = "index.json";
/// Manifests that are looked at for referrers; each is read whole.
const MANIFESTS_MAX: usize = 1024;
/// One step of a copy into the layout: hashing in larger steps gains nothing.
const COPY_BYTES: usize = 256 << 10;

#[derive(Debug, Clone)]
pub(crate) struct Layout {
    dir: Arc<Path>,
    tag: Option<Arc<str>>,
}

impl Layout {
    pub(crate) fn new(dir: &Path, tag: Option<&str>) -> Self {
        Self { dir: dir.into(), tag: tag.map(Into::into) }
    }

    pub(crate) fn resolve(&self) -> Result<Resolved> {
        let index = self.read_index()?;
        let entry = index.select(self.tag.as_deref()).map_err(|error| error.within(&self.dir))?;
        let bytes = self.manifest(&entry.digest)?;
        Ok(Resolved { digest: entry.digest, media_type: entry.media_type, bytes })
    }

    pub(crate) fn manifest(&self, digest: &Digest) -> Result<Bytes> {
        let path = self.blob_path(digest);
        let file = self.open(digest)?;
        let mut bytes = Vec::new();
        file.take(MAX_MANIFEST_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|cause| reading(&path, cause))?;
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(Error::too_large(format!("manifest {} is longer than 4 MiB", path.display())));
        }
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(Error::corrupt(format!("{} has the digest {actual}", path.display())));
        }
        Ok(bytes.into())
    }

    pub(crate) fn blob_range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let path = self.blob_path(digest);
        let file = self.open(digest)?;
        let size_bytes = file.metadata().map_err(|cause| reading(&path, cause))?.len();
        if range.end > size_bytes {
            let Range { start, end } = range;
            let path = path.display();
            return Err(Error::corrupt(format!("{path} has {size_bytes} bytes; {start}..{end} were asked for")));
        }
        let len_bytes = usize::try_from(range.end - range.start)
            .map_err(|_| Error::too_large(format!("a range of {} bytes", range.end - range.start)))?;
        let mut bytes = vec![0; len_bytes];
        file.read_exact_at(&mut bytes, range.start).map_err(|cause| reading(&path, cause))?;
        Ok(bytes.into())
    }

    pub(crate) fn open_blob(&self, digest: &Digest, size_bytes: u64) -> Result<File> {
        let file = self.open(digest)?;
        let path = self.blob_path(digest);
        let actual_bytes = file.metadata().map_err(|cause| reading(&path, cause))?.len();
        if actual_bytes != size_bytes {
            let path = path.display();
            return Err(Error::corrupt(format!("{path} has {actual_bytes} bytes instead of {size_bytes}")));
        }
        Ok(file)
    }

    pub(crate) fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    pub(crate) fn push_blob(&self, digest: &Digest, size_bytes: u64, source: &BlobSource) -> Result<Pushed> {
        if fs::metadata(self.blob_path(digest)).is_ok_and(|metadata| metadata.len() == size_bytes) {
            return Ok(Pushed::Existed);
        }
        match source {
            BlobSource::Bytes(bytes) => self.write_blob(digest, size_bytes, &mut bytes.as_ref())?,
            BlobSource::File(path) => {
                let mut file = File::open(path).map_err(|cause| reading(path, cause))?;
                if !self.link_blob(digest, size_bytes, path, &file)? {
                    self.write_blob(digest, size_bytes, &mut file)?;
                }
            }
        }
        Ok(Pushed::Uploaded)
    }

    pub(crate) fn push_manifest(&self, media_type: &str, bytes: &Bytes, tag: Option<&str>) -> Result<Digest> {
        self.push_instead(media_type, bytes, tag, None)
    }

    /// The same; an entry without a tag for `old` goes away. Without it two would be left that nothing tells apart.
    pub(crate) fn push_instead(
        &self,
        media_type: &str,
        bytes: &Bytes,
        tag: Option<&str>,
        old: Option<&Digest>,
    ) -> Result<Digest> {
        let digest = Digest::of(bytes);
        self.push_blob(&digest, bytes.len() as u64, &BlobSource::Bytes(bytes.clone()))?;
        let _lock = self.lock()?;
        let mut index = self.read_index()?;
        old.into_iter().for_each(|old| index.remove_untagged(old));
        index.insert(media_type, &digest, bytes, tag);
        let mut file = Temporary::create(&self.dir)?;
        file.write_all(&index.encode()?)?;
        file.persist(&self.dir.join(INDEX_FILE))?;
        Ok(digest)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    fn open(&self, digest: &Digest) -> Result<File> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::NotFound => {
                Error::not_found(format!("{} has no blob {digest}", self.dir.display())).with_source(cause)
            }
            _ => reading(&path, cause),
        })
    }

    /// The tag of the image that the location names, whether the location says it or not.
    pub(crate) fn tag_of_image(&self) -> Result<Option<String>> {
        let index = self.read_index()?;
        let entry = index.select(self.tag.as_deref()).map_err(|error| error.within(&self.dir))?;
        Ok(entry.tag)
    }

    /// What refers to this manifest: among the entries of `index.json` and of the indexes there. A layout has no other
    /// list; files that are no manifests are passed over.
    pub(crate) fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>> {
        let mut pending = self.read_index()?.digests();
        let (mut seen, mut found) = (HashSet::new(), Vec::new());
        while let Some(digest) = pending.pop() {
            if seen.len() >= MANIFESTS_MAX || !seen.insert(digest) || !self.has_blob(&digest) {
                continue;
            }
            let Ok(bytes) = self.manifest(&digest) else { continue };
            if let Ok(index) = Index::decode(&bytes) {
                pending.extend(index.digests());
            }
            match Artifact::parse(&bytes) {
                Ok(artifact) if artifact.subject.digest == *subject => found.push(artifact.descriptor(&bytes)),
                _ => {}
            }
        }
        found.retain(|entry| artifact_type.is_none() || entry.artifact_type.as_deref() == artifact_type);
        // In the order of their digests: every reader sees the same.
        found.sort_by_key(|entry| entry.digest);
        Ok(found)
    }

    /// Gives a file its name here that has none anywhere, if it is on the same file system: whoever made it hashed it
    /// as it was written, and nobody else can have changed it. False where that is not possible.
    fn link_blob(&self, digest: &Digest, size_bytes: u64, path: &Path, file: &File) -> Result<bool> {
        let metadata = file.metadata().map_err(|cause| reading(path, cause))?;
        if metadata.nlink() > 0 || metadata.len() != size_bytes {
            return Ok(false);
        }
        self.create()?;
        let place = self.blob_path(digest);
        file.sync_all().map_err(|cause| writing(&place, cause))?;
        // What it refuses is copied: another file system, a name that is taken, a file that is not to be linked.
        if linkat(CWD, path, CWD, &place, AtFlags::SYMLINK_FOLLOW).is_err() {
            return Ok(false);
        }
        sync_parent(&place)?;
        Ok(true)
    }

    /// Copies, verifies, syncs and names a blob.
    fn write_blob(&self, digest: &Digest, size_bytes: u64, source: &mut dyn Read) -> Result<()> {
        self.create()?;
        let place = self.blob_path(digest);
        let mut file = Temporary::create(&self.dir.join("blobs/sha256"))?;
        let mut hasher = Sha256::new();
        let mut copied_bytes = 0_u64;
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            let len =
                source.read(&mut buffer).map_err(|cause| Error::io(format_args!("reading blob {digest}"), cause))?;
            if len == 0 {
                break;
            }
            copied_bytes += len as u64;
            if copied_bytes > size_bytes {
                break;
            }
            hasher.update(&buffer[..len]);
            file.write_all(&buffer[..len])?;
        }
        if copied_bytes != size_bytes {
            return Err(Error::corrupt(format!("the source of blob {digest} is not {size_bytes} bytes long")));
        }
        let actual = Digest::finish(hasher);
        if actual != *digest {
            return Err(Error::corrupt(format!("the source of blob {digest} has the digest {actual}")));
        }
        file.persist(&place)
    }

    /// Makes the directory a layout, if it is none yet.
    fn create(&self) -> Result<()> {
        let blobs = self.dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(|cause| Error::io(format_args!("creating {}", blobs.display()), cause))?;
        let version = self.dir.join(VERSION_FILE);
        if version.exists() {
            return Ok(());
        }
        let mut file = Temporary::create(&self.dir)?;
        file.write_all(VERSION)?;
        // Not a rename: a file that is there must stay the same, it carries the lock.
        file.persist_new(&version)
    }

    /// Excludes other writers of `index.json` until it is dropped.
    fn lock(&self) -> Result<File> {
        self.create()?;
        let path = self.dir.join(VERSION_FILE);
        let lock = File::open(&path).map_err(|cause| reading(&path, cause))?;
        lock.lock().map_err(|cause| Error::io(format_args!("locking {}", path.display()), cause))?;
        remove_leftovers(&self.dir);
        remove_leftovers(&self.dir.join("blobs/sha256"));
        Ok(lock)
    }

    /// The parsed `index.json`; an empty one when there is a layout without it.
    fn read_index(&self) -> Result<Index> {
        let path = self.dir.join(INDEX_FILE);
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(file) => {
                file.take(MAX_MANIFEST_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|c| reading(&path, c))?
            }
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
                if self.dir.join(VERSION_FILE).exists() {
                    return Ok(Index::default());
                }
                let message = format!("{} is not an OCI layout directory", self.dir.display());
                return Err(Error::not_found(message).with_source(cause));
            }
            Err(cause) => return Err(reading(&path, cause)),
        };
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(Error::too_large(format!("{} is longer than 4 MiB", path.display())));
        }
        Index::decode(&bytes).map_err(|cause| {
            Error::corrupt(format!("{} is not an OCI image index: {cause}", path.display())).with_source(cause)
        })
    }
}

fn reading(path: &Path, cause: std::io::Error) -> Error {
    Error::io(format_args!("reading {}", path.display()), cause)
}

#[cfg(test)]
mod tests;
