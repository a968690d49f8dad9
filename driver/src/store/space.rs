//! How much room the store takes, and how it is kept within limits.
//!
//! Raw blocks go first, in extents of 1 MiB, those that were not read for the longest time before others, whatever image
//! they belong to; a blob file of which nothing is left is removed. When that is not enough, objects go that no image in
//! use needs. What an image in use needs to be served at all (its manifest, its metadata) and what is pinned stays; so does
//! what an attach is about to use ([`super::held`]).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use ublkimg_image::{BLOCK_SIZE, Sha256};

use super::blob_file::last_use;
use super::{BlobFile, Store, disk};
use crate::error::{Error, Result};

/// A blob file and the blocks of it that are to go.
type Eviction = (Arc<BlobFile>, Vec<Range<u32>>);

/// What nobody needs may be what somebody is about to need: an image that was pulled is soon attached.
const OBJECT_AGE_MIN: Duration = Duration::from_secs(600);

/// Blocks that are checked at a time.
const CHECK_BLOCKS: u32 = 1024;

/// How much room the store may take.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes that the store may take; none = as many as there are.
    pub cache_bytes_max: Option<u64>,
    /// Bytes that stay free on its file system; none = a twentieth, at most 1 GiB.
    pub free_bytes_min: Option<u64>,
}

/// How much room there is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// Bytes that the store takes on the disk.
    pub used_bytes: u64,
    /// Bytes that are free on its file system.
    pub free_bytes: u64,
    /// Size of the file system.
    pub disk_bytes: u64,
    /// Chunks that the disk did not take since the daemon started; they were served from memory.
    pub overflowed_chunks: u64,
}

/// A blob file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Digest of what vouches for it.
    pub index: String,
    /// Bytes that are here.
    pub present_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// When something of it was last read, in seconds since 1970.
    pub used_s: u32,
}

/// What checking has found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Blocks that are right.
    pub blocks: u64,
    /// Blocks that are not what was written: they are dropped, and fetched again when they are read.
    pub damaged_blocks: u64,
    /// Blocks without a checksum, written by an older version.
    pub unknown_blocks: u64,
    /// Objects that are what their digest says, and metadata images that are what their blob says.
    pub objects: u64,
    /// Those that are not: objects are dropped, and fetched again where a device needs them; metadata images are mended.
    pub damaged_objects: u64,
}

/// Seconds since 1970.
pub(super) fn now_s() -> u32 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since_1970.as_secs()).unwrap_or(u32::MAX)
}

impl Room {
    /// Bytes that must go.
    #[must_use]
    pub fn excess_bytes(&self, limits: &Limits) -> u64 {
        let floor = limits.free_bytes_min.unwrap_or((self.disk_bytes / 20).min(1 << 30));
        let over = limits.cache_bytes_max.map_or(0, |max| self.used_bytes.saturating_sub(max));
        over.max(floor.saturating_sub(self.free_bytes)).min(self.used_bytes)
    }
}

impl Store {
    /// Sets the clock by which reads are noted: to be called every second or so.
    pub fn tick(&self) {
        self.shared.clock_s.store(now_s(), Ordering::Relaxed);
    }

    /// How much room there is.
    ///
    /// # Errors
    /// `Io`.
    pub fn room(&self) -> Result<Room> {
        let root = self.layout.root();
        let file_system = rustix::fs::statvfs(root).map_err(|error| Error::path("look at", root, error.into()))?;
        let mut used_bytes = 0;
        for directory in [self.layout.blobs(), self.layout.objects(), self.layout.metadata_directory()] {
            used_bytes += files(&directory)?.iter().map(|(_, metadata)| metadata.blocks() * 512).sum::<u64>();
        }
        Ok(Room {
            used_bytes,
            free_bytes: file_system.f_bavail * file_system.f_frsize,
            disk_bytes: file_system.f_blocks * file_system.f_frsize,
            overflowed_chunks: self.overflowed_chunks(),
        })
    }

    /// Chunks that the disk did not take since the store was opened: it was full, or broken.
    #[must_use]
    pub fn overflowed_chunks(&self) -> u64 {
        self.shared.overflow.taken()
    }

    /// All blob files, least recently used first.
    ///
    /// # Errors
    /// `Io`.
    pub fn usage(&self) -> Result<Vec<Usage>> {
        let mut all = Vec::new();
        for (index, blocks) in self.blob_files()? {
            let blob = self.blob(index, blocks)?;
            let bytes = |blocks: u32| u64::from(blocks) * BLOCK_SIZE as u64;
            let used_s = blob.extents().iter().map(|(used_s, _)| *used_s).max().unwrap_or_default();
            all.push(Usage {
                index: index.to_string(),
                present_bytes: bytes(blob.present_blocks()),
                total_bytes: bytes(blocks),
                used_s,
            });
        }
        all.sort_by_key(|usage| usage.used_s);
        Ok(all)
    }

    /// Evicts until `excess_bytes` are given back, or nothing is left that may go: neither these blobs nor these objects
    /// do. The bytes that were given back.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn make_room(&self, excess_bytes: u64, blobs: &BTreeSet<Sha256>, objects: &BTreeSet<Sha256>) -> Result<u64> {
        let mut freed_bytes = 0;
        for (blob, ranges) in self.least_recently_used(excess_bytes, blobs)? {
            freed_bytes += ranges.iter().map(|range| u64::from(blob.count(range.clone()))).sum::<u64>() * 4096;
            blob.evict(&ranges)?;
            let index = blob.index_digest();
            drop(blob);
            self.remove_if_empty(index)?;
        }
        if freed_bytes < excess_bytes {
            freed_bytes += self.drop_objects(excess_bytes - freed_bytes, objects)?;
        }
        Ok(freed_bytes)
    }

    /// Blocks to evict.
    fn least_recently_used(&self, excess_bytes: u64, kept: &BTreeSet<Sha256>) -> Result<Vec<Eviction>> {
        let mut open = BTreeMap::new();
        let mut extents = Vec::new();
        for (index, blocks) in self.blob_files()? {
            if !kept.contains(&index) {
                let blob = self.blob(index, blocks)?;
                extents
                    .extend(blob.extents().into_iter().map(|(used_s, range)| (used_s, index, range.start, range.end)));
                open.insert(index, (blob, Vec::new()));
            }
        }
        extents.sort_unstable();
        let mut chosen_bytes = 0;
        for (_, index, start, end) in extents {
            if chosen_bytes >= excess_bytes {
                break;
            }
            if let Some((blob, ranges)) = open.get_mut(&index) {
                chosen_bytes += u64::from(blob.count(start..end)) * BLOCK_SIZE as u64;
                ranges.push(start..end);
            }
        }
        // Those of which nothing is here at all only take a name.
        let is_wanted = |(blob, ranges): &Eviction| !ranges.is_empty() || blob.present_blocks() == 0;
        Ok(open.into_values().filter(is_wanted).collect())
    }

    /// Removes the files of a blob that nobody has open and of which nothing is here.
    fn remove_if_empty(&self, index: Sha256) -> Result<()> {
        // Held while the files go: nobody opens them meanwhile.
        let mut blobs = self.blobs.lock();
        let is_idle = |blob: &Arc<BlobFile>| Arc::strong_count(blob) == 1 && blob.present_blocks() == 0;
        if !blobs.get(&index).is_some_and(is_idle) {
            return Ok(());
        }
        blobs.remove(&index);
        let paths = self.layout.blob(index);
        // The bits before the data: see `open_data`.
        for path in [&paths.durable, &paths.live, &paths.sums, &paths.data] {
            disk::remove(path).map_err(|error| Error::path("remove", path, error))?;
        }
        Ok(())
    }

    fn drop_objects(&self, excess_bytes: u64, kept: &BTreeSet<Sha256>) -> Result<u64> {
        let mut old = Vec::new();
        for directory in [self.layout.objects(), self.layout.metadata_directory()] {
            for (path, metadata) in files(&directory)? {
                let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
                if let Some(digest) = digest_of(&path)
                    && !kept.contains(&digest)
                    && age >= OBJECT_AGE_MIN
                {
                    old.push((age, digest, path, metadata.blocks() * 512));
                }
            }
        }
        old.sort_by_key(|(age, ..)| Reverse(*age));
        let mut freed_bytes = 0;
        for (_, digest, path, bytes) in old {
            if freed_bytes >= excess_bytes {
                break;
            }
            if let Some(removed) = self.held.unless_held(digest, || disk::remove(&path)) {
                removed.map_err(|error| Error::path("remove", &path, error))?;
                freed_bytes += bytes;
            }
        }
        Ok(freed_bytes)
    }

    /// Reads everything and compares it with what it should be; what is not is dropped, to be fetched again.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn check(&self) -> Result<Checked> {
        let mut checked = Checked::default();
        for (index, blocks) in self.blob_files()? {
            let blob = self.blob(index, blocks)?;
            for start in (0..blocks).step_by(CHECK_BLOCKS as usize) {
                let range = start..start.saturating_add(CHECK_BLOCKS).min(blocks);
                let (wrong, unknown) = blob.check(range.clone())?;
                if !wrong.is_empty() {
                    tracing::error!("store: blocks {wrong:?} of {index} are damaged: they will be fetched again");
                    let ranges: Vec<_> = wrong.iter().map(|block| *block..block + 1).collect();
                    blob.evict(&ranges)?;
                }
                checked.damaged_blocks += wrong.len() as u64;
                checked.unknown_blocks += u64::from(unknown);
                checked.blocks += u64::from(blob.count(range)).saturating_sub(u64::from(unknown));
            }
        }
        for (path, _) in files(&self.layout.objects())? {
            let Some(digest) = digest_of(&path) else { continue };
            if self.object(digest)?.is_some() {
                checked.objects += 1;
            } else {
                disk::remove(&path).map_err(|error| Error::path("remove", &path, error))?;
                checked.damaged_objects += 1;
            }
        }
        Ok(checked)
    }

    /// The digests of the objects that are here.
    pub(crate) fn object_digests(&self) -> Result<Vec<Sha256>> {
        Ok(files(&self.layout.objects())?.iter().filter_map(|(path, _)| digest_of(path)).collect())
    }

    /// The blob files and their lengths in blocks, by their digests.
    fn blob_files(&self) -> Result<Vec<(Sha256, u32)>> {
        let mut all = Vec::new();
        for (path, metadata) in files(&self.layout.blobs())? {
            let blocks = u32::try_from(metadata.len() / BLOCK_SIZE as u64);
            if path.extension().is_some_and(|extension| extension == "data")
                && let (Some(index), Ok(blocks @ 1..)) = (digest_of(&path), blocks)
                && last_use(&self.layout.blob(index)).is_some()
            {
                all.push((index, blocks));
            }
        }
        Ok(all)
    }
}

/// The files in a directory. Those that go meanwhile are left out.
fn files(directory: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>> {
    let failed = |error| Error::path("list", directory, error);
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if let Ok(metadata) = fs::symlink_metadata(&path)
            && metadata.is_file()
        {
            all.push((path, metadata));
        }
    }
    Ok(all)
}

fn digest_of(path: &Path) -> Option<Sha256> {
    format!("sha256:{}", path.file_stem()?.to_str()?).parse().ok()
}
