//! How the news about a parked request reaches the queue thread that parked it.
//!
//! A queue thread sleeps in its io_uring and nowhere else. So news comes as an eventfd whose read is always armed on that
//! ring. The eventfd only says "look": the news itself lies in a bounded queue, and only the first entry after a look
//! writes to the eventfd, so that a burst of completions costs one wake-up.
//!
//! Invariant: a tag parks at most one request at a time and every parked request is resolved exactly once, by its waiter,
//! by the waiter being dropped (EIO), or by [`CompletionPort::stop`] (EIO).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::queue::ArrayQueue;
use rustix::event::{EventfdFlags, eventfd};

use crate::image::Waiter;

/// What became of a parked request: plan it again, or fail it with a positive errno.
pub(crate) type Outcome = Result<(), i32>;

/// The side that any thread may use.
#[derive(Debug)]
pub(crate) struct CompletionPort {
    /// As many entries as the device has tags: each has at most one waiter that was not called yet.
    news: ArrayQueue<(u16, Outcome)>,
    /// The eventfd was written since the queue thread looked last.
    signalled: AtomicBool,
    stopping: AtomicBool,
    event: OwnedFd,
}

impl CompletionPort {
    /// A port for a queue of `tags` tags.
    pub(crate) fn new(tags: u16) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            news: ArrayQueue::new(usize::from(tags)),
            signalled: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::CLOEXEC)?,
        }))
    }

    /// The eventfd, whose read (8 bytes) is to be kept armed.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// The waiter for the request that `tag` is about to park.
    pub(crate) fn waiter(self: &Arc<Self>, tag: u16) -> Waiter {
        let ticket = Ticket { port: Arc::clone(self), tag, outcome: Err(libc::EIO) };
        Box::new(move |outcome| ticket.deliver(outcome))
    }

    /// From now on nothing waits: parked requests fail with EIO, and requests that would park fail at once.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.signal();
    }

    /// Whether [`CompletionPort::stop`] was called.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Makes the queue thread look.
    pub(super) fn signal(&self) {
        // Cannot fail: the counter is read back to 0 long before it overflows, and the eventfd lives as long as we do.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    fn push(&self, tag: u16, outcome: Outcome) {
        if self.news.push((tag, outcome)).is_err() {
            tracing::error!(tag, "more completions than tags: one is lost");
        }
        if !self.signalled.swap(true, Ordering::AcqRel) {
            self.signal();
        }
    }

    /// Takes the news, after the eventfd was read. The flag goes down first: whoever pushes later than that signals
    /// again, whoever pushed before is seen here.
    pub(crate) fn drain(&self, mut resolve: impl FnMut(u16, Outcome)) {
        self.signalled.swap(false, Ordering::AcqRel);
        while let Some((tag, outcome)) = self.news.pop() {
            resolve(tag, outcome);
        }
    }
}

/// Delivers its outcome when it is dropped, so that a waiter that is never called cannot leave a request hanging.
struct Ticket {
    port: Arc<CompletionPort>,
    tag: u16,
    outcome: Outcome,
}

impl Ticket {
    fn deliver(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.port.push(self.tag, self.outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drained(port: &CompletionPort) -> Vec<(u16, Outcome)> {
        let mut all = Vec::new();
        port.drain(|tag, outcome| all.push((tag, outcome)));
        all
    }

    fn signals(port: &CompletionPort) -> u64 {
        let mut bytes = [0; 8];
        rustix::fs::fcntl_setfl(port.event(), rustix::fs::OFlags::NONBLOCK).unwrap();
        match rustix::io::read(port.event(), &mut bytes) {
            Ok(_) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    #[test]
    fn a_burst_of_completions_signals_once() {
        let port = CompletionPort::new(4).unwrap();
        for tag in 0..4 {
            port.waiter(tag)(Ok(()));
        }
        assert_eq!(signals(&port), 1);
        assert_eq!(drained(&port), [(0, Ok(())), (1, Ok(())), (2, Ok(())), (3, Ok(()))]);
        port.waiter(2)(Err(5));
        assert_eq!(signals(&port), 1);
        assert_eq!(drained(&port), [(2, Err(5))]);
    }

    #[test]
    fn a_waiter_that_is_dropped_fails_its_request() {
        let port = CompletionPort::new(1).unwrap();
        drop(port.waiter(0));
        assert_eq!(drained(&port), [(0, Err(libc::EIO))]);
    }

    #[test]
    fn no_completion_is_lost_between_threads() {
        const ROUNDS: u16 = 2000;
        let port = CompletionPort::new(64).unwrap();
        let pushing = Arc::clone(&port);
        let (free, taken) = std::sync::mpsc::sync_channel(64);
        let pusher = std::thread::spawn(move || {
            for _ in 0..ROUNDS {
                let tag = taken.recv().unwrap();
                pushing.waiter(tag)(Ok(()));
            }
        });
        for tag in 0..64 {
            free.send(tag).unwrap();
        }
        let mut seen = 0;
        while seen < ROUNDS {
            rustix::io::read(port.event(), &mut [0u8; 8]).unwrap();
            port.drain(|tag, _| {
                seen += 1;
                let _ = free.try_send(tag);
            });
        }
        pusher.join().unwrap();
    }
}
