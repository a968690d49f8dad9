//! What a link can do, as BBR finds it out: the most that it delivered, and the least time to a first byte.
//!
//! A request remembers how much had been delivered when it was issued; when its bytes are there, what was delivered
//! since, over the time since, is a sample of the delivery rate. The bandwidth is the largest sample of the last
//! seconds, the round trip the least time to a first byte: queues of our own making enter neither. Chunks count when
//! they are complete, so a short sample may take in bytes that came before it; once a link is known, samples take two
//! round trips. A sample taken while there was nothing to ask for says less than the link can do; it counts only if it
//! is the largest.
//!
//! A new link starts with a modest window that grows, at least twofold each round trip, until the bandwidth grows by
//! less than a quarter; from then on the window follows the estimate, see [`Estimator::window_bytes`].

use crate::types::{Estimate, Now};

/// The bandwidth-delay product is taken to be at least this: below it the size of chunks decides what keeps a link busy.
pub const PRODUCT_BYTES_MIN: u64 = 256 << 10;

/// A chunk of the largest size.
const CHUNK_BYTES: u64 = 256 << 10;

/// The largest window: twice the product of 1 Gbit/s and 130 ms, or of 10 Gbit/s and 13 ms.
pub const WINDOW_BYTES_MAX: u64 = 32 << 20;

/// How long a sample of the delivery rate counts, at least; at most twice as long. Ten round trips of a slow link.
const BANDWIDTH_SPAN: Now = Now::from_secs(5);

/// How long a time to first byte counts. Longer: while a long fetch keeps a link full there is no better sample, and
/// paths change less than their load.
const ROUND_TRIP_SPAN: Now = Now::from_secs(60);

/// Window of a new link as a multiple of the product so far. The product of a link that is not full yet is a little less
/// than the window, so this doubles it; of one that is full, it is three times what is needed, for two round trips.
const STARTUP_GAIN: u64 = 3;

/// Round trips in a row without a quarter more bandwidth that end the start-up. One may be chance.
const STARTUP_ROUNDS: u32 = 2;

/// The best of the samples of the last one to two spans.
#[derive(Debug, Default, Clone, Copy)]
struct Best {
    /// When `current` was begun; none while it holds a seed.
    since: Option<Now>,
    current: Option<u64>,
    before: Option<u64>,
}

impl Best {
    fn add(&mut self, sample: u64, now: Now, span: Now, better: fn(u64, u64) -> u64) {
        let since = *self.since.get_or_insert(now);
        let age = now.saturating_sub(since);
        if age >= span {
            self.before = if age < 2 * span { self.current } else { None };
            (self.since, self.current) = (Some(now), None);
        }
        self.current = Some(self.current.map_or(sample, |current| better(current, sample)));
    }

    fn get(&self, better: fn(u64, u64) -> u64) -> Option<u64> {
        match (self.current, self.before) {
            (Some(current), Some(before)) => Some(better(current, before)),
            (one, None) | (None, one) => one,
        }
    }
}

/// What a request remembers of the moment at which it was issued.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark {
    pub(crate) at: Now,
    delivered_bytes: u64,
    /// The link was not kept busy.
    idle: bool,
}

#[derive(Debug, Clone, Copy)]
struct Startup {
    bandwidth: u64,
    rounds: u32,
}

/// The estimator of one link.
#[derive(Debug)]
pub(crate) struct Estimator {
    bandwidth: Best,
    round_trip_ns: Best,
    delivered_bytes: u64,
    /// A request issued when this much was delivered ends the round.
    round_end_bytes: u64,
    /// The ends of the last two rounds.
    rounds: [Option<Mark>; 2],
    /// Until this much is delivered, requests were issued with too little in flight.
    idle_end_bytes: u64,
    startup: Option<Startup>,
}

impl Default for Estimator {
    fn default() -> Self {
        Self {
            bandwidth: Best::default(),
            round_trip_ns: Best::default(),
            delivered_bytes: 0,
            round_end_bytes: 0,
            rounds: [None; 2],
            idle_end_bytes: 0,
            startup: Some(Startup { bandwidth: 0, rounds: 0 }),
        }
    }
}

impl Estimator {
    /// Takes over what was believed before, and leaves the start-up out.
    pub(crate) fn seed(&mut self, estimate: Estimate) {
        let round_trip_ns = nanoseconds(estimate.round_trip);
        self.bandwidth = Best { current: Some(estimate.bandwidth_bytes_per_second), ..Best::default() };
        self.round_trip_ns = Best { current: Some(round_trip_ns), ..Best::default() };
        self.startup = None;
    }

    pub(crate) fn get(&self) -> Option<Estimate> {
        Some(Estimate {
            bandwidth_bytes_per_second: self.bandwidth.get(u64::max)?,
            round_trip: Now::from_nanos(self.round_trip_ns.get(u64::min)?),
        })
    }

    pub(crate) fn round_trip(&self) -> Option<Now> {
        self.round_trip_ns.get(u64::min).map(Now::from_nanos)
    }

    pub(crate) fn is_starting(&self) -> bool {
        self.startup.is_some()
    }

    pub(crate) fn mark(&self, now: Now) -> Mark {
        Mark { at: now, delivered_bytes: self.delivered_bytes, idle: self.delivered_bytes < self.idle_end_bytes }
    }

    /// There was nothing more to ask for, with so much in flight.
    pub(crate) fn set_idle(&mut self, in_flight_bytes: u64) {
        // The least that tells this moment from one at which the link was kept busy.
        self.idle_end_bytes = self.delivered_bytes + in_flight_bytes.max(1);
    }

    pub(crate) fn first_byte(&mut self, mark: &Mark, now: Now) {
        let sample = nanoseconds(now.saturating_sub(mark.at)).max(1);
        self.round_trip_ns.add(sample, now, ROUND_TRIP_SPAN, u64::min);
    }

    /// Bytes of a request are there.
    pub(crate) fn arrived(&mut self, mark: &Mark, len_bytes: u64, now: Now) {
        self.delivered_bytes += len_bytes;
        if self.startup.is_some() || self.bandwidth.get(u64::max).is_none() {
            self.sample(mark, now);
        }
        if mark.delivered_bytes >= self.round_end_bytes {
            self.round_end_bytes = self.delivered_bytes;
            self.end_round(mark.idle, now);
        }
    }

    fn sample(&mut self, mark: &Mark, now: Now) {
        let sample = self.rate(mark, now);
        if !mark.idle || self.bandwidth.get(u64::max).is_none_or(|best| sample > best) {
            self.bandwidth.add(sample, now, BANDWIDTH_SPAN, u64::max);
        }
    }

    fn rate(&self, mark: &Mark, now: Now) -> u64 {
        let elapsed_ns = u128::from(nanoseconds(now.saturating_sub(mark.at)).max(1));
        let bytes = u128::from(self.delivered_bytes - mark.delivered_bytes);
        u64::try_from(bytes * 1_000_000_000 / elapsed_ns).unwrap_or(u64::MAX)
    }

    fn end_round(&mut self, idle: bool, now: Now) {
        let mark = Mark { at: now, delivered_bytes: self.delivered_bytes, idle };
        let [before, last] = self.rounds;
        self.rounds = [last, Some(mark)];
        let idle_before = last.is_none_or(|last| last.idle);
        let Some(startup) = &mut self.startup else {
            if let Some(before) = before {
                self.sample(&Mark { idle: idle || idle_before, ..before }, now);
            }
            return;
        };
        let bandwidth = self.bandwidth.get(u64::max).unwrap_or(0);
        if bandwidth >= startup.bandwidth + startup.bandwidth / 4 {
            *startup = Startup { bandwidth, rounds: 0 };
        } else if !idle {
            startup.rounds += 1;
            if startup.rounds >= STARTUP_ROUNDS {
                self.startup = None;
                // What a full link delivered in two rounds is nearer to the truth than the best of many short samples.
                if let Some(before) = before {
                    self.bandwidth = Best { current: Some(self.rate(&before, now)), ..Best::default() };
                }
            }
        }
    }

    /// Bandwidth times round trip; 0 while unknown.
    pub(crate) fn product_bytes(&self) -> u64 {
        self.get().map_or(0, |estimate| {
            let bytes = u128::from(estimate.bandwidth_bytes_per_second) * u128::from(nanoseconds(estimate.round_trip));
            u64::try_from(bytes / 1_000_000_000).unwrap_or(u64::MAX)
        })
    }

    /// The most that prefetch may have in flight, and so the most that a demand finds before it: twice the product, and
    /// a chunk for those that are half here and count in full.
    pub(crate) fn window_bytes(&self) -> u64 {
        (2 * self.range_bytes() + if self.is_starting() { 0 } else { CHUNK_BYTES }).min(WINDOW_BYTES_MAX)
    }

    /// The longest range of one request: two of them fit the window.
    pub(crate) fn range_bytes(&self) -> u64 {
        let product = self.product_bytes();
        let half = if self.is_starting() { product.saturating_mul(STARTUP_GAIN) / 2 } else { product };
        half.clamp(PRODUCT_BYTES_MIN, WINDOW_BYTES_MAX / 2)
    }
}

fn nanoseconds(time: Now) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of `bandwidth` bytes a second that serves requests of `len` bytes in order, `window` of them at a time.
    fn run(estimator: &mut Estimator, bandwidth: u64, round_trip: Now, len: u64, requests: usize) -> Vec<u64> {
        let mut windows = Vec::new();
        let mut flying: std::collections::VecDeque<(Mark, Now)> = std::collections::VecDeque::new();
        let (mut now, mut free_at) = (Now::from_secs(1), Now::ZERO);
        let transfer = Now::from_nanos(len * 1_000_000_000 / bandwidth);
        for _ in 0..requests {
            while (flying.len() as u64 + 1) * len <= estimator.window_bytes() {
                free_at = free_at.max(now + round_trip) + transfer;
                flying.push_back((estimator.mark(now), free_at));
            }
            let (mark, at) = flying.pop_front().unwrap();
            now = at;
            estimator.first_byte(&mark, mark.at + round_trip);
            estimator.arrived(&mark, len, now);
            windows.push(estimator.window_bytes());
        }
        windows
    }

    #[test]
    fn a_cold_start_finds_the_link_in_a_few_round_trips() {
        let mut estimator = Estimator::default();
        let round_trip = Now::from_millis(20);
        run(&mut estimator, 125_000_000, round_trip, 64 << 10, 600);
        let estimate = estimator.get().unwrap();
        assert!(!estimator.is_starting());
        assert_eq!(estimate.round_trip, round_trip);
        let error = estimate.bandwidth_bytes_per_second.abs_diff(125_000_000);
        assert!(error < 12_500_000, "{estimate:?}");
    }

    #[test]
    fn the_window_of_a_new_link_doubles_each_round_trip() {
        let mut estimator = Estimator::default();
        let windows = run(&mut estimator, 1_250_000_000, Now::from_millis(20), 64 << 10, 8 + 16 + 32);
        assert!(windows[8] >= 1 << 20, "{windows:?}");
        assert!(windows[24] >= 2 << 20, "{windows:?}");
        assert!(windows[55] >= 4 << 20, "{windows:?}");
    }

    #[test]
    fn a_slow_link_keeps_the_least_window() {
        let mut estimator = Estimator::default();
        run(&mut estimator, 1_000_000, Now::from_millis(20), 64 << 10, 100);
        assert_eq!(estimator.window_bytes(), 3 * PRODUCT_BYTES_MIN);
    }

    #[test]
    fn a_seed_leaves_the_start_up_out() {
        let mut estimator = Estimator::default();
        let round_trip = Now::from_millis(20);
        estimator.seed(Estimate { bandwidth_bytes_per_second: 125_000_000, round_trip });
        assert_eq!(estimator.window_bytes(), 5_000_000 + CHUNK_BYTES);
    }

    #[test]
    fn samples_without_enough_to_ask_for_lower_nothing() {
        let mut estimator = Estimator::default();
        let round_trip = Now::from_millis(20);
        estimator.seed(Estimate { bandwidth_bytes_per_second: 125_000_000, round_trip });
        for second in 1..100 {
            let now = Now::from_secs(second);
            estimator.set_idle(0);
            let mark = estimator.mark(now);
            estimator.arrived(&mark, 4096, now + round_trip);
        }
        assert_eq!(estimator.get().unwrap().bandwidth_bytes_per_second, 125_000_000);
    }

    #[test]
    fn a_link_that_became_slower_is_noticed() {
        let mut estimator = Estimator::default();
        let round_trip = Now::from_millis(20);
        estimator.seed(Estimate { bandwidth_bytes_per_second: 125_000_000, round_trip });
        run(&mut estimator, 12_500_000, round_trip, 64 << 10, 3000);
        assert!(estimator.get().unwrap().bandwidth_bytes_per_second < 15_000_000);
    }
}
