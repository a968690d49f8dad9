//! Who waits for a registry that does not answer, since when and why: for `status` and the log.

use std::collections::BTreeMap;
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
    /// For how long the first of them has heard nothing.
    pub since_ms: u64,
    /// What the one that has waited longest is for.
    #[serde(default)]
    pub what: String,
    /// What was heard last.
    pub cause: String,
}

/// The outage of an image's registry, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Outage(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// What each fetch is for, in the order in which they began to wait.
    fetches: BTreeMap<u64, String>,
    next: u64,
    since: Option<Instant>,
    cause: String,
}

impl Outage {
    /// What waits now.
    pub(crate) fn waiting(&self) -> Option<Waiting> {
        let state = self.0.lock();
        let (since, (_, what)) = (state.since?, state.fetches.first_key_value()?);
        let since_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let fetches = u32::try_from(state.fetches.len()).unwrap_or(u32::MAX);
        Some(Waiting { fetches, since_ms, what: what.clone(), cause: state.cause.clone() })
    }
}

/// A fetch that waits, until it is dropped.
#[derive(Debug)]
pub(crate) struct Wait {
    counters: Arc<ImageCounters>,
    number: u64,
}

impl Wait {
    /// A fetch waits, and has heard nothing since then; `what` is fetched.
    pub(crate) fn begin(counters: &Arc<ImageCounters>, what: String, since: Instant, cause: &str) -> Self {
        let mut state = counters.outage.0.lock();
        if state.fetches.is_empty() {
            state.since = Some(since);
            tracing::warn!("fetch: {} waits for {what}: {cause}", counters.image);
        }
        let number = state.next;
        state.next += 1;
        state.fetches.insert(number, what);
        cause.clone_into(&mut state.cause);
        Self { counters: Arc::clone(counters), number }
    }

    /// There is other news.
    pub(crate) fn heard(&self, cause: &str) {
        cause.clone_into(&mut self.counters.outage.0.lock().cause);
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let mut state = self.counters.outage.0.lock();
        state.fetches.remove(&self.number);
        if state.fetches.is_empty()
            && let Some(since) = state.since.take()
        {
            let (image, waited) = (&self.counters.image, since.elapsed().as_secs_f64());
            tracing::warn!("fetch: {image} does not wait any more, after {waited:.1} s");
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
        let first = Wait::begin(&counters, "chunk 1".to_owned(), Instant::now(), "refused");
        let second = Wait::begin(&counters, "chunk 2".to_owned(), Instant::now(), "silent");
        first.heard("still refused");
        let waiting = counters.outage.waiting().unwrap();
        assert_eq!((waiting.fetches, waiting.what.as_str(), waiting.cause.as_str()), (2, "chunk 1", "still refused"));
        drop(first);
        let waiting = counters.outage.waiting().unwrap();
        assert_eq!((waiting.fetches, waiting.what.as_str()), (1, "chunk 2"));
        drop(second);
        assert_eq!(counters.outage.waiting(), None);
    }
}
