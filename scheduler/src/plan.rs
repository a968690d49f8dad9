//! A recorded start while it is replayed: what comes next, and where the reader is.
//!
//! Entries are fetched in their order, which is the best there is (see [`crate::bound`]). The position is the highest
//! rank that was read; it lags behind what has been fetched, or waits for it. When reads come from far beyond what has
//! been asked for, the recording had a part that this start leaves out, or takes in another order: the plan goes on
//! from where the reader is, and what was skipped comes last. Entries whose fetch failed come after that.
//!
//! Entries that most recordings did not have come after all others; the position and the guard know nothing of them.

use std::collections::VecDeque;
use std::ops::Range;

use crate::guard::{Guard, Level};
use crate::types::{ChunkKey, Now, PlanEntry, PlanProgress};

/// Entries with less confidence are fetched after the others: half of the recordings.
const CONFIDENCE_IN_ORDER_MIN: u8 = 128;

/// Entries with less confidence are not fetched: a fifth of the recordings.
const CONFIDENCE_MIN: u8 = 51;

/// Ranks by which reads of one start may come in another order. Of 1381 chunks of a start with several threads, 99 % came
/// within 61 of their rank.
const REORDER_RANKS: u32 = 64;

/// Reads among which the strays are counted, and strays that make a jump.
const READS: usize = 4;
const STRAYS: usize = 3;

/// Jumps of one plan: it bounds the list of skipped parts. A start has few phases; one that jumps more often than that
/// is not in the plan's order at all.
const JUMPS_MAX: u32 = 64;

/// Rest of a plan after a read that it does not know, unless one comes that it knows: two round trips and more. While the
/// program misses one chunk after another that no plan told of, nothing is put before the next miss.
const PAUSE: Now = Now::from_millis(50);

/// Times that an entry is asked for again after its fetch failed.
const RETRIES_MAX: u8 = 3;

/// What can be done about an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    Fetch,
    /// It is there, under way, or not to be had.
    Nothing,
    /// It failed a moment ago.
    Later(Now),
}

/// The plan of one image.
#[derive(Debug)]
pub(crate) struct Plan {
    entries: Vec<ChunkKey>,
    /// Entries from here on are the unsure ones.
    sure: u32,
    /// Ranks by chunk, sorted.
    ranks: Vec<(ChunkKey, u32)>,
    /// A bit for each rank that was read.
    read: Vec<u64>,
    /// A bit for each rank that need not be, because it was pushed; none before the first is.
    pushed: Vec<u64>,
    /// Ranks to be considered now, and the parts that were skipped, in ascending order.
    current: Range<u32>,
    skipped: Vec<Range<u32>>,
    /// Ranks whose fetch failed, and when to ask again.
    retries: VecDeque<(Now, u32)>,
    /// The last reads: the rank, if it strayed.
    strays: VecDeque<Option<u32>>,
    jumps: u32,
    /// The last read was none of ours: wait for one that is, or until this.
    paused_until: Now,
    position: u32,
    /// Ranks before this one were judged.
    judged: u32,
    guard: Guard,
    /// The next chunk that the plan does not know is read in place of a frame that it does.
    stands_in: bool,
    byte_cap: u64,
    spent_bytes: u64,
}

impl Plan {
    /// `is_known` tells the chunks that exist.
    pub(crate) fn new(entries: &[PlanEntry], byte_cap: u64, is_known: impl Fn(ChunkKey) -> bool) -> Self {
        let mut firsts: Vec<(ChunkKey, usize)> = entries.iter().map(|entry| entry.chunk).zip(0..).collect();
        firsts.sort_unstable();
        firsts.dedup_by_key(|(chunk, _)| *chunk);
        firsts.retain(|(chunk, _)| is_known(*chunk));
        firsts.sort_unstable_by_key(|(_, at)| *at);
        let with = |confidence: Range<u16>| {
            let of = |at: usize| entries.get(at).map_or(0, |entry| u16::from(entry.confidence));
            firsts.iter().filter(move |(_, at)| confidence.contains(&of(*at))).map(|(chunk, _)| *chunk)
        };
        let mut order: Vec<ChunkKey> = with(u16::from(CONFIDENCE_IN_ORDER_MIN)..256).collect();
        let sure = len(&order);
        order.extend(with(u16::from(CONFIDENCE_MIN)..u16::from(CONFIDENCE_IN_ORDER_MIN)));
        let mut ranks: Vec<(ChunkKey, u32)> = order.iter().copied().zip(0..).collect();
        ranks.sort_unstable();
        Self {
            sure,
            ranks,
            read: vec![0; order.len().div_ceil(64)],
            pushed: Vec::new(),
            current: 0..len(&order),
            entries: order,
            skipped: Vec::new(),
            retries: VecDeque::new(),
            strays: VecDeque::new(),
            jumps: 0,
            paused_until: Now::ZERO,
            position: 0,
            judged: 0,
            guard: Guard::default(),
            stands_in: false,
            byte_cap,
            spent_bytes: 0,
        }
    }

    pub(crate) fn rank(&self, chunk: ChunkKey) -> Option<u32> {
        let at = self.ranks.binary_search_by_key(&chunk, |(chunk, _)| *chunk).ok()?;
        self.ranks.get(at).map(|(_, rank)| *rank)
    }

    pub(crate) fn level(&self) -> Level {
        self.guard.level()
    }

    pub(crate) fn progress(&self) -> PlanProgress {
        let is_dropped = self.level() == Level::Dropped;
        PlanProgress { position: self.position, steps: len(&self.entries), is_dropped }
    }

    /// Nothing is left to ask for.
    pub(crate) fn is_over(&self) -> bool {
        self.current.is_empty() && self.skipped.is_empty() && self.retries.is_empty()
    }

    /// Something is left to ask for, and worth it.
    pub(crate) fn is_followed(&self) -> bool {
        !self.is_over() && self.level() != Level::Dropped
    }

    /// Whether the plan asks for this rank at its present level.
    pub(crate) fn is_open(&self, rank: u32) -> bool {
        rank < self.sure || self.level() == Level::Followed
    }

    /// Bytes that may still be fetched.
    pub(crate) fn left_bytes(&self) -> u64 {
        self.byte_cap - self.spent_bytes
    }

    pub(crate) fn spend(&mut self, bytes: u64) {
        self.spent_bytes = self.byte_cap.min(self.spent_bytes + bytes);
    }

    /// Bytes that were spent needed no fetch.
    pub(crate) fn take_back(&mut self, bytes: u64) {
        self.spent_bytes = self.spent_bytes.saturating_sub(bytes);
    }

    pub(crate) fn spent_bytes(&self) -> u64 {
        self.spent_bytes
    }

    /// The first entry that is to be fetched. What needs nothing is passed for good.
    pub(crate) fn peek(&mut self, now: Now, want: impl Fn(ChunkKey) -> Want) -> Option<(u32, ChunkKey)> {
        if self.level() == Level::Dropped || now < self.paused_until {
            return None;
        }
        loop {
            let end = if self.level() == Level::Followed { self.current.end } else { self.current.end.min(self.sure) };
            while self.current.start < end {
                let rank = self.current.start;
                let chunk = *self.entries.get(rank as usize)?;
                match want(chunk) {
                    Want::Fetch => return Some((rank, chunk)),
                    Want::Nothing => {}
                    Want::Later(at) => self.retries.push_back((at, rank)),
                }
                self.current.start += 1;
            }
            if self.current.start < self.current.end {
                return None;
            }
            if self.skipped.is_empty() {
                return self.peek_retry(now, want);
            }
            self.current = self.skipped.remove(0);
        }
    }

    fn peek_retry(&mut self, now: Now, want: impl Fn(ChunkKey) -> Want) -> Option<(u32, ChunkKey)> {
        // Each entry is looked at once.
        for _ in 0..self.retries.len() {
            let (at, rank) = *self.retries.front()?;
            if now < at {
                return None;
            }
            let chunk = *self.entries.get(rank as usize)?;
            match want(chunk) {
                Want::Fetch => return Some((rank, chunk)),
                Want::Nothing => {}
                Want::Later(at) => self.retries.push_back((at, rank)),
            }
            self.retries.pop_front();
        }
        None
    }

    /// When [`Self::peek`] may have something that it has not now.
    pub(crate) fn retry_at(&self) -> Option<Now> {
        if !self.is_followed() {
            return None;
        }
        let retry_at = self.retries.front().filter(|_| self.current.is_empty()).map_or(Now::ZERO, |(at, _)| *at);
        Some(retry_at.max(self.paused_until))
    }

    /// The fetch of an entry failed for the `failures`th time. Whether it will be asked for again.
    pub(crate) fn failed(&mut self, chunk: ChunkKey, failures: u8, retry_at: Now) -> bool {
        let rank = self.rank(chunk).filter(|_| failures <= RETRIES_MAX);
        self.retries.extend(rank.map(|rank| (retry_at, rank)));
        rank.is_some()
    }

    /// A block is read whose frame is not there: the next chunk that the plan does not know stands in for it.
    pub(crate) fn avoided(&mut self) {
        self.stands_in = true;
    }

    /// Blocks of a chunk are pushed: the guard does not ask whether it was read.
    pub(crate) fn pushed(&mut self, chunk: ChunkKey) {
        let Some(rank) = self.rank(chunk) else { return };
        self.pushed.resize(self.read.len(), 0);
        self.pushed[rank as usize / 64] |= 1 << (rank % 64);
    }

    /// A chunk is read. `is_first` says whether it is so for the first time, for chunks that the plan does not know.
    /// Returns whether the plan knows the chunk.
    pub(crate) fn read(&mut self, chunk: ChunkKey, is_first: bool, now: Now) -> bool {
        let Some(rank) = self.rank(chunk) else {
            let stands_in = std::mem::take(&mut self.stands_in);
            if is_first && !stands_in {
                self.guard.read(false);
                self.paused_until = now + PAUSE;
            }
            return false;
        };
        let (word, bit) = (rank as usize / 64, 1 << (rank % 64));
        if self.read[word] & bit != 0 {
            return true;
        }
        self.read[word] |= bit;
        let strayed = rank < self.sure && self.locate(rank);
        if !strayed {
            self.guard.read(true);
            self.paused_until = Now::ZERO;
        }
        true
    }

    /// Takes note of where the reader is. Whether that is far from where the plan expects it.
    fn locate(&mut self, rank: u32) -> bool {
        let strayed = rank > self.current.start.saturating_add(REORDER_RANKS) && self.is_pending(rank)
            || self.skipped.iter().any(|part| part.contains(&rank));
        self.strays.push_back(strayed.then_some(rank));
        if self.strays.len() > READS {
            self.strays.pop_front();
        }
        if strayed {
            let first = self.strays.iter().flatten().copied().filter(|rank| self.is_pending(*rank)).min();
            if self.strays.iter().flatten().count() >= STRAYS
                && let Some(first) = first
            {
                self.jump(first);
            }
            return true;
        }
        self.position = self.position.max(rank);
        while self.judged + REORDER_RANKS < self.position {
            let (word, bit) = (self.judged as usize / 64, 1 << (self.judged % 64));
            if self.pushed.get(word).is_none_or(|pushed| pushed & bit == 0) {
                self.guard.due(self.read[word] & bit != 0);
            }
            self.judged += 1;
        }
        false
    }

    fn is_pending(&self, rank: u32) -> bool {
        self.current.contains(&rank) || self.skipped.iter().any(|part| part.contains(&rank))
    }

    /// Goes on at `rank`; what lies before it comes last.
    fn jump(&mut self, rank: u32) {
        if self.jumps >= JUMPS_MAX {
            return;
        }
        self.jumps += 1;
        self.guard.jumped();
        self.strays.clear();
        let current = std::mem::replace(&mut self.current, 0..0);
        self.skipped.push(current);
        let Some(at) = self.skipped.iter().position(|part| part.contains(&rank)) else { return };
        let part = self.skipped.remove(at);
        self.current = rank..part.end;
        self.skipped.push(part.start..rank);
        self.skipped.retain(|part| !part.is_empty());
        self.skipped.sort_unstable_by_key(|part| part.start);
        // What lies beyond a part that was skipped goes on after it.
        (self.position, self.judged) = (rank, rank);
    }
}

fn len<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
