//! What an attached image has done so far.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::first_reads::FirstReadStatistics;
use crate::latency::ReadLatencies;
use crate::outage::Outage;
use crate::start_events::StartEvents;

/// Counted while it happens, without a lock.
#[derive(Debug, Default)]
pub struct ImageCounters {
    /// What the image was attached as, for the log.
    pub(crate) image: String,
    /// Requests answered with data.
    pub reads: AtomicU64,
    /// Bytes of those.
    pub read_bytes: AtomicU64,
    /// Requests answered with an error.
    pub errors: AtomicU64,
    /// Requests that waited, for bytes that were on their way already.
    pub late_hits: AtomicU64,
    /// Requests that waited, for bytes that nobody had asked for.
    pub misses: AtomicU64,
    /// Requests to the registry, without the retries inside the registry client.
    pub registry_requests: AtomicU64,
    /// Chunks fetched, verified and stored. What images share is counted for the one that it was fetched for.
    pub fetched_chunks: AtomicU64,
    /// Bytes of those on the wire, and of what attaching fetched.
    pub fetched_bytes: AtomicU64,
    /// Chunks that other blobs of this host had.
    pub copied_chunks: AtomicU64,
    /// Raw bytes of those.
    pub copied_bytes: AtomicU64,
    /// Chunks whose bytes were not what the chunk index promises.
    pub verification_failures: AtomicU64,
    /// Who waits for the registry.
    pub(crate) outage: Outage,
    /// Raw bytes per second of the chunk that was decoded and stored fastest; 0 while none was. Small ones do not count.
    pub(crate) decode_bytes_per_s: AtomicU64,
    /// What these add up, event by event, while there is room.
    pub(crate) events: StartEvents,
}

/// The counters at one moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatistics {
    /// Requests answered with data.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests that did not wait.
    pub hits: u64,
    /// Requests that waited, for bytes that were on their way already.
    pub late_hits: u64,
    /// Requests that waited, for bytes that nobody had asked for.
    pub misses: u64,
    /// Requests to the registry.
    pub registry_requests: u64,
    /// Chunks fetched for this image.
    pub fetched_chunks: u64,
    /// Bytes fetched for this image.
    pub fetched_bytes: u64,
    /// Chunks that other blobs of this host had: nothing of them was fetched.
    #[serde(default)]
    pub copied_chunks: u64,
    /// Raw bytes of those.
    #[serde(default)]
    pub copied_bytes: u64,
    /// Chunks that failed verification.
    pub verification_failures: u64,
    /// The requests that read a block for the first time.
    pub first_reads: FirstReadStatistics,
    /// How long requests took.
    #[serde(default)]
    pub latencies: ReadLatencies,
}

impl ImageCounters {
    /// Reads all counters, each at its own moment. First reads and latencies are counted elsewhere, and are left at zero.
    #[must_use]
    pub fn statistics(&self) -> ImageStatistics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let waited = load(&self.misses) + load(&self.late_hits);
        ImageStatistics {
            reads: load(&self.reads),
            read_bytes: load(&self.read_bytes),
            errors: load(&self.errors),
            hits: (load(&self.reads) + load(&self.errors)).saturating_sub(waited),
            late_hits: load(&self.late_hits),
            misses: load(&self.misses),
            registry_requests: load(&self.registry_requests),
            fetched_chunks: load(&self.fetched_chunks),
            fetched_bytes: load(&self.fetched_bytes),
            copied_chunks: load(&self.copied_chunks),
            copied_bytes: load(&self.copied_bytes),
            verification_failures: load(&self.verification_failures),
            first_reads: FirstReadStatistics::default(),
            latencies: ReadLatencies::default(),
        }
    }
}
