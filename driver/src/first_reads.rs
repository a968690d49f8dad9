//! Which blocks of a device have been read, and how the first read of each went.
//!
//! Above the device lies the page cache, so the first read of a block is the only one that a start waits for; a repeated
//! one is a page that the kernel dropped. Each request that reads a block for the first time is counted once, when it is
//! answered: a *hit* did not wait, a *late hit* waited for bytes that were on their way, a *miss* for bytes that nobody had
//! asked for. While a recorder runs it also gets the blocks, in the order in which they were asked for. Blocks that are
//! given to a warmer (see [`crate::warm`]) are nobody's read, whoever asks for them: requests for nothing else are counted
//! apart, as *pushed*, and are not recorded.
//!
//! On the path of a hit there are a few atomics, no lock, no allocation and no log; the clock is read only when a block is
//! new. The metadata is local before the device starts, and the zeros at its end are nobody's: neither is counted.
//!
//! **The clock of a start** ([`FirstReads::start_clock_us`]) stands still while any request waits for the network. Its
//! differences are the time that the reader spent between two reads, whatever the link was like: what a trace keeps, and
//! what the lower bound is computed from. Reads ahead of the reader stop it as well, which makes the bound lower, never
//! higher.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::latency::{Latencies, ReadLatencies};
use crate::start_events::ReadOutcome;

/// First reads that wait for the recorder: 1.5 MiB while one runs. It looks every 250 ms at the latest, so that this is
/// enough for 260 000 first reads a second, more than a queue thread answers; what is beyond is counted as lost.
const PENDING_MAX: usize = 1 << 16;

/// No such moment yet.
const NEVER_US: u64 = u64::MAX;

/// A bit for each block.
type Bits = Box<[AtomicU64]>;

/// A run of device blocks that were read for the first time by one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FirstRead {
    pub(crate) start_block: u32,
    pub(crate) len_blocks: u32,
    /// On the clock of the start.
    pub(crate) at_us: u64,
}

/// Why a request waited, if it did; set by the engine before it wakes the request. The worst of several waits counts.
#[derive(Debug, Default)]
pub struct Waited(AtomicU8);

impl Waited {
    const LATE_HIT: u8 = 1;
    const MISS: u8 = 2;

    pub(crate) fn note(&self, is_miss: bool) {
        self.0.fetch_max(if is_miss { Self::MISS } else { Self::LATE_HIT }, Ordering::AcqRel);
    }

    fn is_miss(&self) -> bool {
        // One that the engine never saw, because it has stopped, found nobody who had asked for its bytes.
        self.0.load(Ordering::Acquire) != Self::LATE_HIT
    }
}

/// One request of the device, from its arrival to its answer. Made by `ServedImage::begin`, ended by `answered`.
#[derive(Debug, Default)]
pub struct DeviceRead {
    /// When it came, and the blocks that it reads for the first time; none if there are none.
    first: Option<(Instant, u32)>,
    /// All of those were given to a warmer.
    is_pushed: bool,
    waiting: Option<(Instant, Arc<Waited>)>,
}

/// How a first read ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FirstReadEnd {
    pub(crate) outcome: ReadOutcome,
    /// When it came.
    pub(crate) at: Instant,
    /// Blocks that it read for the first time.
    pub(crate) blocks: u32,
    /// How long it waited.
    pub(crate) stall: Duration,
}

/// How the requests went that read a block for the first time.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstReadStatistics {
    /// Requests that did not wait.
    pub hits: u64,
    /// Requests that waited for bytes that were on their way already.
    pub late_hits: u64,
    /// Requests that waited for bytes that nobody had asked for.
    pub misses: u64,
    /// Time that those waited, summed over requests.
    pub stall_us: u64,
    /// Blocks read at least once.
    pub blocks: u64,
    /// Requests for nothing but blocks that were given to a warmer; not among those above.
    #[serde(default)]
    pub pushed: u64,
    /// Blocks of those; not among those above.
    #[serde(default)]
    pub pushed_blocks: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    requests: u32,
    since_us: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct FirstReads {
    began: Instant,
    /// The device blocks of the layer blobs.
    blocks: Range<u32>,
    /// A bit for each of them: 32 KiB for each GiB of image.
    seen: Bits,
    /// The same for those that were given to a warmer; none before there is one.
    given: OnceLock<Bits>,
    hits: AtomicU64,
    late_hits: AtomicU64,
    misses: AtomicU64,
    stall_us: AtomicU64,
    seen_blocks: AtomicU64,
    pushed: AtomicU64,
    pushed_blocks: AtomicU64,
    latencies: Latencies,
    /// On the clock of the start.
    first_at_us: AtomicU64,
    /// Taken by requests that wait only.
    waiting: Mutex<Waiting>,
    /// What `waiting` says, for those who do not take it: since when, and how long before that.
    waiting_since_us: AtomicU64,
    stood_still_us: AtomicU64,
    is_recording: AtomicBool,
    pending: OnceLock<ArrayQueue<FirstRead>>,
    lost: AtomicU64,
}

impl FirstReads {
    /// For a device whose layer blobs lie at `blocks`, and which began to be attached at `began`.
    pub(crate) fn new(blocks: Range<u32>, began: Instant) -> Self {
        Self {
            began,
            seen: no_bits(&blocks),
            given: OnceLock::new(),
            blocks,
            hits: AtomicU64::new(0),
            late_hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            stall_us: AtomicU64::new(0),
            seen_blocks: AtomicU64::new(0),
            pushed: AtomicU64::new(0),
            pushed_blocks: AtomicU64::new(0),
            latencies: Latencies::default(),
            first_at_us: AtomicU64::new(NEVER_US),
            waiting: Mutex::default(),
            waiting_since_us: AtomicU64::new(NEVER_US),
            stood_still_us: AtomicU64::new(0),
            is_recording: AtomicBool::new(false),
            pending: OnceLock::new(),
            lost: AtomicU64::new(0),
        }
    }

    /// A request has arrived.
    pub(crate) fn begin(&self, blocks: Range<u32>) -> DeviceRead {
        let Some(blocks) = self.within(&blocks).filter(|blocks| self.any_new(blocks)) else {
            return DeviceRead::default();
        };
        let at = Instant::now();
        let at_us = self.start_clock_us_at(at);
        let is_recording = self.is_recording.load(Ordering::Acquire);
        let (mut new_blocks, mut given_blocks) = (0, 0);
        self.mark(&blocks, |run| {
            let len_blocks = run.end - run.start;
            new_blocks += len_blocks;
            if self.is_given(&run) {
                given_blocks += len_blocks;
            } else if is_recording {
                self.record(&FirstRead { start_block: run.start, len_blocks, at_us });
            }
        });
        if new_blocks == 0 {
            return DeviceRead::default();
        }
        let is_pushed = given_blocks == new_blocks;
        if !is_pushed {
            self.seen_blocks.fetch_add(u64::from(new_blocks), Ordering::Relaxed);
            self.first_at_us.fetch_min(at_us, Ordering::Relaxed);
        }
        DeviceRead { first: Some((at, new_blocks)), is_pushed, waiting: None }
    }

    /// Gives blocks to a warmer: reads of them are pushes from now on.
    pub(crate) fn give(&self, blocks: &Range<u32>) {
        let given = self.given.get_or_init(|| no_bits(&self.blocks));
        if let Some(blocks) = self.within(blocks) {
            for (_, word, mask) in self.words(given, &blocks) {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Whether all of these blocks were given to a warmer.
    pub(crate) fn is_given(&self, blocks: &Range<u32>) -> bool {
        let Some(given) = self.given.get() else { return false };
        let all =
            |blocks| self.words(given, &blocks).all(|(_, word, mask)| word.load(Ordering::Relaxed) & mask == mask);
        self.within(blocks).is_some_and(all)
    }

    /// The request is about to wait. Gives what the engine notes the reason in.
    pub(crate) fn wait(&self, read: &mut DeviceRead) -> Arc<Waited> {
        if let Some((_, waited)) = &read.waiting {
            return Arc::clone(waited);
        }
        let mut waiting = self.waiting.lock();
        waiting.requests += 1;
        if waiting.requests == 1 {
            waiting.since_us = self.elapsed_us();
            self.waiting_since_us.store(waiting.since_us, Ordering::Release);
        }
        drop(waiting);
        let waited = Arc::new(Waited::default());
        read.waiting = Some((Instant::now(), Arc::clone(&waited)));
        waited
    }

    /// The request was answered, with data or with an error; says how it went if it is a first read.
    pub(crate) fn answered(&self, read: &DeviceRead, with_data: bool) -> Option<FirstReadEnd> {
        let (outcome, stall) = match &read.waiting {
            None => (ReadOutcome::Hit, Duration::ZERO),
            Some((since, waited)) => {
                self.waits_no_more();
                let outcome = if waited.is_miss() { ReadOutcome::Miss } else { ReadOutcome::LateHit };
                (outcome, since.elapsed())
            }
        };
        if with_data && !read.is_pushed {
            match (outcome, read.first) {
                (ReadOutcome::Hit, Some((at, _))) => self.latencies.note(outcome, at.elapsed()),
                // What was read before costs nobody a look at the clock.
                (ReadOutcome::Hit, None) => {}
                _ => self.latencies.note(outcome, stall),
            }
        }
        let (at, blocks) = read.first.filter(|_| with_data)?;
        if read.is_pushed {
            self.pushed.fetch_add(1, Ordering::Relaxed);
            self.pushed_blocks.fetch_add(u64::from(blocks), Ordering::Relaxed);
            return None;
        }
        let counter = match outcome {
            ReadOutcome::Hit => &self.hits,
            ReadOutcome::LateHit => &self.late_hits,
            ReadOutcome::Miss => &self.misses,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if outcome != ReadOutcome::Hit {
            self.stall_us.fetch_add(micros(stall.as_micros()), Ordering::Relaxed);
        }
        Some(FirstReadEnd { outcome, at, blocks, stall })
    }

    fn waits_no_more(&self) {
        let mut waiting = self.waiting.lock();
        waiting.requests -= 1;
        if waiting.requests == 0 {
            let stood_still_us = self.elapsed_us().saturating_sub(waiting.since_us);
            self.stood_still_us.fetch_add(stood_still_us, Ordering::AcqRel);
            self.waiting_since_us.store(NEVER_US, Ordering::Release);
        }
    }

    /// Time since attaching began without that in which a request waited.
    pub(crate) fn start_clock_us(&self) -> u64 {
        self.start_clock_us_at(Instant::now())
    }

    fn start_clock_us_at(&self, at: Instant) -> u64 {
        let waiting_since_us = self.waiting_since_us.load(Ordering::Acquire);
        let stood_still_us = self.stood_still_us.load(Ordering::Acquire);
        // Between the two loads a wait may have ended: the clock is then early by it for this once.
        let elapsed_us = micros(at.saturating_duration_since(self.began).as_micros());
        elapsed_us.min(waiting_since_us).saturating_sub(stood_still_us)
    }

    /// Time since attaching began.
    pub(crate) fn elapsed_us(&self) -> u64 {
        micros(self.began.elapsed().as_micros())
    }

    /// The first of all first reads, on the clock of the start.
    pub(crate) fn first_at_us(&self) -> Option<u64> {
        Some(self.first_at_us.load(Ordering::Relaxed)).filter(|at_us| *at_us != NEVER_US)
    }

    /// Whether a device block has been read.
    pub(crate) fn has_seen(&self, block: u32) -> bool {
        self.blocks.contains(&block) && !self.any_new(&(block..block + 1))
    }

    pub(crate) fn statistics(&self) -> FirstReadStatistics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FirstReadStatistics {
            hits: load(&self.hits),
            late_hits: load(&self.late_hits),
            misses: load(&self.misses),
            stall_us: load(&self.stall_us),
            blocks: load(&self.seen_blocks),
            pushed: load(&self.pushed),
            pushed_blocks: load(&self.pushed_blocks),
        }
    }

    pub(crate) fn latencies(&self) -> ReadLatencies {
        self.latencies.statistics()
    }

    /// From now on first reads are kept for [`FirstReads::pop`]. False if that is so already.
    pub(crate) fn start_recording(&self) -> bool {
        let pending = self.pending.get_or_init(|| ArrayQueue::new(PENDING_MAX));
        if self.is_recording.load(Ordering::Acquire) {
            return false;
        }
        while pending.pop().is_some() {}
        self.lost.store(0, Ordering::Relaxed);
        !self.is_recording.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn stop_recording(&self) {
        self.is_recording.store(false, Ordering::Release);
    }

    /// The oldest first read that was not taken yet.
    pub(crate) fn pop(&self) -> Option<FirstRead> {
        self.pending.get()?.pop()
    }

    /// First reads since the recording began for which there was no room.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn record(&self, read: &FirstRead) {
        if self.pending.get().is_none_or(|pending| pending.push(*read).is_err()) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Most requests of a warm device are for blocks that were read: look before writing to a line that others read.
    fn any_new(&self, blocks: &Range<u32>) -> bool {
        self.words(&self.seen, blocks).any(|(_, word, mask)| word.load(Ordering::Relaxed) & mask != mask)
    }

    /// What of a range of device blocks is ours, if anything is.
    fn within(&self, blocks: &Range<u32>) -> Option<Range<u32>> {
        let ours = blocks.start.max(self.blocks.start)..blocks.end.min(self.blocks.end);
        (!ours.is_empty()).then_some(ours)
    }

    /// Marks blocks as read, and tells the runs that were not.
    fn mark(&self, blocks: &Range<u32>, mut new: impl FnMut(Range<u32>)) {
        let mut run: Range<u32> = 0..0;
        for (first_block, word, mask) in self.words(&self.seen, blocks) {
            let mut rest = mask & !word.fetch_or(mask, Ordering::Relaxed);
            while rest != 0 {
                let from = rest.trailing_zeros();
                let len = (rest >> from).trailing_ones();
                let start = first_block + from;
                if run.end != start || run.is_empty() {
                    if !run.is_empty() {
                        new(run);
                    }
                    run = start..start;
                }
                run.end = start + len;
                rest &= !bits(from, len);
            }
        }
        if !run.is_empty() {
            new(run);
        }
    }

    /// The words of a range of device blocks within ours, each with its first device block and the bits that are meant.
    fn words<'a>(&self, of: &'a Bits, blocks: &Range<u32>) -> impl Iterator<Item = (u32, &'a AtomicU64, u64)> {
        let (start, end) = (blocks.start - self.blocks.start, blocks.end - self.blocks.start);
        let ours = self.blocks.start;
        (start / u64::BITS..end.div_ceil(u64::BITS)).map(move |word| {
            let first = word * u64::BITS;
            let from = start.saturating_sub(first);
            let len = (end - first).min(u64::BITS) - from;
            (ours + first, &of[word as usize], bits(from, len))
        })
    }
}

/// None of the bits of so many blocks.
fn no_bits(blocks: &Range<u32>) -> Bits {
    (0..blocks.len().div_ceil(u64::BITS as usize)).map(|_| AtomicU64::new(0)).collect()
}

/// `len` bits from `from` on; at least one, within 64.
fn bits(from: u32, len: u32) -> u64 {
    (u64::MAX >> (u64::BITS - len)) << from
}

fn micros(us: u128) -> u64 {
    u64::try_from(us).unwrap_or(u64::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::time::Duration;

    fn recorded(reads: &FirstReads) -> Vec<(u32, u32)> {
        std::iter::from_fn(|| reads.pop()).map(|read| (read.start_block, read.len_blocks)).collect()
    }

    #[test]
    fn each_block_is_new_once_and_runs_are_whole() {
        let reads = FirstReads::new(10..1000, Instant::now());
        assert!(reads.start_recording());
        assert!(!reads.start_recording(), "one recorder at a time");
        for (start, end) in [(0, 20), (15, 200), (12, 15), (300, 301), (290, 310), (900, 5000), (0, 10), (1000, 1256)] {
            let read = reads.begin(start..end);
            reads.answered(&read, true);
        }
        assert_eq!(recorded(&reads), [(10, 10), (20, 180), (300, 1), (290, 10), (301, 9), (900, 100)]);
        assert_eq!(reads.statistics(), FirstReadStatistics { hits: 5, blocks: 310, ..Default::default() });
        assert!(reads.has_seen(10) && reads.has_seen(999) && !reads.has_seen(9) && !reads.has_seen(1000));
        reads.stop_recording();
        reads.begin(500..501);
        assert_eq!(recorded(&reads), []);
    }

    #[test]
    fn a_wait_is_a_late_hit_or_a_miss_and_stops_the_clock() {
        let reads = FirstReads::new(0..100, Instant::now());
        let mut late = reads.begin(0..1);
        let mut missing = reads.begin(1..2);
        let mut known = reads.begin(0..2);
        reads.wait(&mut late).note(false);
        let waited = reads.wait(&mut missing);
        waited.note(true);
        reads.wait(&mut missing).note(false);
        reads.wait(&mut known).note(true);
        let clock_us = reads.start_clock_us();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(reads.start_clock_us(), clock_us);
        for read in [&late, &missing, &known] {
            reads.answered(read, true);
        }
        let statistics = reads.statistics();
        assert_eq!((statistics.hits, statistics.late_hits, statistics.misses), (0, 1, 1));
        assert!(statistics.stall_us >= 40_000, "{statistics:?}");
        assert!(reads.elapsed_us() >= reads.start_clock_us() + 20_000);
        assert!(reads.first_at_us() <= Some(clock_us));
    }

    #[test]
    fn an_answer_that_is_an_error_is_no_read() {
        let reads = FirstReads::new(0..100, Instant::now());
        let mut read = reads.begin(0..1);
        reads.wait(&mut read);
        reads.answered(&read, false);
        assert_eq!(reads.statistics(), FirstReadStatistics { blocks: 1, ..Default::default() });
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let reads = FirstReads::new(0..u32::try_from(PENDING_MAX).unwrap() + 7, Instant::now());
        reads.start_recording();
        for block in reads.blocks.clone() {
            reads.begin(block..block + 1);
        }
        assert_eq!((recorded(&reads).len(), reads.lost()), (PENDING_MAX, 7));
    }

    #[test]
    fn what_a_warmer_was_given_is_counted_apart_and_not_recorded() {
        let reads = FirstReads::new(10..1000, Instant::now());
        reads.start_recording();
        let read = |blocks| {
            let read = reads.begin(blocks);
            assert_eq!(reads.answered(&read, true).is_some(), !read.is_pushed && read.first.is_some());
        };
        read(100..104);
        reads.give(&(0..20));
        reads.give(&(100..200));
        assert!(reads.is_given(&(0..20)) && reads.is_given(&(100..200)) && !reads.is_given(&(100..201)));
        assert!(!reads.is_given(&(0..10)), "metadata is nobody's");
        read(100..128);
        read(10..20);
        read(190..210);
        read(10..20);
        let statistics = reads.statistics();
        assert_eq!((statistics.pushed, statistics.pushed_blocks), (2, 24 + 10));
        assert_eq!((statistics.hits, statistics.blocks), (2, 4 + 20), "who reads more than was given reads it");
        assert_eq!(recorded(&reads), [(100, 4), (190, 20)]);
    }

    proptest! {
        #[test]
        fn like_a_set_of_blocks(ranges in prop::collection::vec((0u32..600, 1u32..200), 1..40)) {
            let reads = FirstReads::new(70..500, Instant::now());
            reads.start_recording();
            let mut seen = BTreeSet::new();
            for (start, len) in ranges {
                reads.begin(start..start + len);
                let new: Vec<u32> = (start.max(70)..(start + len).min(500)).filter(|block| seen.insert(*block)).collect();
                let told: Vec<u32> = recorded(&reads).iter().flat_map(|&(start, len)| start..start + len).collect();
                prop_assert_eq!(told, new);
            }
            prop_assert_eq!(reads.statistics().blocks, seen.len() as u64);
        }
    }
}
