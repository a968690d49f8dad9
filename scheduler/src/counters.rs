//! What has been decided so far.

use crate::types::Class;

/// Counts of the whole scheduler. Chunks, if not said otherwise. Hits are not known here: a request that finds everything
/// in the store never comes by.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Device requests that waited.
    pub demands: u64,
    /// Demanded, and nobody had asked for them.
    pub misses: u64,
    /// Demanded while prefetch was fetching them.
    pub late_hits: u64,
    /// Demanded while another demand was fetching them, or had queued them.
    pub joined: u64,
    /// Issued for plans.
    pub trace: u64,
    /// Bytes of those.
    pub trace_bytes: u64,
    /// Issued as read-ahead.
    pub read_ahead: u64,
    /// Bytes of those.
    pub read_ahead_bytes: u64,
    /// Issued to fill images.
    pub fill: u64,
    /// Bytes of those.
    pub fill_bytes: u64,
    /// Ranged requests, of all classes.
    pub requests: u64,
    /// Fetches that ended well.
    pub fetched: u64,
    /// Fetches that ended badly.
    pub failed: u64,
    /// Hot frames that were withdrawn.
    pub withdrawn: u64,
    /// Chunks that were issued and then found on this host; they are taken off the counts above.
    pub local: u64,
    /// Fetches of a chunk that was under way or present: always 0.
    pub duplicates: u64,
}

impl Counters {
    pub(crate) fn issued(&mut self, class: Class, chunks: u64, bytes: u64) {
        self.requests += 1;
        if let Some((count, sum)) = self.of(class) {
            *count += chunks;
            *sum += bytes;
        }
    }

    /// A chunk that was issued needed no fetch; `was_all` of its request.
    pub(crate) fn took_back(&mut self, class: Class, bytes: u64, was_all: bool) {
        self.local += 1;
        self.requests -= u64::from(was_all);
        if let Some((count, sum)) = self.of(class) {
            *count -= 1;
            *sum -= bytes;
        }
    }

    /// The counts of chunks and bytes of a class.
    fn of(&mut self, class: Class) -> Option<(&mut u64, &mut u64)> {
        match class {
            Class::Demand => None,
            Class::Trace => Some((&mut self.trace, &mut self.trace_bytes)),
            Class::ReadAhead => Some((&mut self.read_ahead, &mut self.read_ahead_bytes)),
            Class::Fill => Some((&mut self.fill, &mut self.fill_bytes)),
        }
    }
}
