//! How long reads of a device took, by how they went: histograms of fixed buckets, as monitoring wants them.
//!
//! Counted by whoever answers, without a lock: one addition to a bucket and one to the sum. The clock is read for requests
//! that waited, and for those that read a block for the first time, which read it anyway: what a warm device serves costs
//! nothing here, and is not counted. An answer that the kernel puts together itself (a read that is linked to its commit)
//! counts as given when it was handed over.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::start_events::ReadOutcome;

/// Upper ends of the buckets in microseconds, from what memory takes to what a registry in trouble does; what took longer
/// is in one more.
pub const BUCKETS_US: [u64; 15] = [
    10, 50, 100, 500, 1_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 5_000_000, 30_000_000,
];

const BUCKETS: usize = BUCKETS_US.len() + 1;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    hits: Counts,
    late_hits: Counts,
    misses: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

/// The histograms at one moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadLatencies {
    /// Of requests that did not wait and read a block for the first time.
    pub hits: Histogram,
    /// Of requests that waited for bytes that were on their way already.
    pub late_hits: Histogram,
    /// Of requests that waited for bytes that nobody had asked for.
    pub misses: Histogram,
}

/// Requests by the time that they took.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many took at most as long as each of [`BUCKETS_US`] and longer than the one before; at last those that took longer.
    pub buckets: [u64; BUCKETS],
    /// Microseconds of all of them.
    pub sum_us: u64,
}

impl Latencies {
    /// A request was answered with data.
    pub(crate) fn note(&self, outcome: ReadOutcome, took: Duration) {
        let counts = match outcome {
            ReadOutcome::Hit => &self.hits,
            ReadOutcome::LateHit => &self.late_hits,
            ReadOutcome::Miss => &self.misses,
        };
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        counts.buckets[BUCKETS_US.partition_point(|end| *end < took_us)].fetch_add(1, Ordering::Relaxed);
        counts.sum_us.fetch_add(took_us, Ordering::Relaxed);
    }

    /// Each counter at its own moment.
    pub(crate) fn statistics(&self) -> ReadLatencies {
        let of = |counts: &Counts| Histogram {
            buckets: counts.buckets.each_ref().map(|count| count.load(Ordering::Relaxed)),
            sum_us: counts.sum_us.load(Ordering::Relaxed),
        };
        ReadLatencies { hits: of(&self.hits), late_hits: of(&self.late_hits), misses: of(&self.misses) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_in_the_first_bucket_that_holds_it() {
        let latencies = Latencies::default();
        for (outcome, took_us) in [
            (ReadOutcome::Hit, 0),
            (ReadOutcome::Hit, 10),
            (ReadOutcome::Hit, 11),
            (ReadOutcome::LateHit, 30_000_000),
            (ReadOutcome::Miss, 30_000_001),
        ] {
            latencies.note(outcome, Duration::from_micros(took_us));
        }
        let ReadLatencies { hits, late_hits, misses } = latencies.statistics();
        assert_eq!((hits.buckets[0], hits.buckets[1], hits.sum_us), (2, 1, 21));
        assert_eq!((late_hits.buckets[BUCKETS - 2], misses.buckets[BUCKETS - 1]), (1, 1));
        assert_eq!(misses.sum_us, 30_000_001);
    }
}
