//! What the caller is fetching, that of removed blobs included: it occupies the link until it is answered.

use std::collections::BTreeMap;

use crate::estimate::Mark;
use crate::types::{ChunkKey, Class, FetchKey, ImageKey, LinkKey, Now};

/// Chunks of prefetch between the action to fetch them and their end, whatever their size.
pub const PREFETCH_CHUNKS_MAX: usize = 1024;

/// Bytes of prefetch between the action to fetch them and their end. It bounds what has arrived and is not decoded: when
/// the decoders do not keep up, prefetch waits for them. Twice the largest window.
pub const PREFETCH_BYTES_MAX: u64 = 64 << 20;

/// Demanded chunks between the action to fetch them and their end, over all links. Five links of
/// [`crate::DEMAND_CHUNKS_MAX`], so that a registry that does not answer stops nobody else; 33 MiB of chunks.
pub const DEMAND_CHUNKS_TOTAL_MAX: usize = 128;

/// A chunk on its way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flight {
    pub(crate) class: Class,
    pub(crate) link: LinkKey,
    pub(crate) fetch: FetchKey,
    pub(crate) len_bytes: u64,
    /// For whose plan, demand or fill.
    pub(crate) image: Option<ImageKey>,
    /// Whose demand waits for this prefetch, and since when.
    pub(crate) late_hit: Option<(ImageKey, Now)>,
    pub(crate) has_arrived: bool,
}

/// One ranged request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) mark: Mark,
    pub(crate) link: LinkKey,
    pub(crate) class: Class,
    /// Chunks that have not arrived.
    pub(crate) left: u32,
    pub(crate) has_first_byte: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    pub(crate) chunks: BTreeMap<ChunkKey, Flight>,
    pub(crate) requests: BTreeMap<FetchKey, Request>,
    pub(crate) demand_chunks: usize,
    pub(crate) prefetch_chunks: usize,
    pub(crate) prefetch_bytes: u64,
    next: u64,
}

impl Flights {
    pub(crate) fn open(&mut self, request: Request) -> FetchKey {
        let fetch = FetchKey(self.next);
        self.next += 1;
        self.requests.insert(fetch, request);
        fetch
    }

    /// Whether nobody was fetching the chunk.
    pub(crate) fn add(&mut self, chunk: ChunkKey, flight: Flight) -> bool {
        if flight.class == Class::Demand {
            self.demand_chunks += 1;
        } else {
            self.prefetch_chunks += 1;
            self.prefetch_bytes += flight.len_bytes;
        }
        self.chunks.insert(chunk, flight).is_none()
    }

    /// Takes out a fetch that ended; `None` if there was none.
    pub(crate) fn end(&mut self, chunk: ChunkKey) -> Option<Flight> {
        let flight = self.chunks.remove(&chunk)?;
        if flight.class == Class::Demand {
            self.demand_chunks -= 1;
        } else {
            self.prefetch_chunks -= 1;
            self.prefetch_bytes -= flight.len_bytes;
        }
        Some(flight)
    }

    /// What prefetch may add: chunks and bytes.
    pub(crate) fn room(&self) -> (usize, u64) {
        let chunks = PREFETCH_CHUNKS_MAX.saturating_sub(self.prefetch_chunks);
        (chunks, PREFETCH_BYTES_MAX.saturating_sub(self.prefetch_bytes))
    }
}
