//! T*: the earliest moment at which a start can be ready over a given link.
//!
//! The recorded reads need units (chunks, or frames of a hot blob), numbered `k = 1..m` in the order of their first use.
//! Between two reads the program thinks for `g`; a read returns when its unit is there.
//!
//! ```text
//! arrival   A_k = tau0 - L + sum of stored bytes up to k / B          first-use order, the link never idle
//! decoded   F_k = max(A_k, P_k) + u_k / D                             P_k: the earliest of w workers is free
//! progress  x_i = max(x_{i-1} + g_i, F_{k(i)})                        the program waits only for what is not there
//! ready     T*  = max(x_n + tail, processor time / processors)
//! ```
//!
//! Why no other order is better: to choose an order of download is the scheduling problem `1 || max(C_k + q_k)` with
//! processing times `s_k / B` and delivery times `q_k`, the thinking left after the first use of `k`. Largest delivery
//! time first is optimal (Jackson), and here that is first-use order. Splitting, pre-emption and parallel connections
//! finish no prefix of the bytes earlier, for the link's rate is shared. With decoding it is a flow shop: [`Bound::ready`]
//! is then what first-use order reaches, and [`Bound::any_order`] is below every order.

use std::time::Duration;

/// What is fetched and decoded at once: a chunk, or a frame of a hot blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Bytes on the wire.
    pub stored_len_bytes: u64,
    /// Bytes after decoding.
    pub raw_len_bytes: u64,
}

/// One read of the program. A read that needs several units is several of these, all but the first with no thinking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitRead {
    /// Index in [`Start::units`]; past its end: nothing has to be fetched.
    pub unit: u32,
    /// From the answer to the read before it (the first: from the start) until this read.
    pub think: Duration,
}

/// The link as the bound sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BoundLink {
    /// Bytes per second of all connections together.
    pub bandwidth_bytes_per_s: f64,
    /// tau0: from the first request until its first byte. A round trip on a warm connection; whatever else happens
    /// first (handshakes, a token, the manifest) is added here when it lies inside the measured time.
    pub first_byte: Duration,
    /// Connections that start cold; `None`: they are warm.
    pub slow_start: Option<SlowStart>,
}

/// TCP's slow start: what may have arrived `t` after the first byte is at most
/// `connections * window * (2^(1 + floor(t / rtt)) - 1)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// Connections in parallel.
    pub connections: u32,
    /// What one of them sends in its first round trip; 10 segments, 14.6 kB, on Linux.
    pub window_bytes: f64,
    /// Round trip; more than none.
    pub rtt: Duration,
}

/// How stored bytes become raw ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BoundDecode {
    /// Units decoded at the same time; at least one is assumed.
    pub workers: u32,
    /// Raw bytes per second of one worker.
    pub bytes_per_s: f64,
}

/// The processors that program, decoding and copying share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoundProcessors {
    /// How many; at least one is assumed.
    pub count: u32,
    /// Processor time of the program until it is ready: where it has one thread, the sum of its thinking.
    pub program: Duration,
    /// Processor time of serving: copying from the store into requests.
    pub serving: Duration,
}

/// A start of which the bound is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Start<'a> {
    /// All units, in any order.
    pub units: &'a [Unit],
    /// First reads in order; later reads of the same unit do no harm.
    pub reads: &'a [UnitRead],
    /// From the last answer until ready.
    pub tail: Duration,
    /// The link.
    pub link: BoundLink,
    /// L: how long before the program starts fetching starts.
    pub lead: Duration,
    /// `None`: decoding takes no time.
    pub decode: Option<BoundDecode>,
    /// `None`: processors do not limit.
    pub processors: Option<BoundProcessors>,
}

/// The bound, and what it is made of. Times since the start of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// T*.
    pub ready: Duration,
    /// The same, but below every order of fetching and decoding; equal to `ready` when decoding takes no time.
    pub any_order: Duration,
    /// T_w: ready with everything local.
    pub warm: Duration,
    /// Stored bytes of the units that are read.
    pub bytes: u64,
    /// Units that are read.
    pub units: u32,
}

/// T* of a start. A rate of 0 or less makes it [`Duration::MAX`].
#[must_use]
pub fn lower_bound(start: &Start<'_>) -> Bound {
    let mut ladder = Ladder::new(start);
    let mut there: Vec<Option<Landing>> = vec![None; start.units.len()];
    let (mut ready_s, mut any_order_s, mut warm_s) = (0.0_f64, 0.0_f64, 0.0_f64);
    for read in start.reads {
        let think_s = read.think.as_secs_f64();
        warm_s += think_s;
        ready_s += think_s;
        any_order_s += think_s;
        let index = read.unit as usize;
        if let (Some(unit), Some(slot)) = (start.units.get(index), there.get_mut(index)) {
            let landing = slot.get_or_insert_with(|| ladder.land(*unit));
            ready_s = ready_s.max(landing.in_order_s);
            any_order_s = any_order_s.max(landing.any_order_s);
        }
    }
    let tail_s = start.tail.as_secs_f64();
    let processors_s = ladder.processors_s();
    Bound {
        ready: duration((ready_s + tail_s).max(processors_s)),
        any_order: duration((any_order_s + tail_s).max(processors_s)),
        warm: duration(warm_s + tail_s),
        bytes: ladder.stored_bytes,
        units: ladder.units,
    }
}

/// When a unit can be read: `F_k`, and the strict `F_k^LB`.
#[derive(Debug, Clone, Copy)]
struct Landing {
    in_order_s: f64,
    any_order_s: f64,
}

/// The sums over units in first-use order.
struct Ladder<'a> {
    start: &'a Start<'a>,
    stored_bytes: u64,
    raw_bytes: u64,
    stored_min_bytes: u64,
    raw_min_bytes: u64,
    units: u32,
    /// When each decoder is free.
    workers_s: Vec<f64>,
}

impl<'a> Ladder<'a> {
    fn new(start: &'a Start<'a>) -> Self {
        let workers = start.decode.map_or(0, |decode| decode.workers.max(1) as usize);
        Self {
            start,
            stored_bytes: 0,
            raw_bytes: 0,
            stored_min_bytes: u64::MAX,
            raw_min_bytes: u64::MAX,
            units: 0,
            workers_s: vec![f64::NEG_INFINITY; workers.min(start.units.len())],
        }
    }

    /// The next unit in first-use order.
    fn land(&mut self, unit: Unit) -> Landing {
        self.units += 1;
        self.stored_bytes += unit.stored_len_bytes;
        self.raw_bytes += unit.raw_len_bytes;
        self.stored_min_bytes = self.stored_min_bytes.min(unit.stored_len_bytes);
        self.raw_min_bytes = self.raw_min_bytes.min(unit.raw_len_bytes);
        let arrival_s = self.arrival_s(self.stored_bytes);
        let Some(decode) = self.start.decode else {
            return Landing { in_order_s: arrival_s, any_order_s: arrival_s };
        };
        let in_order_s = match self.workers_s.iter_mut().min_by(|a, b| a.total_cmp(b)) {
            Some(free_s) => {
                *free_s = free_s.max(arrival_s) + seconds(unit.raw_len_bytes, decode.bytes_per_s);
                *free_s
            }
            None => arrival_s,
        };
        let link_first_s = arrival_s + seconds(self.raw_min_bytes, decode.bytes_per_s);
        let workers = f64::from(decode.workers.max(1));
        let decode_first_s =
            self.arrival_s(self.stored_min_bytes) + seconds(self.raw_bytes, decode.bytes_per_s) / workers;
        Landing { in_order_s, any_order_s: link_first_s.max(decode_first_s) }
    }

    /// When `bytes` can have arrived: both the link's rate and the slow start must allow them.
    fn arrival_s(&self, bytes: u64) -> f64 {
        let link = &self.start.link;
        let rate_s = seconds(bytes, link.bandwidth_bytes_per_s);
        let slow_s = link.slow_start.map_or(0.0, |slow_start| slow_start.arrival_s(bytes));
        link.first_byte.as_secs_f64() - self.start.lead.as_secs_f64() + rate_s.max(slow_s)
    }

    /// The processor time of all, shared by all processors.
    fn processors_s(&self) -> f64 {
        let Some(processors) = self.start.processors else { return 0.0 };
        let decode_s = self.start.decode.map_or(0.0, |decode| seconds(self.raw_bytes, decode.bytes_per_s));
        let all_s = processors.program.as_secs_f64() + processors.serving.as_secs_f64() + decode_s;
        all_s / f64::from(processors.count.max(1))
    }
}

impl SlowStart {
    fn arrival_s(self, bytes: u64) -> f64 {
        let window_bytes = self.window_bytes * f64::from(self.connections.max(1));
        let mut round_trips = 0_u32;
        while float(bytes) > window_bytes * (2.0_f64.powi(1 + round_trips.cast_signed()) - 1.0) {
            round_trips += 1;
            if round_trips == ROUND_TRIPS_MAX {
                return f64::INFINITY;
            }
        }
        f64::from(round_trips) * self.rtt.as_secs_f64()
    }
}

/// Doublings after which even a window of one byte has passed every `u64`.
const ROUND_TRIPS_MAX: u32 = 64;

fn seconds(bytes: u64, bytes_per_s: f64) -> f64 {
    if bytes == 0 {
        0.0
    } else if bytes_per_s > 0.0 {
        float(bytes) / bytes_per_s
    } else {
        f64::INFINITY
    }
}

/// Exact up to 2^53 bytes, 9 PB.
#[allow(clippy::cast_precision_loss)]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

/// Rounded to nanoseconds; what does not fit is [`Duration::MAX`].
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
#[path = "bound_tests.rs"]
mod tests;
