//! How reads and evictions keep out of each other's way without a lock that readers take.
//!
//! A block may be evicted while it is read: its bit goes first, then its data. Who reads has two ways to be sure of what was
//! read:
//! - It looks at the count of evictions, then at the bits, reads, and looks at the count again: if it is the same, what was
//!   read was there all the time, since the count changes between the bits and the holes.
//! - A queue thread cannot look again where the kernel passes data on by itself as soon as it is read. It has a [`Mark`],
//!   which is odd from before it looks at the bits until its reads are over; whoever evicts waits between bits and holes
//!   until every mark that was odd has changed. Either the reader sees that the bits are gone, or the other sees its mark.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

/// How often the one that evicts looks at a mark again. Reads that are marked wait for no disk.
const PAUSE: Duration = Duration::from_micros(200);

/// Evictions so far, anywhere in the store, and the readers that they wait for.
#[derive(Debug, Default)]
pub(crate) struct Evictions {
    count: AtomicU64,
    marks: Mutex<Vec<Weak<Mark>>>,
}

/// Whether one queue thread reads without looking again.
struct Mark {
    sequence: AtomicU64,
    /// Makes the thread leave its ring, where it may sleep after its reads.
    kick: Box<dyn Fn() + Send + Sync>,
}

impl Evictions {
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Blocks go that are read by those who look again.
    pub(super) fn note(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    /// The bits of blocks are gone; after this nobody reads the blocks any more.
    pub(super) fn note_and_wait(&self) {
        self.note();
        // The bits before the marks: a thread that begins to read now sees the bits as they are.
        fence(Ordering::SeqCst);
        let marks: Vec<Arc<Mark>> = {
            let mut marks = self.marks.lock();
            marks.retain(|mark| mark.strong_count() > 0);
            marks.iter().filter_map(Weak::upgrade).collect()
        };
        for mark in marks {
            let before = mark.sequence.load(Ordering::SeqCst);
            while before % 2 == 1 && mark.sequence.load(Ordering::SeqCst) == before {
                (mark.kick)();
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// For a thread that reads; `kick` wakes it up.
    pub(crate) fn reader(&self, kick: impl Fn() + Send + Sync + 'static) -> Reader {
        let mark = Arc::new(Mark { sequence: AtomicU64::new(0), kick: Box::new(kick) });
        self.marks.lock().push(Arc::downgrade(&mark));
        Reader(mark)
    }
}

/// The thread's side of its mark.
#[derive(Debug)]
pub(crate) struct Reader(Arc<Mark>);

impl Reader {
    /// To be called before the thread looks at bits for reads that it will not check.
    pub(crate) fn begin(&mut self) {
        let sequence = self.0.sequence.load(Ordering::Relaxed);
        if sequence.is_multiple_of(2) {
            self.0.sequence.store(sequence + 1, Ordering::SeqCst);
            // The mark before the bits.
            fence(Ordering::SeqCst);
        }
    }

    /// All such reads are over.
    pub(crate) fn end(&mut self) {
        let sequence = self.0.sequence.load(Ordering::Relaxed);
        if sequence % 2 == 1 {
            self.0.sequence.store(sequence + 1, Ordering::SeqCst);
        }
    }
}

impl Drop for Reader {
    /// A thread that ended has no reads.
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mark").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn an_eviction_waits_for_reads_that_nobody_checks_and_for_no_others() {
        let evictions = Arc::new(Evictions::default());
        let kicked = Arc::new(AtomicBool::new(false));
        let kick = Arc::clone(&kicked);
        let mut reader = evictions.reader(move || kick.store(true, Ordering::SeqCst));
        evictions.note_and_wait();
        assert!(!kicked.load(Ordering::SeqCst), "nobody reads");
        reader.begin();
        let (evicting, is_over) = (Arc::clone(&evictions), Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&is_over);
        let thread = std::thread::spawn(move || {
            evicting.note_and_wait();
            over.store(true, Ordering::SeqCst);
        });
        while !kicked.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        assert!(!is_over.load(Ordering::SeqCst), "the reads are not over");
        reader.end();
        // Reads that begin later hold it up no longer.
        reader.begin();
        thread.join().unwrap();
        assert_eq!(evictions.count(), 2);
    }

    #[test]
    fn a_thread_that_ended_holds_nobody_up() {
        let evictions = Evictions::default();
        let mut reader = evictions.reader(|| ());
        reader.begin();
        drop(reader);
        evictions.note_and_wait();
    }
}
