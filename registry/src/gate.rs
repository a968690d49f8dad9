//! The gate that a `Retry-After` closes.
//!
//! A registry that answers 429 or 503 and names a time speaks to the client, not to the one request: until then nothing
//! else is asked either, neither of the registry nor of its storage. Requests that come meanwhile wait, those under way go
//! on. Callers see nothing but the waiting.
//!
//! A process is one client of a registry, whatever number of its repositories it has opened: they share one gate.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use url::Url;

use crate::retry::LONGEST_RETRY_AFTER;

/// Open, or closed until a time.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<Option<Instant>>);

/// The gates of registries, by origin: those of open repositories, and those that are closed.
static GATES: Mutex<BTreeMap<String, Arc<Gate>>> = Mutex::new(BTreeMap::new());

impl Gate {
    /// That of the registry at this address.
    pub(crate) fn of(registry: &Url) -> Arc<Self> {
        let mut gates = GATES.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|_, gate| Arc::strong_count(gate) > 1 || gate.closed_until().is_some());
        Arc::clone(gates.entry(registry.origin().ascii_serialization()).or_default())
    }

    /// Closes it for `time` from now, unless it is closed for longer.
    pub(crate) fn close(&self, time: Duration) {
        let until = Instant::now() + time.min(LONGEST_RETRY_AFTER);
        let mut closed_until = self.lock();
        *closed_until = (*closed_until).max(Some(until));
    }

    /// Waits until it is open. Closing it again while others wait prolongs the wait.
    pub(crate) async fn pass(&self) {
        while let Some(until) = self.closed_until() {
            sleep_until(until).await;
        }
    }

    /// `None` when it is open.
    pub(crate) fn closed_until(&self) -> Option<Instant> {
        self.lock().filter(|until| *until > Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_has_one_gate_as_long_as_it_is_of_use() {
        let [one, same, other] = ["https://one.test/v2/", "https://one.test/v2/a", "https://one.test:5000/v2/"]
            .map(|address| Gate::of(&address.parse().unwrap()));
        assert!(Arc::ptr_eq(&one, &same) && !Arc::ptr_eq(&one, &other));
        one.close(Duration::from_secs(50));
        drop((one, same, other));
        let again = Gate::of(&"https://one.test".parse().unwrap());
        assert!(again.closed_until().is_some(), "who comes later is held too");
        assert!(!GATES.lock().unwrap().contains_key("https://one.test:5000"), "open, and of no use to anybody");
    }

    #[tokio::test]
    async fn the_latest_end_counts_and_has_a_limit() {
        let gate = Gate::default();
        let started = Instant::now();
        gate.pass().await;
        assert!(gate.closed_until().is_none());
        gate.close(Duration::from_millis(60));
        gate.close(Duration::from_millis(1));
        gate.pass().await;
        assert!(started.elapsed() >= Duration::from_millis(60));
        gate.close(Duration::MAX);
        assert!(gate.closed_until().unwrap() <= Instant::now() + LONGEST_RETRY_AFTER);
    }
}
