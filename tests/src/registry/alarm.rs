//! Sleeping with a precision of about 0.1 ms.
//!
//! The runtime's own timer works in steps of 1 ms and rounds up, which makes a link with a round trip of 2 ms look
//! half as fast again. One thread waits on a condition variable (a high-resolution timer in the kernel) and wakes the
//! futures that are due.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

#[derive(Default)]
struct Sleepers {
    /// Ordered by time; the number tells apart those of the same instant. Bounded by the number of live [`Sleep`]s:
    /// each has at most one entry and removes it when it is dropped.
    wakers: BTreeMap<(Instant, u64), Waker>,
    next_number: u64,
    stopped: bool,
}

#[derive(Default)]
struct Shared {
    sleepers: Mutex<Sleepers>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Sleepers> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock of a link; its thread ends when it is dropped.
pub(crate) struct Alarm {
    shared: Arc<Shared>,
}

impl Alarm {
    /// Starts the thread.
    pub(crate) fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new().name("link-alarm".into()).spawn(move || run(&of_thread))?;
        Ok(Self { shared })
    }

    /// Completes at `at`, or at once when that is past.
    pub(crate) fn sleep_until(&self, at: Instant) -> Sleep<'_> {
        Sleep { shared: &self.shared, at, number: None }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_one();
    }
}

fn run(shared: &Shared) {
    let mut sleepers = shared.lock();
    while !sleepers.stopped {
        let now = Instant::now();
        let later = sleepers.wakers.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut sleepers.wakers, later);
        if !due.is_empty() {
            drop(sleepers);
            due.into_values().for_each(Waker::wake);
            sleepers = shared.lock();
            continue;
        }
        let wait = sleepers.wakers.first_key_value().map(|((at, _), _)| at.saturating_duration_since(now));
        sleepers = match wait {
            Some(wait) => shared.changed.wait_timeout(sleepers, wait).unwrap_or_else(PoisonError::into_inner).0,
            None => shared.changed.wait(sleepers).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

/// See [`Alarm::sleep_until`].
pub(crate) struct Sleep<'a> {
    shared: &'a Shared,
    at: Instant,
    number: Option<u64>,
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let mut sleepers = self.shared.lock();
        let number = self.number.unwrap_or(sleepers.next_number);
        if self.number.is_none() {
            sleepers.next_number += 1;
        }
        sleepers.wakers.insert((self.at, number), context.waker().clone());
        let is_first = sleepers.wakers.first_key_value().is_some_and(|(key, _)| *key == (self.at, number));
        drop(sleepers);
        self.number = Some(number);
        if is_first {
            self.shared.changed.notify_one();
        }
        Poll::Pending
    }
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.shared.lock().wakers.remove(&(self.at, number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn wakes_in_order_and_not_early() {
        let alarm = Alarm::start().unwrap();
        let start = Instant::now();
        let (near, far) = (start + Duration::from_millis(3), start + Duration::from_millis(9));
        let order = Mutex::new(Vec::new());
        tokio::join!(
            async {
                alarm.sleep_until(far).await;
                assert!(Instant::now() >= far);
                order.lock().unwrap().push("far");
            },
            async {
                alarm.sleep_until(near).await;
                assert!(Instant::now() >= near);
                order.lock().unwrap().push("near");
            },
        );
        assert_eq!(*order.lock().unwrap(), ["near", "far"]);
        alarm.sleep_until(start).await;
        assert!(alarm.shared.lock().wakers.is_empty());
    }
}
