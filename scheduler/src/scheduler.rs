//! The table of chunk states, and the step.

use std::collections::{BTreeMap, VecDeque};

use crate::streams::Streams;
use crate::types::{
    Action, BlobKey, ChunkEntry, ChunkKey, Class, Estimate, Event, FetchKey, FillProgress, ImageCounters, ImageKey,
    LinkKey, Now, Ticket,
};

/// Demanded chunks fetched at the same time; more wait in order. Enough to hide a round trip behind every request of a
/// queue that stalls on scattered chunks. With [`READ_AHEAD_CHUNKS_MAX`] it makes the 64 requests that the registry
/// client has under way at once, so a demand never waits there behind read-ahead.
pub const DEMAND_CHUNKS_MAX: usize = 32;

/// Chunks of read-ahead in flight, however small they are.
pub const READ_AHEAD_CHUNKS_MAX: usize = 32;

/// Bytes of read-ahead in flight: above the bandwidth-delay product of 1 Gbit/s at 20 ms (2.5 MB). It is also the most
/// that a demand can find before it on the link.
pub const READ_AHEAD_BYTES_MAX: u64 = 4 << 20;

/// How long a chunk that could not be had stays so without asking again. The kernel follows a failed read-ahead with a
/// read of each of its pages: without this a bad chunk is fetched once for each, and a registry that is down makes each
/// of them wait for the whole deadline. A program that tries again later finds what was mended.
pub const FAILURE_HOLD: Now = Now::from_secs(1);

/// Chunks held as failed at a time; more are asked for again. As many demands can fail within [`FAILURE_HOLD`] when a
/// registry refuses everything at once.
pub const FAILURES_MAX: usize = 4096;

/// The errno of a request that needs what cannot be had (Linux, `errno-base.h`).
const EIO: i32 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Absent,
    /// A demand waits for a free place in flight.
    Queued,
    InFlight,
    Present,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    stored_len_bytes: u32,
    state: State,
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    class: Class,
    stored_len_bytes: u32,
    /// Since when a demand waits for this read-ahead.
    late_hit: Option<Now>,
}

/// What has been decided so far. Chunks, if not said otherwise. Hits are not known here: a request that finds
/// everything in the store never comes by.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Device requests that waited.
    pub demands: u64,
    /// Demanded, and nobody had asked for them.
    pub misses: u64,
    /// Demanded while read-ahead was fetching them.
    pub late_hits: u64,
    /// Demanded while another demand was fetching them, or had queued them.
    pub joined: u64,
    /// Issued as read-ahead.
    pub read_ahead: u64,
    /// Bytes of those.
    pub read_ahead_bytes: u64,
    /// Fetches that ended well.
    pub fetched: u64,
    /// Fetches that ended badly.
    pub failed: u64,
    /// Fetches of a chunk that was under way or present: always 0.
    pub duplicates: u64,
}

/// The policy. See the crate's documentation.
#[derive(Debug, Default)]
pub struct Scheduler {
    blobs: BTreeMap<BlobKey, Vec<Chunk>>,
    /// What the caller is fetching, that of removed blobs included: it occupies the link until it is answered.
    in_flight: BTreeMap<ChunkKey, Flight>,
    demand_in_flight: usize,
    read_ahead_in_flight: usize,
    read_ahead_in_flight_bytes: u64,
    /// Demanded chunks in state `Queued`, each once, in the order of the demands, with the time of the first.
    queue: VecDeque<(ChunkKey, Now)>,
    /// Who waits for a chunk that is queued or in flight. A ticket that was woken early may still be listed.
    waiters: BTreeMap<ChunkKey, Vec<Ticket>>,
    /// Chunks that failed a moment ago: until when they stay so, and why. At most [`FAILURES_MAX`].
    failures: BTreeMap<ChunkKey, (Now, i32)>,
    /// How many entries of `waiters` each waiting request still has.
    tickets: BTreeMap<Ticket, usize>,
    streams: Streams,
    next_fetch: u64,
    counters: Counters,
}

impl Scheduler {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one event and appends what is to be done about it.
    pub fn step(&mut self, event: Event<'_>, now: Now, actions: &mut Vec<Action>) {
        match event {
            // Plans, fill and the estimator are being built on these.
            Event::AddImage { .. }
            | Event::RemoveImage { .. }
            | Event::SetPlan { .. }
            | Event::SetFill { .. }
            | Event::FirstByte { .. }
            | Event::Arrived { .. }
            | Event::Tick => {}
            Event::AddBlob { blob, chunks, .. } => self.add_blob(blob, chunks),
            Event::RemoveBlob { blob } => self.remove_blob(blob, actions),
            Event::Demand { ticket, chunks, .. } => self.demand(ticket, chunks, now, actions),
            Event::Touch { chunk, .. } => self.access(chunk, now),
            Event::Fetched { chunk } => self.fetched(chunk, actions),
            Event::Failed { chunk, errno } => self.failed(chunk, errno, now, actions),
            Event::Withdrawn { chunk } => self.fetched(chunk, actions),
            Event::Lost { chunk } => self.lost(chunk),
        }
        self.issue_demands(actions);
        self.issue_read_ahead(now, actions);
    }

    /// What has been decided so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether the table holds the chunk as present in the store.
    #[must_use]
    pub fn is_present(&self, chunk: ChunkKey) -> bool {
        self.chunk(chunk).is_some_and(|chunk| chunk.state == State::Present)
    }

    /// Device requests that wait now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.tickets.len()
    }

    /// What is believed of a link; `None` while nothing was seen of it.
    #[must_use]
    pub fn estimate(&self, _link: LinkKey) -> Option<Estimate> {
        None
    }

    /// What was believed of a link before: it need not be found out again.
    pub fn seed_estimate(&mut self, _link: LinkKey, _estimate: Estimate) {}

    /// What has been decided for an image; `None` if it is unknown.
    #[must_use]
    pub fn image_counters(&self, _image: ImageKey) -> Option<ImageCounters> {
        None
    }

    /// How far the fill of an image is; `None` if it has none.
    #[must_use]
    pub fn fill_progress(&self, _image: ImageKey) -> Option<FillProgress> {
        None
    }

    fn add_blob(&mut self, blob: BlobKey, chunks: &[ChunkEntry]) {
        debug_assert!(!self.blobs.contains_key(&blob), "keys are used once");
        let chunk = |entry: &ChunkEntry| Chunk {
            stored_len_bytes: entry.stored_len_bytes,
            state: if entry.present { State::Present } else { State::Absent },
        };
        self.blobs.insert(blob, chunks.iter().map(chunk).collect());
    }

    fn remove_blob(&mut self, blob: BlobKey, actions: &mut Vec<Action>) {
        self.blobs.remove(&blob);
        self.streams.remove(blob);
        self.failures.retain(|chunk, _| chunk.blob != blob);
        self.queue.retain(|(chunk, _)| chunk.blob != blob);
        let of_blob = ChunkKey { blob, chunk: 0 }..=ChunkKey { blob, chunk: u32::MAX };
        let chunks: Vec<ChunkKey> = self.waiters.range(of_blob).map(|(chunk, _)| *chunk).collect();
        for chunk in chunks {
            self.wake_with_error(chunk, EIO, actions);
        }
    }

    fn demand(&mut self, ticket: Ticket, chunks: &[ChunkKey], now: Now, actions: &mut Vec<Action>) {
        self.counters.demands += 1;
        if chunks.iter().any(|chunk| self.chunk(*chunk).is_none()) {
            actions.push(Action::Wake { ticket, outcome: Err(EIO) });
            return;
        }
        if let Some(errno) = chunks.iter().find_map(|chunk| self.recent_failure(*chunk, now)) {
            actions.push(Action::Wake { ticket, outcome: Err(errno) });
            return;
        }
        let mut waits = 0;
        for &chunk in chunks {
            self.access(chunk, now);
            if self.want(chunk, now) {
                self.waiters.entry(chunk).or_default().push(ticket);
                waits += 1;
            }
        }
        if waits == 0 {
            actions.push(Action::Wake { ticket, outcome: Ok(()) });
        } else {
            self.tickets.insert(ticket, waits);
        }
    }

    /// Makes sure that a demanded chunk is on its way; false if it is there already.
    fn want(&mut self, chunk: ChunkKey, now: Now) -> bool {
        match self.chunk(chunk).map(|chunk| chunk.state) {
            None | Some(State::Present) => return false,
            Some(State::Absent) => {
                self.counters.misses += 1;
                self.set_state(chunk, State::Queued);
                self.queue.push_back((chunk, now));
            }
            Some(State::Queued) => self.counters.joined += 1,
            Some(State::InFlight) => match self.in_flight.get_mut(&chunk) {
                Some(flight) if flight.class == Class::ReadAhead && flight.late_hit.is_none() => {
                    flight.late_hit = Some(now);
                    self.counters.late_hits += 1;
                }
                _ => self.counters.joined += 1,
            },
        }
        true
    }

    fn access(&mut self, chunk: ChunkKey, now: Now) {
        if let Some(chunks) = self.blobs.get(&chunk.blob) {
            let stored_len = |index: u32| chunks.get(index as usize).map(|chunk| chunk.stored_len_bytes);
            self.streams.access(chunk, now, stored_len);
        }
    }

    fn fetched(&mut self, chunk: ChunkKey, actions: &mut Vec<Action>) {
        if self.land(chunk).is_none() {
            return;
        }
        self.counters.fetched += 1;
        self.set_state(chunk, State::Present);
        for ticket in self.waiters.remove(&chunk).unwrap_or_default() {
            // A request that was already woken with an error is no longer in the table.
            let Some(waits) = self.tickets.get_mut(&ticket) else { continue };
            *waits -= 1;
            if *waits == 0 {
                self.tickets.remove(&ticket);
                actions.push(Action::Wake { ticket, outcome: Ok(()) });
            }
        }
    }

    /// Why the chunk cannot be had now, if that is known.
    fn recent_failure(&self, chunk: ChunkKey, now: Now) -> Option<i32> {
        self.failures.get(&chunk).filter(|(until, _)| now < *until).map(|(_, errno)| *errno)
    }

    fn failed(&mut self, chunk: ChunkKey, errno: i32, now: Now, actions: &mut Vec<Action>) {
        let Some(flight) = self.land(chunk) else { return };
        self.counters.failed += 1;
        if let (Some(since), Some(_)) = (flight.late_hit, self.chunk(chunk)) {
            // Who joined a read-ahead has waited for less time than that, and may wait for longer.
            self.set_state(chunk, State::Queued);
            self.queue.push_back((chunk, since));
        } else {
            self.set_state(chunk, State::Absent);
            self.wake_with_error(chunk, errno, actions);
            self.failures.retain(|_, (until, _)| now < *until);
            if self.chunk(chunk).is_some() && self.failures.len() < FAILURES_MAX {
                self.failures.insert(chunk, (now + FAILURE_HOLD, errno));
            }
        }
    }

    fn lost(&mut self, chunk: ChunkKey) {
        if self.is_present(chunk) {
            self.set_state(chunk, State::Absent);
        }
    }

    /// Frees the place of a fetch that ended; `None` if there was none.
    fn land(&mut self, chunk: ChunkKey) -> Option<Flight> {
        let flight = self.in_flight.remove(&chunk)?;
        match flight.class {
            Class::Demand => self.demand_in_flight -= 1,
            Class::Trace | Class::ReadAhead | Class::Fill => {
                self.read_ahead_in_flight -= 1;
                self.read_ahead_in_flight_bytes -= u64::from(flight.stored_len_bytes);
            }
        }
        Some(flight)
    }

    fn wake_with_error(&mut self, chunk: ChunkKey, errno: i32, actions: &mut Vec<Action>) {
        for ticket in self.waiters.remove(&chunk).unwrap_or_default() {
            if self.tickets.remove(&ticket).is_some() {
                actions.push(Action::Wake { ticket, outcome: Err(errno) });
            }
        }
    }

    fn issue_demands(&mut self, actions: &mut Vec<Action>) {
        while self.demand_in_flight < DEMAND_CHUNKS_MAX {
            let Some((chunk, since)) = self.queue.pop_front() else { break };
            self.issue(chunk, Class::Demand, since, actions);
        }
    }

    /// Read-ahead pauses while a demand is being fetched. A demand that joined a read-ahead does not pause it: what it
    /// waits for is already before everything that is issued now, and a steady reader always waits for something.
    fn issue_read_ahead(&mut self, now: Now, actions: &mut Vec<Action>) {
        while self.demand_in_flight == 0
            && self.read_ahead_in_flight < READ_AHEAD_CHUNKS_MAX
            && let Some(chunk) = self.streams.next()
        {
            let Some(Chunk { stored_len_bytes, state: State::Absent }) = self.chunk(chunk).copied() else { continue };
            if self.recent_failure(chunk, now).is_some() {
                continue;
            }
            if self.read_ahead_in_flight_bytes + u64::from(stored_len_bytes) > READ_AHEAD_BYTES_MAX {
                self.streams.put_back();
                break;
            }
            self.issue(chunk, Class::ReadAhead, now, actions);
        }
    }

    fn issue(&mut self, chunk: ChunkKey, class: Class, since: Now, actions: &mut Vec<Action>) {
        let Some(stored_len_bytes) = self.chunk(chunk).map(|chunk| chunk.stored_len_bytes) else { return };
        self.set_state(chunk, State::InFlight);
        if self.in_flight.insert(chunk, Flight { class, stored_len_bytes, late_hit: None }).is_some() {
            debug_assert!(false, "{chunk:?} is in flight already");
            self.counters.duplicates += 1;
        }
        match class {
            Class::Demand => self.demand_in_flight += 1,
            Class::Trace | Class::ReadAhead | Class::Fill => {
                self.read_ahead_in_flight += 1;
                self.read_ahead_in_flight_bytes += u64::from(stored_len_bytes);
                self.counters.read_ahead += 1;
                self.counters.read_ahead_bytes += u64::from(stored_len_bytes);
            }
        }
        let fetch = FetchKey(self.next_fetch);
        self.next_fetch += 1;
        let chunks = chunk.chunk..chunk.chunk + 1;
        actions.push(Action::Fetch { fetch, blob: chunk.blob, chunks, class, since });
    }

    fn chunk(&self, key: ChunkKey) -> Option<&Chunk> {
        self.blobs.get(&key.blob)?.get(key.chunk as usize)
    }

    /// Does nothing for a chunk of a removed blob.
    fn set_state(&mut self, key: ChunkKey, state: State) {
        if let Some(chunk) = self.blobs.get_mut(&key.blob).and_then(|chunks| chunks.get_mut(key.chunk as usize)) {
            chunk.state = state;
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
