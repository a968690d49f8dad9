//! The vocabulary: keys, events and actions.

use std::time::Duration;

/// A layer blob while it is registered with the scheduler. Never used twice, so that a late completion of a removed
/// blob cannot be taken for one of its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobKey(pub u32);

/// One chunk of one blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// The blob.
    pub blob: BlobKey,
    /// Index of the chunk in the blob's chunk index.
    pub chunk: u32,
}

/// One waiting device request. Unique for the lifetime of the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Monotonic time since the start of the process.
pub type Now = Duration;

/// Why a chunk is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A device request waits for it.
    Demand,
    /// A sequential reader is expected to come to it.
    ReadAhead,
}

/// What the scheduler must know of a chunk when its blob is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Bytes on the wire.
    pub stored_len_bytes: u32,
    /// Already in the store.
    pub present: bool,
}

/// Something that happened.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A blob can be fetched from now on. Its key must be new.
    AddBlob {
        /// The new key.
        blob: BlobKey,
        /// Its chunks, in the order of the blob.
        chunks: &'a [ChunkEntry],
    },
    /// The blob is gone: whoever waits for it is woken with an error.
    RemoveBlob {
        /// The key, never to be used again.
        blob: BlobKey,
    },
    /// The device request `ticket` waits for all of `chunks`.
    Demand {
        /// Names the request in [`Action::Wake`]. Must be new.
        ticket: Ticket,
        /// What it misses.
        chunks: &'a [ChunkKey],
    },
    /// First read of a chunk that was already there. Feeds the detector of sequential readers.
    Touch {
        /// The chunk.
        chunk: ChunkKey,
    },
    /// A fetch ended well: the chunk is in the store.
    Fetched {
        /// The chunk.
        chunk: ChunkKey,
    },
    /// A fetch ended badly. A later demand fetches the chunk again.
    Failed {
        /// The chunk.
        chunk: ChunkKey,
        /// What the waiting requests are answered with.
        errno: i32,
    },
    /// A chunk that was present is no longer in the store.
    Lost {
        /// The chunk.
        chunk: ChunkKey,
    },
}

/// Something to do, in the order given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Fetch this chunk; answered by exactly one [`Event::Fetched`] or [`Event::Failed`].
    Fetch {
        /// The chunk.
        chunk: ChunkKey,
        /// Why.
        class: Class,
        /// When it was first demanded, or chosen for read-ahead. Deadlines count from here, not from the moment at
        /// which there was a place for it in flight.
        since: Now,
    },
    /// Answer the device request: all its chunks are there, or an errno.
    Wake {
        /// The request.
        ticket: Ticket,
        /// `Err` holds a positive errno.
        outcome: Result<(), i32>,
    },
}
