//! How long a fetch that gets nothing goes on, and how it paces its attempts.

use std::time::Duration;

use tokio::time::Instant;
use ublkimg_registry::jitter;

/// What comes slower than this is no better than silence: a registry that drips must not hold a read for hours.
const SLOWEST_BYTES_PER_S: u64 = 8 << 10;

/// First and longest pause between attempts, on top of the pauses that the registry crate makes.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Patience {
    /// When something was last heard of any source: read deadlines count from here.
    heard: Instant,
    has_begun: bool,
    pause: Duration,
}

impl Patience {
    pub(crate) fn new(since: Instant) -> Self {
        Self { heard: since, has_begun: false, pause: PAUSE_MIN }
    }

    pub(crate) fn heard(&self) -> Instant {
        self.heard
    }

    /// Bytes have come. The first ones end the silence; those after them are worth the time that they may take.
    pub(crate) fn came(&mut self, len_bytes: usize, now: Instant) {
        let worth = Duration::from_micros(len_bytes as u64 * 1_000_000 / SLOWEST_BYTES_PER_S);
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        self.heard = if is_first { now } else { now.min(self.heard + worth) };
    }

    /// For so long nobody listened.
    pub(crate) fn discount(&mut self, time: Duration) {
        self.heard += time;
    }

    /// The last attempt got somewhere: the pauses begin anew.
    pub(crate) fn progressed(&mut self) {
        self.pause = PAUSE_MIN;
    }

    /// The next pause at most.
    pub(crate) fn longest_pause(&self) -> Duration {
        self.pause
    }

    /// The next pause: jittered, so that all that waited for a registry do not come back together.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.pause.mul_f64(jitter());
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_are_jittered() {
        let pauses = || {
            let mut patience = Patience::new(Instant::now());
            (0..8).map(|_| patience.pause()).collect::<Vec<_>>()
        };
        let mut longest = PAUSE_MIN;
        for pause in pauses() {
            assert!((longest / 2..=longest).contains(&pause), "{pause:?} of {longest:?}");
            longest = (longest * 2).min(PAUSE_MAX);
        }
        assert_ne!(pauses(), pauses(), "all that wait come back together");
    }

    #[test]
    fn a_drip_is_worth_less_than_the_time_it_takes() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut patience = Patience::new(start);
        patience.came(1, start + 100 * second);
        assert_eq!(patience.heard(), start + 100 * second, "the first byte, after an outage");
        for at in 101..=180 {
            patience.came(1 << 10, start + at * second);
        }
        assert_eq!(patience.heard(), start + 110 * second);
        patience.came(1 << 20, start + 181 * second);
        assert_eq!(patience.heard(), start + 181 * second, "it has caught up");
        patience.discount(5 * second);
        assert_eq!(patience.heard(), start + 186 * second);
    }
}
