//! When to try again, and how long to wait before.
//!
//! A failure says which of three it is. *Never*: an answer that a second question does not change (404, 401 after a fresh
//! token). *Later*: trouble on the way or an overloaded registry; tried until the deadline, with pauses that double from
//! 100 ms to 5 s and are jittered, so that many clients of one registry do not come back together, and never before the
//! time that a `Retry-After` names, which holds all other requests too (see `gate`). *Suspect*: an answer that cannot be right (wrong `Content-Range`, too long a body); a
//! broken proxy gives it always, a proxy that restarts gives it once, so it is tried a few times only.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep};

use crate::error::{Error, Result};
use crate::gate::Gate;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Long enough to spare a registry that restarts, short enough that a reader notices its return.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A `Retry-After` beyond this is cut: a registry's bad clock must not park a reader for hours.
pub(crate) const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);
/// How often an impossible answer is asked for again.
const SUSPECT_ATTEMPTS: u32 = 3;

/// One failed attempt.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) retry: Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    Never,
    Later { retry_after: Option<Duration> },
    Suspect,
}

impl Failure {
    pub(crate) fn later(error: Error) -> Self {
        Self { error, retry: Retry::Later { retry_after: None } }
    }

    pub(crate) fn suspect(error: Error) -> Self {
        Self { error, retry: Retry::Suspect }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, retry: Retry::Never }
    }
}

/// The attempts at one request.
#[derive(Debug)]
pub(crate) struct Backoff {
    started: Instant,
    deadline: Duration,
    pause: Duration,
    attempts: u32,
    suspects: u32,
}

impl Backoff {
    pub(crate) fn new(deadline: Duration) -> Self {
        Self { started: Instant::now(), deadline, pause: FIRST_PAUSE, attempts: 0, suspects: 0 }
    }

    /// Waits for a free slot and an open gate; that time does not count as time of the request.
    pub(crate) async fn slot<'a>(&mut self, slots: &'a Semaphore, gate: &Gate) -> Result<SemaphorePermit<'a>> {
        let since = Instant::now();
        loop {
            gate.pass().await;
            let permit = slots.acquire().await.map_err(|_| Error::unavailable("the client is shutting down"))?;
            // It may have closed meanwhile; the slot is not kept for that long.
            if gate.closed_until().is_none() {
                self.discount(since.elapsed());
                return Ok(permit);
            }
        }
    }

    /// This much time is not the request's.
    pub(crate) fn discount(&mut self, time: Duration) {
        self.started += time;
    }

    /// The last attempt got somewhere: what fails now is a new trouble.
    pub(crate) fn progressed(&mut self) {
        *self = Self::new(self.deadline);
    }

    /// Waits until the next attempt may begin.
    ///
    /// # Errors
    /// The failure's own error when there is to be no other attempt.
    pub(crate) async fn wait(&mut self, failure: Failure) -> Result<()> {
        self.attempts += 1;
        let mut pause = self.pause.mul_f64(jitter());
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        match failure.retry {
            Retry::Never => return Err(failure.error),
            Retry::Suspect => {
                self.suspects += 1;
                if self.suspects >= SUSPECT_ATTEMPTS {
                    return Err(failure.error.after_attempts(self.attempts));
                }
            }
            Retry::Later { retry_after: Some(told) } => pause = pause.max(told.min(LONGEST_RETRY_AFTER)),
            Retry::Later { retry_after: None } => {}
        }
        if self.started.elapsed() + pause > self.deadline {
            return Err(failure.error.after_attempts(self.attempts));
        }
        tracing::debug!(error = %failure.error, attempt = self.attempts, ?pause, "trying again");
        sleep(pause).await;
        Ok(())
    }
}

/// Between a half and one. The standard library's hash keys are the randomness: enough for this, and no other crate.
#[must_use]
pub fn jitter() -> f64 {
    let random = RandomState::new().hash_one(0_u8);
    0.5 + f64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn later(retry_after: Option<Duration>) -> Failure {
        Failure { error: Error::unavailable("down"), retry: Retry::Later { retry_after } }
    }

    #[test]
    fn jitter_stays_in_its_range() {
        let drawn: Vec<f64> = (0..100).map(|_| jitter()).collect();
        assert!(drawn.iter().all(|value| (0.5..=1.0).contains(value)));
        assert!(drawn.iter().any(|value| (value - drawn[0]).abs() > 0.01), "all the same");
    }

    #[tokio::test]
    async fn trouble_is_waited_out_until_the_deadline() {
        let mut backoff = Backoff::new(Duration::from_millis(400));
        let started = Instant::now();
        let mut attempts = 1;
        let error = loop {
            match backoff.wait(later(None)).await {
                Ok(()) => attempts += 1,
                Err(error) => break error,
            }
        };
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        assert!((2..=5).contains(&attempts), "{attempts}");
        assert_eq!(error.to_string(), format!("down (gave up after {attempts} attempts)"));
    }

    #[tokio::test]
    async fn answers_and_long_waits_end_it_at_once() {
        let started = Instant::now();
        let mut backoff = Backoff::new(Duration::from_secs(30));
        assert_eq!(backoff.wait(Error::not_found("gone").into()).await.unwrap_err().to_string(), "gone");
        assert!(Backoff::new(Duration::ZERO).wait(later(None)).await.is_err());
        assert!(backoff.wait(later(Some(Duration::from_secs(50)))).await.is_err(), "beyond the deadline");
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn impossible_answers_are_asked_for_thrice() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        let suspect = || Failure::suspect(Error::corrupt("odd"));
        assert!(backoff.wait(suspect()).await.is_ok());
        assert!(backoff.wait(suspect()).await.is_ok());
        assert!(backoff.wait(suspect()).await.is_err());
    }

    #[tokio::test]
    async fn waiting_for_slot_and_gate_is_not_retry_time() {
        let (slots, gate) = (Semaphore::new(0), Gate::default());
        gate.close(Duration::from_millis(200));
        let mut backoff = Backoff::new(Duration::from_millis(150));
        let free = async {
            sleep(Duration::from_millis(300)).await;
            slots.add_permits(1);
        };
        let (slot, ()) = tokio::join!(backoff.slot(&slots, &gate), free);
        drop(slot.unwrap());
        assert!(backoff.wait(later(None)).await.is_ok());
    }
}
