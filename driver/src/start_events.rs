//! What happened in a start, event by event: what `ublkimg trace plot` draws a picture from.
//!
//! Every image keeps its events from the moment at which attaching begins, whether anybody will ask for them or not: a
//! start cannot be had again. So writing one must cost nothing worth counting. The log is a row of slots that are filled
//! once: a writer takes the next number and fills that slot, without a lock; no writer meets another, and a reader sees the
//! slots that are full. The row is made in pages, each by the first who needs it, so that an idle image has none. What comes
//! after the last slot is counted and not kept.
//!
//! All times are microseconds since attaching began. They have 32 bits: what happens after 71 minutes is no longer part of
//! a start, and is counted as lost too.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ublkimg_scheduler::Class;

/// Events that are kept of an image, in 1.8 MiB. The largest start known (vLLM) reads in 27 000 requests.
pub const START_EVENTS_MAX: usize = 1 << 16;

/// Events that room is made for at a time.
const PAGE_EVENTS: usize = 256;
type Page = Box<[OnceLock<StartEvent>; PAGE_EVENTS]>;

/// An event; as JSON, one line of the file that is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StartEvent {
    /// A request to the registry, written down when it has ended.
    Fetch {
        /// Why.
        fetch: FetchClass,
        /// When it was sent.
        start_us: u32,
        /// When its answer began, if it did and somebody saw it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        first_byte_us: Option<u32>,
        /// When its answer, or the attempt, had ended.
        end_us: u32,
        /// Bytes that came.
        bytes: u32,
    },
    /// A request of the device that read a block for the first time, written down when it was answered with data.
    Read {
        /// How it went.
        read: ReadOutcome,
        /// When it came.
        at_us: u32,
        /// Blocks that it read for the first time.
        blocks: u32,
        /// How long it waited.
        stall_us: u32,
    },
    /// A moment with a name.
    Mark {
        /// The name.
        mark: Mark,
        /// When.
        at_us: u32,
    },
    /// Events that there was no room for, after all others.
    Lost {
        /// How many.
        lost: u32,
    },
}

/// Why a request was sent to the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FetchClass {
    /// To know the image: index, manifests, metadata, trace.
    Attach,
    /// A device request waits for it.
    Demand,
    /// The profile says that it will be read.
    Trace,
    /// A sequential reader is expected to come to it.
    ReadAhead,
    /// The rest of the image.
    Fill,
}

impl From<Class> for FetchClass {
    fn from(class: Class) -> Self {
        match class {
            Class::Demand => Self::Demand,
            Class::Trace => Self::Trace,
            Class::ReadAhead => Self::ReadAhead,
            Class::Fill => Self::Fill,
        }
    }
}

/// How a first read went: whether it waited, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadOutcome {
    /// It did not wait.
    Hit,
    /// It waited for bytes that were on their way already.
    LateHit,
    /// It waited for bytes that nobody had asked for.
    Miss,
}

/// The moments of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// The image's manifest is known.
    Manifest,
    /// The profile is known: what it names is fetched from here on.
    Profile,
    /// There is a device.
    Device,
    /// It was mounted.
    Mount,
    /// The program is ready.
    Ready,
}

/// A request to the registry that has begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Get {
    began: Instant,
    /// `None` also if nobody saw when that was.
    first_byte: Option<Instant>,
    pub(crate) bytes: u64,
}

impl Get {
    pub(crate) fn begin() -> Self {
        Self { began: Instant::now(), first_byte: None, bytes: 0 }
    }

    /// So many bytes of the answer came now.
    pub(crate) fn came(&mut self, bytes: usize) {
        self.first_byte.get_or_insert_with(Instant::now);
        self.bytes += bytes as u64;
    }
}

/// The log of one image. See the module.
#[derive(Debug)]
pub(crate) struct StartEvents {
    began: Instant,
    /// What the image holds can be fetched.
    fetching_since: OnceLock<Instant>,
    /// Most images have few events, so each page is made when its first event comes.
    pages: Box<[OnceLock<Page>]>,
    events_max: usize,
    /// Number of the next event, also when there is no slot for it.
    next: AtomicUsize,
}

impl Default for StartEvents {
    /// Attaching begins.
    fn default() -> Self {
        Self::with_room(START_EVENTS_MAX)
    }
}

impl StartEvents {
    fn with_room(events_max: usize) -> Self {
        let pages = (0..events_max.div_ceil(PAGE_EVENTS)).map(|_| OnceLock::new()).collect();
        let (began, next) = (Instant::now(), AtomicUsize::new(0));
        Self { began, fetching_since: OnceLock::new(), pages, events_max, next }
    }

    /// When attaching began: zero of all times.
    pub(crate) fn began(&self) -> Instant {
        self.began
    }

    /// From now on what the image holds can be fetched; false if that was so before.
    pub(crate) fn fetching_begins(&self) -> bool {
        self.fetching_since.set(Instant::now()).is_ok()
    }

    /// Since when it is so, in microseconds; now if it is not yet.
    pub(crate) fn fetching_since_us(&self) -> u64 {
        let since = self.fetching_since.get().copied().unwrap_or_else(Instant::now);
        u64::try_from(since.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
    }

    pub(crate) fn mark(&self, mark: Mark) {
        self.push(self.at_us(Instant::now()).map(|at_us| StartEvent::Mark { mark, at_us }));
    }

    /// A request to the registry has ended now.
    pub(crate) fn fetched(&self, fetch: FetchClass, get: &Get) {
        let event = || {
            Some(StartEvent::Fetch {
                fetch,
                start_us: self.at_us(get.began)?,
                first_byte_us: get.first_byte.and_then(|at| self.at_us(at)),
                end_us: self.at_us(Instant::now())?,
                bytes: u32::try_from(get.bytes).unwrap_or(u32::MAX),
            })
        };
        self.push(event());
    }

    /// A device request that came at `at` and read `blocks` for the first time was answered.
    pub(crate) fn read(&self, read: ReadOutcome, at: Instant, blocks: u32, stall: Duration) {
        let stall_us = u32::try_from(stall.as_micros()).unwrap_or(u32::MAX);
        self.push(self.at_us(at).map(|at_us| StartEvent::Read { read, at_us, blocks, stall_us }));
    }

    /// The events so far, in the order in which they were written down, and how many are missing.
    pub(crate) fn all(&self) -> Vec<StartEvent> {
        let pages = self.pages.iter().filter_map(OnceLock::get);
        let mut events: Vec<StartEvent> =
            pages.flat_map(|page| page.iter().filter_map(OnceLock::get)).copied().collect();
        let lost = self.next.load(Ordering::Relaxed).saturating_sub(self.events_max);
        if lost > 0 {
            events.push(StartEvent::Lost { lost: u32::try_from(lost).unwrap_or(u32::MAX) });
        }
        events
    }

    /// `None` = too late to be written down.
    fn push(&self, event: Option<StartEvent>) {
        let Some(event) = event else {
            // As if the log were full, which it is from now on.
            self.next.fetch_max(self.events_max, Ordering::Relaxed);
            self.next.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if number < self.events_max {
            let page =
                self.pages[number / PAGE_EVENTS].get_or_init(|| Box::new([const { OnceLock::new() }; PAGE_EVENTS]));
            // Nobody else has this number.
            let _ = page[number % PAGE_EVENTS].set(event);
        }
    }

    fn at_us(&self, at: Instant) -> Option<u32> {
        u32::try_from(at.saturating_duration_since(self.began).as_micros()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_threads_write_and_what_has_no_room_is_counted() {
        let events = StartEvents::with_room(1000);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let events = &events;
                scope.spawn(move || {
                    for number in 0..300 {
                        events.read(ReadOutcome::Hit, Instant::now(), thread * 300 + number, Duration::ZERO);
                    }
                });
            }
        });
        let all = events.all();
        assert_eq!(all.len(), 1001);
        assert_eq!(all[1000], StartEvent::Lost { lost: 200 });
        let mut blocks: Vec<u32> = all
            .iter()
            .filter_map(|event| match event {
                StartEvent::Read { blocks, .. } => Some(*blocks),
                _ => None,
            })
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 1000, "none twice");
    }

    #[test]
    fn lines_are_what_is_drawn() {
        let events = StartEvents::with_room(3);
        let mut get = Get::begin();
        get.came(7);
        get.came(8);
        events.fetched(FetchClass::ReadAhead, &get);
        events.read(ReadOutcome::LateHit, events.began(), 2, Duration::from_micros(40));
        events.mark(Mark::Ready);
        let lines: Vec<String> = events.all().iter().map(|event| serde_json::to_string(event).unwrap()).collect();
        assert!(lines[0].starts_with(r#"{"fetch":"read-ahead","start_us":"#), "{}", lines[0]);
        assert!(lines[0].contains(r#""first_byte_us":"#) && lines[0].ends_with(r#""bytes":15}"#), "{}", lines[0]);
        assert_eq!(lines[1], r#"{"read":"late-hit","at_us":0,"blocks":2,"stall_us":40}"#);
        assert!(lines[2].starts_with(r#"{"mark":"ready","at_us":"#), "{}", lines[2]);
        for (line, event) in lines.iter().zip(events.all()) {
            assert_eq!(serde_json::from_str::<StartEvent>(line).unwrap(), event);
        }
    }

    #[test]
    fn what_is_too_late_for_a_start_is_lost() {
        let events = StartEvents::with_room(2);
        events.mark(Mark::Device);
        events.read(ReadOutcome::Hit, events.began() + Duration::from_secs(72 * 60), 1, Duration::ZERO);
        events.mark(Mark::Ready);
        assert_eq!(events.all().len(), 2);
        assert_eq!(events.all()[1], StartEvent::Lost { lost: 2 });
    }
}
