//! The one table of chunk states: a chunk is fetched once, whoever asks for it.

use std::collections::BTreeMap;

use crate::types::{BlobKey, BlobKind, ChunkEntry, ChunkKey, LinkKey};

/// What is known of a chunk's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Absent,
    /// A demand waits for a free place in flight.
    Queued,
    InFlight,
    Present,
    /// A hot frame that is not to be asked for.
    Withdrawn,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    pub(crate) stored_offset_bytes: u64,
    pub(crate) stored_len_bytes: u32,
    pub(crate) state: State,
    /// A device read it.
    pub(crate) read: bool,
    /// Fetched, or being fetched, before anyone asked for it.
    pub(crate) prefetched: bool,
    /// Prefetches of it that failed.
    pub(crate) failures: u8,
}

impl Chunk {
    pub(crate) fn len_bytes(&self) -> u64 {
        u64::from(self.stored_len_bytes)
    }
}

#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) link: LinkKey,
    pub(crate) kind: BlobKind,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) present_bytes: u64,
    pub(crate) total_bytes: u64,
}

impl Blob {
    fn new(link: LinkKey, kind: BlobKind, entries: &[ChunkEntry]) -> Self {
        let chunk = |entry: &ChunkEntry| Chunk {
            stored_offset_bytes: entry.stored_offset_bytes,
            stored_len_bytes: entry.stored_len_bytes,
            state: if entry.present { State::Present } else { State::Absent },
            read: false,
            prefetched: false,
            failures: 0,
        };
        let sum = |present_only: bool| {
            let counted = entries.iter().filter(|entry| entry.present || !present_only);
            counted.map(|entry| u64::from(entry.stored_len_bytes)).sum()
        };
        Self {
            link,
            kind,
            chunks: entries.iter().map(chunk).collect(),
            present_bytes: sum(true),
            total_bytes: sum(false),
        }
    }

    /// Whether the chunk after `chunk` begins where `chunk` ends: both can be had with one range.
    pub(crate) fn is_followed(&self, chunk: u32) -> bool {
        let at = |chunk: u32| self.chunks.get(chunk as usize);
        let (Some(one), Some(next)) = (at(chunk), chunk.checked_add(1).and_then(at)) else { return false };
        one.stored_offset_bytes.checked_add(one.len_bytes()) == Some(next.stored_offset_bytes)
    }
}

/// All blobs.
#[derive(Debug, Default)]
pub(crate) struct Table {
    blobs: BTreeMap<BlobKey, Blob>,
}

impl Table {
    pub(crate) fn add(&mut self, blob: BlobKey, link: LinkKey, kind: BlobKind, chunks: &[ChunkEntry]) {
        debug_assert!(!self.blobs.contains_key(&blob), "keys are used once");
        self.blobs.insert(blob, Blob::new(link, kind, chunks));
    }

    pub(crate) fn remove(&mut self, blob: BlobKey) {
        self.blobs.remove(&blob);
    }

    pub(crate) fn blob(&self, blob: BlobKey) -> Option<&Blob> {
        self.blobs.get(&blob)
    }

    pub(crate) fn chunk(&self, key: ChunkKey) -> Option<&Chunk> {
        self.blobs.get(&key.blob)?.chunks.get(key.chunk as usize)
    }

    pub(crate) fn chunk_mut(&mut self, key: ChunkKey) -> Option<&mut Chunk> {
        self.blobs.get_mut(&key.blob)?.chunks.get_mut(key.chunk as usize)
    }

    pub(crate) fn state(&self, key: ChunkKey) -> Option<State> {
        self.chunk(key).map(|chunk| chunk.state)
    }

    /// Does nothing for a chunk of a removed blob.
    pub(crate) fn set_state(&mut self, key: ChunkKey, state: State) {
        let Some(blob) = self.blobs.get_mut(&key.blob) else { return };
        let Some(chunk) = blob.chunks.get_mut(key.chunk as usize) else { return };
        if chunk.state == State::Present {
            blob.present_bytes -= chunk.len_bytes();
        }
        chunk.state = state;
        if state == State::Present {
            blob.present_bytes += chunk.len_bytes();
        }
    }
}
