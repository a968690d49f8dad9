//! The shaped link: a delay each way, and one bottleneck for all response bytes.
//!
//! Each connection hands the bottleneck at most one quantum at a time and waits for its turn in a first-come queue, so
//! connections that all have data waiting are served round robin and share the rate evenly. The bottleneck computes
//! when a quantum has left it from the rate, not from when a timer fired: a late wake-up delays one quantum and not
//! the ones behind it, so the rate is exact over any longer time. Turns are given out some milliseconds ahead, as a
//! short queue in a router would: a wake-up for each would cost more than sending where the processor is shared.
//!
//! What is left out: slow start, loss, and a limit on the way up (requests are delayed, not slowed).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::alarm::Alarm;

/// What the link is like. The default adds nothing: no delay, no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkConfig {
    /// Delay each way; a request on an open connection costs twice this, on a new one four times.
    pub delay_ms: u64,
    /// Rate of the one bottleneck that all response bytes pass, headers included. 0 = no limit.
    pub rate_bits_per_s: u64,
}

impl LinkConfig {
    /// A link of `rate_mbit_per_s` with `delay_ms` each way.
    pub fn new(rate_mbit_per_s: u64, delay_ms: u64) -> Self {
        Self { delay_ms, rate_bits_per_s: rate_mbit_per_s * 1_000_000 }
    }
}

/// Turns at the bottleneck are at least this long: small enough that a short answer passes a long one quickly.
const QUANTUM_MIN_BYTES: usize = 32 * 1024;

/// On a fast link a turn takes up to this long, or waking up would cost more than sending.
const QUANTUM_TIME: Duration = Duration::from_millis(1);

/// How long the queue at the bottleneck may get, and how short it is when those who wait for a turn are woken.
const QUEUE_MAX: Duration = Duration::from_millis(8);
const QUEUE_LOW: Duration = Duration::from_millis(3);

/// Bytes of one connection under way towards a client, beyond what the link itself holds, before it counts as not
/// reading: the size of an ordinary receive buffer.
const WINDOW_MIN_BYTES: u64 = 256 * 1024;

/// No connection holds more than this, whatever rate and delay say.
const WINDOW_MAX_BYTES: u64 = 16 * 1024 * 1024;

pub(crate) struct Link {
    delay_ms: AtomicU64,
    rate_bits_per_s: AtomicU64,
    /// When the bottleneck will have sent all that it was given. Tokio's mutex hands over in the order of asking.
    free_at: tokio::sync::Mutex<Instant>,
    pub(crate) alarm: Alarm,
}

impl Link {
    pub(crate) fn start(config: LinkConfig) -> std::io::Result<Self> {
        let link = Self {
            delay_ms: AtomicU64::new(0),
            rate_bits_per_s: AtomicU64::new(0),
            free_at: tokio::sync::Mutex::new(Instant::now()),
            alarm: Alarm::start()?,
        };
        link.set(config);
        Ok(link)
    }

    /// Changes the link for what is sent from now on. The window of an open connection stays as it was.
    pub(crate) fn set(&self, config: LinkConfig) {
        self.delay_ms.store(config.delay_ms, Ordering::Relaxed);
        self.rate_bits_per_s.store(config.rate_bits_per_s, Ordering::Relaxed);
    }

    pub(crate) fn config(&self) -> LinkConfig {
        LinkConfig {
            delay_ms: self.delay_ms.load(Ordering::Relaxed),
            rate_bits_per_s: self.rate_bits_per_s.load(Ordering::Relaxed),
        }
    }

    /// The delay in one direction.
    pub(crate) fn delay(&self) -> Duration {
        Duration::from_millis(self.config().delay_ms)
    }

    fn bytes_in(&self, time: Duration) -> u64 {
        let bytes = u128::from(self.config().rate_bits_per_s) * time.as_micros() / 8_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// The most bytes that one connection sends in one turn.
    pub(crate) fn quantum_bytes(&self) -> usize {
        let of_time = usize::try_from(self.bytes_in(QUANTUM_TIME)).unwrap_or(usize::MAX);
        of_time.clamp(QUANTUM_MIN_BYTES, 8 * QUANTUM_MIN_BYTES)
    }

    /// The most bytes of one connection between the bottleneck and the client's socket: twice what the link itself
    /// holds, so that a reading client is never the limit.
    pub(crate) fn window_bytes(&self) -> usize {
        let config = self.config();
        let held = match config.rate_bits_per_s {
            0 if config.delay_ms > 0 => WINDOW_MAX_BYTES,
            _ => self.bytes_in(2 * self.delay()).saturating_mul(2),
        };
        usize::try_from(held.saturating_add(WINDOW_MIN_BYTES).min(WINDOW_MAX_BYTES)).unwrap_or(usize::MAX)
    }

    /// Sends `len_bytes` through the bottleneck after the turns of those that asked before. They were there to be sent
    /// since `ready_at`. The result is when the last of them leaves it, which may be up to [`QUEUE_MAX`] from now.
    pub(crate) async fn transmit(&self, ready_at: Instant, len_bytes: usize) -> Instant {
        let mut free_at = self.free_at.lock().await;
        let rate = self.config().rate_bits_per_s;
        let Some(nanoseconds) = (len_bytes as u128 * 8_000_000_000).checked_div(u128::from(rate)) else {
            return Instant::now();
        };
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        *free_at = ready_at.max(*free_at) + time;
        if *free_at > Instant::now() + QUEUE_MAX {
            self.alarm.sleep_until(*free_at - QUEUE_LOW).await;
        }
        *free_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_rate_is_exact_whatever_the_timers_do() {
        let link = Link::start(LinkConfig { delay_ms: 0, rate_bits_per_s: 80_000_000 }).unwrap();
        let start = Instant::now();
        let mut departed = start;
        for _ in 0..20 {
            departed = link.transmit(departed, 10_000).await;
        }
        assert_eq!(departed - start, Duration::from_millis(20), "200 kB at 10 MB/s");
        assert!(Instant::now() + QUEUE_MAX >= departed);
    }

    #[tokio::test]
    async fn an_idle_link_gives_no_credit() {
        let link = Link::start(LinkConfig { delay_ms: 0, rate_bits_per_s: 8_000_000 }).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let ready_at = Instant::now();
        let departed = link.transmit(ready_at, 5_000).await;
        assert_eq!(departed - ready_at, Duration::from_millis(5));
    }

    #[tokio::test]
    async fn windows_hold_what_the_link_holds() {
        let link = Link::start(LinkConfig::new(100, 20)).unwrap();
        assert!(link.window_bytes() > 500_000, "100 Mbit/s for 40 ms is 500 kB");
        assert_eq!(link.quantum_bytes(), QUANTUM_MIN_BYTES);
        link.set(LinkConfig::new(10_000, 1_000));
        assert_eq!(link.window_bytes() as u64, WINDOW_MAX_BYTES);
    }
}
