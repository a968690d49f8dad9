//! One registry host: what is in flight to it, its estimate, and how much more may be asked for.

use std::collections::VecDeque;

use crate::estimate::{Estimator, PRODUCT_BYTES_MIN};
use crate::fair::Fair;
use crate::fill::QUIET;
use crate::guard::Level;
use crate::types::{ChunkKey, Class, ImageKey, Now};

/// Demanded chunks fetched from one link at the same time; more wait in order. Enough to hide a round trip behind every
/// request of a queue that stalls on scattered chunks.
pub const DEMAND_CHUNKS_MAX: usize = 24;

/// Requests of prefetch to one link at the same time: enough for the product of 1 Gbit/s and 20 ms in chunks of 63 KB.
/// With [`DEMAND_CHUNKS_MAX`] it makes the requests that the registry client has under way at once, so a demand never
/// waits there behind prefetch.
pub const PREFETCH_REQUESTS_MAX: usize = 40;

/// Shortest and longest rest of idle fill while first bytes are late.
const REST_MIN: Now = Now::from_millis(100);
const REST_MAX: Now = Now::from_secs(10);

/// A first byte is not late within this much of half a round trip more: schedulers and disks take as long.
const LATE_MIN: Now = Now::from_millis(2);

/// A demanded chunk that waits for a place in flight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queued {
    pub(crate) chunk: ChunkKey,
    pub(crate) image: ImageKey,
    /// The first demand.
    pub(crate) since: Now,
}

/// The state of one link.
#[derive(Debug, Default)]
pub(crate) struct Link {
    pub(crate) estimator: Estimator,
    /// Demanded chunks in state `Queued`, each once, in the order of the demands.
    pub(crate) queue: VecDeque<Queued>,
    /// Demanded chunks that were issued and have not ended.
    pub(crate) demands: usize,
    /// Those of them that have not arrived.
    pub(crate) demands_on_link: usize,
    /// Requests of prefetch that have not arrived.
    pub(crate) prefetches: usize,
    demand_bytes: u64,
    prefetch_bytes: u64,
    /// Bytes of prefetch that may still be issued beside the open demands.
    beside_demands_bytes: u64,
    /// Nothing can arrive before this, the link was empty.
    silent_until: Now,
    /// When a demand was last made or answered.
    pub(crate) last_demand: Option<Now>,
    /// Images with a plan, and with a fill, that have something left.
    pub(crate) plans: Fair,
    pub(crate) fills: Fair,
    pub(crate) idle_fill: IdleFill,
}

/// The pace of idle fill.
#[derive(Debug, Default)]
pub(crate) struct IdleFill {
    /// Not before this.
    pub(crate) next_at: Now,
    /// One request at a time.
    pub(crate) is_open: bool,
    /// Others are using the path: rest for so long after each request.
    pub(crate) rest: Now,
}

impl Link {
    /// The most bytes of prefetch in flight.
    pub(crate) fn window_bytes(&self) -> u64 {
        self.estimator.window_bytes()
    }

    pub(crate) fn in_flight_bytes(&self) -> u64 {
        self.demand_bytes + self.prefetch_bytes
    }

    /// How many bytes prefetch of a class may ask for now: 0 is none. A chunk of `chunk_bytes` is asked for next.
    pub(crate) fn room_bytes(&self, class: Class, level: Level, chunk_bytes: u64, now: Now) -> u64 {
        if self.prefetches >= PREFETCH_REQUESTS_MAX {
            return 0;
        }
        let window = self.window_bytes();
        let part = if level == Level::Followed { window } else { window / 2 };
        // The window holds a chunk of the largest size; half of it need not.
        let part = if self.prefetch_bytes == 0 { part.max(chunk_bytes) } else { part };
        let mut room = part.saturating_sub(self.prefetch_bytes);
        if self.demands_on_link > 0 {
            if class != Class::Trace || level != Level::Followed {
                return 0;
            }
            room = room.min(self.beside_demands_bytes);
        }
        if room < chunk_bytes || self.in_flight_bytes() >= self.enough_bytes(chunk_bytes, now) { 0 } else { room }
    }

    /// With so much in flight the link is kept busy, and more would only take its turn before what is needed sooner.
    ///
    /// When the link was empty, what it holds is enough until the first byte comes. Those requests share the link and so
    /// end together, and so would what follows each: for another round trip the whole window is used. After that a little
    /// more than the product is enough, with a chunk for the one that is half here and counts in full.
    fn enough_bytes(&self, chunk_bytes: u64, now: Now) -> u64 {
        let window = self.window_bytes();
        if self.estimator.is_starting() {
            return window;
        }
        let product = self.estimator.product_bytes();
        if now < self.silent_until {
            product.max(chunk_bytes)
        } else if now < self.silent_until + self.estimator.round_trip().unwrap_or(Now::ZERO) {
            window
        } else {
            product + product / 4 + PRODUCT_BYTES_MIN
        }
    }

    /// Less is in flight than keeps the link busy: what is measured now says little about it.
    pub(crate) fn is_idle(&self, now: Now) -> bool {
        self.prefetches < PREFETCH_REQUESTS_MAX
            && self.in_flight_bytes() + PRODUCT_BYTES_MIN < self.enough_bytes(0, now)
    }

    /// The first byte of an answer is there.
    pub(crate) fn speaks(&mut self, now: Now) {
        self.silent_until = self.silent_until.min(now);
    }

    pub(crate) fn issued(&mut self, class: Class, len_bytes: u64, now: Now) {
        if self.in_flight_bytes() == 0
            && let Some(round_trip) = self.estimator.round_trip()
        {
            self.silent_until = now + round_trip;
        }
        if class == Class::Demand {
            let beside = self.window_bytes().saturating_sub(self.prefetch_bytes);
            let others = if self.demands_on_link == 0 { u64::MAX } else { self.beside_demands_bytes };
            self.beside_demands_bytes = beside.min(others);
            self.demands += 1;
            self.demands_on_link += 1;
            self.demand_bytes += len_bytes;
            self.last_demand = Some(now);
        } else {
            if self.demands_on_link > 0 {
                self.beside_demands_bytes = self.beside_demands_bytes.saturating_sub(len_bytes);
            }
            self.prefetches += 1;
            self.prefetch_bytes += len_bytes;
        }
    }

    /// Bytes have left the link, and with the last ones their request.
    pub(crate) fn left(&mut self, class: Class, len_bytes: u64, is_over: bool, now: Now) {
        if class == Class::Demand {
            self.demands_on_link -= 1;
            self.demand_bytes -= len_bytes;
            self.last_demand = Some(now);
            return;
        }
        self.prefetch_bytes -= len_bytes;
        if is_over {
            self.prefetches -= 1;
            if class == Class::Fill && self.idle_fill.is_open {
                self.idle_fill.is_open = false;
                self.idle_fill.next_at = self.idle_fill.next_at.max(now + self.idle_fill.rest);
            }
        }
    }

    /// When idle fill may go on, if nothing happens before; `None` while something is on the link.
    pub(crate) fn idle_fill_at(&self) -> Option<Now> {
        let quiet_at = self.last_demand.map_or(Now::ZERO, |last| last + QUIET);
        let is_free = !self.idle_fill.is_open && self.demands_on_link == 0 && self.prefetches == 0;
        is_free.then_some(quiet_at.max(self.idle_fill.next_at))
    }

    pub(crate) fn may_fill_idly(&self, now: Now) -> bool {
        self.idle_fill_at().is_some_and(|at| at <= now)
    }

    /// A request of idle fill was issued: the next one comes when twice the time has passed that its bytes take.
    pub(crate) fn fills_idly(&mut self, bytes: u64, now: Now) {
        let bandwidth = self.estimator.get().map_or(0, |estimate| estimate.bandwidth_bytes_per_second);
        self.idle_fill.is_open = true;
        self.idle_fill.next_at = now + Now::from_millis((2000 * bytes).checked_div(bandwidth).unwrap_or(0));
    }
}

impl IdleFill {
    /// A late first byte is a sign of others on the path, who go before.
    pub(crate) fn first_byte(&mut self, waited: Now, round_trip: Option<Now>) {
        let is_late = round_trip.is_some_and(|round_trip| waited > round_trip * 3 / 2 + LATE_MIN);
        self.rest = if is_late { (2 * self.rest).clamp(REST_MIN, REST_MAX) } else { Now::ZERO };
    }
}
