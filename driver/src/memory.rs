//! The memory that images may take together, beside that of chunks on their way.
//!
//! Chunks have bounds of their own, over all images: the scheduler's for what is asked for, [`crate::decode`]'s for what has
//! arrived. What else can be large is what attaching reads whole, and what an attached image keeps; each image bounds it,
//! and here is the bound for all of them. Whoever reads something whole takes its length first, waits while there is no
//! room, and gives it back with the [`Share`]. A budget holds the largest thing that it is for, so everybody has their turn.
//!
//! Nobody waits for somebody who waits for them: a share of `stored` is taken before one of `raw`, and who has one of `raw`
//! waits for nothing but the disk; of `kept` nobody waits for a share.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use ublkimg_registry::erofs_manifest::METADATA_BYTES_MAX;

use crate::error::{Error, ErrorKind, Result};

/// Longest metadata image, in bytes, while it is decoded in memory: three to ten million files.
pub(crate) const METADATA_RAW_BYTES_MAX: u64 = 1 << 30;

/// Chunk indexes and profiles of all attached images: 2 TB of images in chunks of 256 KiB.
const KEPT_BYTES_MAX: u64 = 1 << 30;

/// What an attached image keeps of a chunk, here and in the scheduler.
pub(crate) const KEPT_BYTES_PER_CHUNK: u64 = 128;

/// What it keeps of an entry of its trace: the entry, the step of the plan, its place in the hot blob.
pub(crate) const KEPT_BYTES_PER_TRACE_ENTRY: u64 = 96;

/// One for each store, so one for each daemon.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Metadata blobs as they are stored.
    pub(crate) stored: Budget,
    /// What is decoded: metadata images, traces.
    pub(crate) raw: Budget,
    /// Of attached images.
    pub(crate) kept: Budget,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            stored: Budget::new(METADATA_BYTES_MAX),
            raw: Budget::new(METADATA_RAW_BYTES_MAX),
            kept: Budget::new(KEPT_BYTES_MAX),
        }
    }
}

/// So many bytes, to be shared.
#[derive(Debug)]
pub(crate) struct Budget {
    room_kib: Arc<Semaphore>,
    kib_max: u32,
}

/// A part of a budget, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    _kib: OwnedSemaphorePermit,
}

impl Budget {
    fn new(bytes_max: u64) -> Self {
        let kib_max = u32::try_from(bytes_max / 1024).unwrap_or(u32::MAX);
        Self { room_kib: Arc::new(Semaphore::new(kib_max as usize)), kib_max }
    }

    /// Waits for room, in the order in which others asked. Who wants more than there is gets all: what it may read has
    /// that bound too.
    pub(crate) async fn take(&self, bytes: u64) -> Result<Share> {
        let taken = Arc::clone(&self.room_kib).acquire_many_owned(self.kib(bytes)).await;
        // Nobody closes it.
        taken.map(|kib| Share { _kib: kib }).map_err(|_| Error::new(ErrorKind::Internal, "a budget is closed"))
    }

    /// The share, if there is room now.
    pub(crate) fn try_take(&self, bytes: u64) -> Option<Share> {
        let taken = Arc::clone(&self.room_kib).try_acquire_many_owned(self.kib(bytes));
        taken.ok().map(|kib| Share { _kib: kib })
    }

    fn kib(&self, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).min(self.kib_max)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn who_finds_no_room_waits_for_what_others_give_back() {
        let budget = Budget::new(10 << 10);
        let first = budget.take(8 << 10).await.unwrap();
        assert!(budget.try_take(3 << 10).is_none());
        let large = tokio::time::timeout(Duration::from_millis(10), budget.take(1 << 30));
        assert!(large.await.is_err(), "there is no room");
        drop(first);
        let _all = budget.take(1 << 30).await.unwrap();
        assert!(budget.try_take(1).is_none(), "it got all there is");
    }
}
