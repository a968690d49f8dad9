//! Who waits for a registry that does not answer, since when and why: for `status` and the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::counters::ImageCounters;

/// Silence that is worth mentioning: longer than a slow link's round trips, shorter than an operator's patience.
pub(crate) const SILENCE_MIN: Duration = Duration::from_secs(3);

/// Fetches of an image that wait for its registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// How many.
    pub fetches: u32,
    /// For how long there has been at least one.
    pub since_ms: u64,
    /// What was heard last.
    pub cause: String,
}

/// The outage of an image's registry, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Outage(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    fetches: u32,
    since: Option<Instant>,
    cause: String,
}

impl Outage {
    /// What waits now.
    pub(crate) fn waiting(&self) -> Option<Waiting> {
        let state = self.0.lock();
        let since = state.since.filter(|_| state.fetches > 0)?;
        let since_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(Waiting { fetches: state.fetches, since_ms, cause: state.cause.clone() })
    }
}

/// A fetch that waits, until it is dropped.
#[derive(Debug)]
pub(crate) struct Wait(Arc<ImageCounters>);

impl Wait {
    /// A fetch begins to wait; `what` is fetched.
    pub(crate) fn begin(counters: &Arc<ImageCounters>, what: &str, cause: &str) -> Self {
        let mut state = counters.outage.0.lock();
        state.fetches += 1;
        if state.fetches == 1 {
            state.since = Some(Instant::now());
            tracing::warn!("fetch: {what} waits: {cause}");
        }
        cause.clone_into(&mut state.cause);
        Self(Arc::clone(counters))
    }

    /// There is other news.
    pub(crate) fn heard(&self, cause: &str) {
        cause.clone_into(&mut self.0.outage.0.lock().cause);
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let mut state = self.0.outage.0.lock();
        state.fetches -= 1;
        if state.fetches == 0
            && let Some(since) = state.since.take()
        {
            tracing::warn!("fetch: nobody waits any more, after {:.1} s", since.elapsed().as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lasts_as_long_as_anybody_waits() {
        let counters = Arc::<ImageCounters>::default();
        assert_eq!(counters.outage.waiting(), None);
        let first = Wait::begin(&counters, "chunk 1", "refused");
        let second = Wait::begin(&counters, "chunk 2", "silent");
        first.heard("still refused");
        let waiting = counters.outage.waiting().unwrap();
        assert_eq!((waiting.fetches, waiting.cause.as_str()), (2, "still refused"));
        drop(first);
        assert_eq!(counters.outage.waiting().unwrap().fetches, 1);
        drop(second);
        assert_eq!(counters.outage.waiting(), None);
    }
}
