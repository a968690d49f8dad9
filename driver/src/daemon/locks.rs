//! One request at a time for each device name.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

/// Locks by name. Holds an entry only for names that somebody locks or waits for: at most one a connection.
#[derive(Default)]
pub(super) struct NameLocks {
    by_name: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl NameLocks {
    /// Waits for its turn; the name is free again when the guard is dropped.
    pub(super) async fn lock(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut by_name = self.by_name.lock();
            by_name.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(by_name.entry(name.to_owned()).or_default())
        };
        lock.lock_owned().await
    }

    /// Whether a name is locked, or waited for.
    pub(super) fn any_held(&self) -> bool {
        self.by_name.lock().values().any(|lock| Arc::strong_count(lock) > 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_locked_once_and_forgotten_when_free() {
        let locks = NameLocks::default();
        let first = locks.lock("a").await;
        let _other = locks.lock("b").await;
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(20), locks.lock("a")).await;
        assert!(waiting.is_err());
        drop(first);
        assert!(locks.any_held(), "b");
        let _again = locks.lock("a").await;
        assert_eq!(locks.by_name.lock().len(), 2);
        drop(_again);
        let _c = locks.lock("c").await;
        assert_eq!(locks.by_name.lock().len(), 2, "b and c");
        drop((_other, _c));
        assert!(!locks.any_held());
    }
}
