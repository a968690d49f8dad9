//! The loop: link, program and policy on one clock.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::types::{BlobKey, ChunkKey, Now};

use super::image::SimulatedImage;
use super::link::{Delivery, FluidLink, Link};
use super::program::{Program, ProgramRead};

/// What a policy is told.
#[derive(Debug, Clone, Copy)]
pub enum Happened<'a> {
    /// Fetching may begin. Comes once, first.
    Began,
    /// The program reads, for the first time, a unit that is there.
    Touch {
        /// The unit.
        unit: ChunkKey,
    },
    /// The program reads a block of this frame, which is not there and is not asked for, because the policy avoids the hot
    /// blob: the block's chunk is read instead.
    Avoided {
        /// The frame.
        unit: ChunkKey,
    },
    /// The program waits for these; the policy gives [`Order::Wake`] once all of them are there.
    Demand {
        /// Names the read.
        ticket: u64,
        /// What is not there, each once.
        units: &'a [ChunkKey],
    },
    /// An answer has begun.
    FirstByte {
        /// Which.
        fetch: u64,
    },
    /// A unit is there.
    Arrived {
        /// The unit.
        unit: ChunkKey,
    },
    /// A time asked for with [`Order::TellAt`] has come.
    Tick,
}

/// What a policy wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Request a range of neighbours; each is answered with [`Happened::Arrived`].
    Fetch {
        /// Names the request; never used twice.
        fetch: u64,
        /// Blob of the range.
        blob: BlobKey,
        /// Its units.
        units: Range<u32>,
    },
    /// Let a read that waits go on.
    Wake {
        /// Which.
        ticket: u64,
    },
    /// Send [`Happened::Tick`] then. Takes the place of the one before it.
    TellAt {
        /// When.
        at: Now,
    },
}

/// Decides what to fetch.
pub trait Policy {
    /// Takes what happened and appends orders.
    fn on(&mut self, happened: Happened<'_>, now: Now, orders: &mut Vec<Order>);

    /// Whether a block that nobody has asked for yet is to be had with its chunk, though the hot blob has it.
    fn avoids_hot_blob(&self) -> bool {
        false
    }
}

/// What is simulated.
#[derive(Debug, Clone, Copy)]
pub struct Scenario<'a> {
    /// The image.
    pub image: &'a SimulatedImage,
    /// The program, on that image.
    pub program: &'a Program,
    /// The link.
    pub link: Link,
    /// How long before the program fetching begins.
    pub lead: Duration,
}

/// What came of it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// From the start of the program until it was ready.
    pub ready: Duration,
    /// Requests sent, those after ready included.
    pub requests: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes asked for although they were there or on their way.
    pub duplicate_bytes: u64,
    /// Bytes of units that the program never read.
    pub wasted_bytes: u64,
    /// First reads of units that were there.
    pub hits: u64,
    /// First reads of units that were on their way.
    pub late_hits: u64,
    /// First reads of units that nobody had asked for.
    pub misses: u64,
    /// Time that the program spent waiting.
    pub stall: Duration,
    /// Most bytes that were under way when nothing of them was demanded.
    pub in_flight_bytes_max: u64,
}

/// A policy that does not do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimulationError {
    /// A read waits, nothing is under way, and no time is to come.
    Stuck {
        /// The read.
        ticket: u64,
    },
    /// A read was woken although what it needs is not there, or was not woken although it is.
    WrongWake {
        /// The read.
        ticket: u64,
    },
    /// A range of units that do not exist, or of none.
    WrongRange,
    /// More than `STEPS_MAX` events: it goes round in circles.
    Endless,
}

impl std::fmt::Display for SimulationError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stuck { ticket } => write!(formatter, "read {ticket} waits for ever"),
            Self::WrongWake { ticket } => write!(formatter, "read {ticket} was woken too early or not at all"),
            Self::WrongRange => formatter.write_str("a fetch of units that do not exist"),
            Self::Endless => formatter.write_str("no end after too many events"),
        }
    }
}

impl std::error::Error for SimulationError {}

/// Events after which a simulation is given up: a hundred times the largest recorded start.
const STEPS_MAX: u64 = 10_000_000;

/// Replays the program until it is ready and everything asked for is there.
///
/// # Errors
/// If the policy leaves a read waiting for ever, wakes one too early, or asks for what does not exist.
pub fn simulate(scenario: &Scenario<'_>, policy: &mut dyn Policy) -> Result<Outcome, SimulationError> {
    let mut run = Run::new(scenario);
    run.tell(policy, Happened::Began)?;
    for _ in 0..STEPS_MAX {
        let Some(now) = run.next_at() else {
            return match run.activity {
                Activity::Waiting { ticket, .. } => Err(SimulationError::Stuck { ticket }),
                _ => Ok(run.finish()),
            };
        };
        run.now = now;
        run.link.advance(now);
        if let Some(delivery) = run.link.pop() {
            run.deliver(policy, delivery)?;
        } else if run.alarm.is_some_and(|at| at <= now) {
            run.alarm = None;
            run.tell(policy, Happened::Tick)?;
        } else {
            run.read(policy)?;
        }
    }
    Err(SimulationError::Endless)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UnitState {
    Absent,
    InFlight,
    Present,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Book {
    state: UnitState,
    read: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activity {
    /// Thinks until then; the next read is number `next`, or ready if there is none.
    Thinking { until: Now, next: usize },
    /// Read number `next` waits since then, as `ticket`.
    Waiting { since: Now, next: usize, ticket: u64 },
    /// Ready.
    Done,
}

struct Run<'a> {
    scenario: &'a Scenario<'a>,
    now: Now,
    link: FluidLink,
    books: Vec<Book>,
    activity: Activity,
    /// What the last read needs.
    needs: Vec<ChunkKey>,
    alarm: Option<Now>,
    orders: Vec<Order>,
    in_flight_bytes: BTreeMap<u64, u64>,
    outcome: Outcome,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario<'a>) -> Self {
        let mut run = Self {
            scenario,
            now: Now::ZERO,
            link: FluidLink::new(scenario.link),
            books: vec![Book { state: UnitState::Absent, read: false }; scenario.image.len()],
            activity: Activity::Done,
            needs: Vec::new(),
            alarm: None,
            orders: Vec::new(),
            in_flight_bytes: BTreeMap::new(),
            outcome: Outcome::default(),
        };
        run.now = scenario.lead;
        run.think(0);
        run.now = Now::ZERO;
        run
    }

    /// The next moment at which something happens; none once the program is ready and all is quiet. A policy may tick
    /// for ever: that alone is no reason to go on.
    fn next_at(&self) -> Option<Now> {
        let program = match self.activity {
            Activity::Thinking { until, .. } => Some(until),
            Activity::Waiting { .. } | Activity::Done => None,
        };
        if self.activity == Activity::Done && self.link.is_idle() {
            return None;
        }
        let next = self.link.next_at().into_iter().chain(program).chain(self.alarm).min();
        next.map(|at| at.max(self.now))
    }

    fn deliver(&mut self, policy: &mut dyn Policy, delivery: Delivery) -> Result<(), SimulationError> {
        match delivery {
            Delivery::FirstByte { fetch } => self.tell(policy, Happened::FirstByte { fetch }),
            Delivery::Unit { fetch, unit } => {
                if let Some(book) = self.scenario.image.index(unit).and_then(|index| self.books.get_mut(index)) {
                    book.state = UnitState::Present;
                }
                let len_bytes = u64::from(self.scenario.image.stored_len_bytes(unit));
                if let Some(bytes) = self.in_flight_bytes.get_mut(&fetch) {
                    *bytes -= len_bytes.min(*bytes);
                }
                self.tell(policy, Happened::Arrived { unit })
            }
        }
    }

    /// The program's next read, or its end.
    fn read(&mut self, policy: &mut dyn Policy) -> Result<(), SimulationError> {
        let Activity::Thinking { next, .. } = self.activity else { return Ok(()) };
        let Some(read) = self.scenario.program.reads.get(next) else {
            self.activity = Activity::Done;
            self.outcome.ready = self.now.saturating_sub(self.scenario.lead);
            return Ok(());
        };
        let mut missing = Vec::new();
        let mut touched = Vec::new();
        self.needs = self.scenario.image.units_by(read.recorded, |frame, chunk| self.choose(frame, chunk, policy));
        for &unit in &self.needs {
            let Some(book) = self.scenario.image.index(unit).and_then(|index| self.books.get_mut(index)) else {
                continue;
            };
            let first = !std::mem::replace(&mut book.read, true);
            match book.state {
                UnitState::Present if first => {
                    self.outcome.hits += 1;
                    touched.push(unit);
                }
                UnitState::Present => {}
                UnitState::InFlight => {
                    self.outcome.late_hits += u64::from(first);
                    missing.push(unit);
                }
                UnitState::Absent => {
                    self.outcome.misses += u64::from(first);
                    missing.push(unit);
                }
            }
        }
        let avoided = self.avoided(read);
        if missing.is_empty() {
            self.think(next + 1);
        } else {
            self.activity = Activity::Waiting { since: self.now, next, ticket: next as u64 };
        }
        for unit in avoided {
            self.tell(policy, Happened::Avoided { unit })?;
        }
        for unit in touched {
            self.tell(policy, Happened::Touch { unit })?;
        }
        if !missing.is_empty() {
            self.tell(policy, Happened::Demand { ticket: next as u64, units: &missing })?;
        }
        Ok(())
    }

    /// As the driver does: from the layer's store what is there, then from the hot blob's, and whatever is fetched comes
    /// in a frame if the policy trusts in the hot blob.
    fn choose(&self, frame: ChunkKey, chunk: ChunkKey, policy: &dyn Policy) -> ChunkKey {
        let avoid = || self.state(frame) == Some(UnitState::Absent) && policy.avoids_hot_blob();
        if self.state(chunk) == Some(UnitState::Present) || avoid() { chunk } else { frame }
    }

    /// Frames that have blocks of the read, and that it does without although their bytes are not there otherwise.
    fn avoided(&self, read: &ProgramRead) -> Vec<ChunkKey> {
        let is_missing = |unit: &&ChunkKey| self.state(**unit) == Some(UnitState::Absent) && !self.needs.contains(unit);
        read.units.iter().filter(is_missing).copied().collect()
    }

    fn state(&self, unit: ChunkKey) -> Option<UnitState> {
        self.books.get(self.scenario.image.index(unit)?).map(|book| book.state)
    }

    /// Thinks before read `next`, or, past the last, until ready.
    fn think(&mut self, next: usize) {
        let program = self.scenario.program;
        let think = program.reads.get(next).map_or(program.tail, |read| read.think);
        self.activity = Activity::Thinking { until: self.now + think, next };
    }

    fn tell(&mut self, policy: &mut dyn Policy, happened: Happened<'_>) -> Result<(), SimulationError> {
        let mut orders = std::mem::take(&mut self.orders);
        policy.on(happened, self.now, &mut orders);
        for order in orders.drain(..) {
            match order {
                Order::Fetch { fetch, blob, units } => self.fetch(fetch, blob, units)?,
                Order::Wake { ticket } => self.wake(ticket)?,
                Order::TellAt { at } => self.alarm = Some(at.max(self.now)),
            }
        }
        self.orders = orders;
        match self.activity {
            Activity::Waiting { ticket, .. } if self.is_there() => Err(SimulationError::WrongWake { ticket }),
            _ => Ok(()),
        }
    }

    fn fetch(&mut self, fetch: u64, blob: BlobKey, units: Range<u32>) -> Result<(), SimulationError> {
        if units.is_empty() {
            return Err(SimulationError::WrongRange);
        }
        let image = self.scenario.image;
        let mut bytes = 0;
        for unit in units.clone().map(|chunk| ChunkKey { blob, chunk }) {
            let index = image.index(unit).ok_or(SimulationError::WrongRange)?;
            let book = self.books.get_mut(index).ok_or(SimulationError::WrongRange)?;
            let len_bytes = u64::from(image.stored_len_bytes(unit));
            bytes += len_bytes;
            if book.state == UnitState::Absent {
                book.state = UnitState::InFlight;
            } else {
                self.outcome.duplicate_bytes += len_bytes;
            }
        }
        self.outcome.requests += 1;
        self.outcome.bytes += bytes;
        self.in_flight_bytes.insert(fetch, bytes);
        let under_way: u64 = self.in_flight_bytes.values().sum();
        self.outcome.in_flight_bytes_max = self.outcome.in_flight_bytes_max.max(under_way);
        self.in_flight_bytes.retain(|_, bytes| *bytes > 0);
        let units = units.map(|chunk| ChunkKey { blob, chunk });
        self.link.request(fetch, units.map(|unit| (unit, image.stored_len_bytes(unit))));
        Ok(())
    }

    fn wake(&mut self, ticket: u64) -> Result<(), SimulationError> {
        match self.activity {
            Activity::Waiting { since, next, ticket: waiting } if waiting == ticket && self.is_there() => {
                self.outcome.stall += self.now - since;
                self.think(next + 1);
                Ok(())
            }
            _ => Err(SimulationError::WrongWake { ticket }),
        }
    }

    /// Whether all that the read needs is there.
    fn is_there(&self) -> bool {
        self.needs.iter().all(|unit| self.state(*unit) == Some(UnitState::Present))
    }

    fn finish(mut self) -> Outcome {
        let image = self.scenario.image;
        let lens = image.bound_units().into_iter().map(|unit| unit.stored_len_bytes);
        let wasted = self.books.iter().zip(lens).filter(|(book, _)| book.state == UnitState::Present && !book.read);
        self.outcome.wasted_bytes = wasted.map(|(_, len_bytes)| len_bytes).sum();
        self.outcome
    }
}
