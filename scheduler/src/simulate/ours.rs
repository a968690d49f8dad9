//! The scheduler that the driver runs, as a policy of the simulator.

use std::time::Duration;

use crate::scheduler::Scheduler;
use crate::types::{
    Action, BlobKind, ChunkEntry, ChunkKey, Estimate, Event, ImageCounters, ImageKey, LinkKey, Now, PlanEntry, Ticket,
};

use super::image::{HOT, LAYER, SimulatedImage};
use super::program::Program;
use super::run::{Happened, Order, Policy};

const LINK: LinkKey = LinkKey(0);
const IMAGE: ImageKey = ImageKey(0);

/// What the scheduler is told to expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Units in the order of the trace.
    pub entries: Vec<PlanEntry>,
    /// Bytes that may be spent on it.
    pub byte_cap: u64,
}

impl Plan {
    /// The plan that a recording of `program` gives: its units in first-use order, each when it was first read.
    #[must_use]
    pub fn of(program: &Program, byte_cap: u64) -> Self {
        let mut seen = std::collections::BTreeSet::new();
        let uses = program.reads.iter().flat_map(|read| read.units.iter().map(|unit| (*unit, read.due)));
        let first_uses = uses.filter(|(unit, _)| seen.insert(*unit));
        Self {
            entries: first_uses.map(|(chunk, due)| PlanEntry { chunk, due, confidence: u8::MAX }).collect(),
            byte_cap,
        }
    }

    /// These units, one every `step`: a trace whose times mean nothing.
    #[must_use]
    pub fn evenly(units: &[ChunkKey], step: Duration, byte_cap: u64) -> Self {
        let mut due = Duration::ZERO;
        let entry = |unit: &ChunkKey| {
            due += step;
            PlanEntry { chunk: *unit, due, confidence: u8::MAX }
        };
        Self { entries: units.iter().map(entry).collect(), byte_cap }
    }

    /// The units, in order.
    #[must_use]
    pub fn units(&self) -> Vec<ChunkKey> {
        self.entries.iter().map(|entry| entry.chunk).collect()
    }
}

/// [`Scheduler`] with one image on one link.
#[derive(Debug)]
pub struct Ours {
    scheduler: Scheduler,
    layer: Vec<ChunkEntry>,
    hot: Vec<ChunkEntry>,
    plan: Option<Plan>,
    estimate: Option<Estimate>,
    actions: Vec<Action>,
}

impl Ours {
    /// With a plan, or with nothing but the detector of streams; knowing the link, or finding it out.
    #[must_use]
    pub fn new(image: &SimulatedImage, plan: Option<Plan>, estimate: Option<Estimate>) -> Self {
        let chunks = image.chunks().iter().map(|size| size.stored_len_bytes);
        let frames = image.frames().iter().map(|size| size.stored_len_bytes);
        let (layer, hot) = (entries(chunks), entries(frames));
        Self { scheduler: Scheduler::new(), layer, hot, plan, estimate, actions: Vec::new() }
    }

    /// What the scheduler counted.
    #[must_use]
    pub fn counters(&self) -> ImageCounters {
        self.scheduler.image_counters(IMAGE).unwrap_or_default()
    }

    /// What the scheduler believes of the link.
    #[must_use]
    pub fn estimate(&self) -> Option<Estimate> {
        self.scheduler.estimate(LINK)
    }

    fn begin(&mut self, now: Now) {
        if let Some(estimate) = self.estimate {
            self.scheduler.seed_estimate(LINK, estimate);
        }
        let Self { scheduler, actions, .. } = self;
        scheduler.step(Event::AddImage { image: IMAGE, link: LINK }, now, actions);
        let (layer, hot) = (BlobKind::Layer, BlobKind::Hot);
        scheduler.step(Event::AddBlob { blob: LAYER, link: LINK, kind: layer, chunks: &self.layer }, now, actions);
        if !self.hot.is_empty() {
            scheduler.step(Event::AddBlob { blob: HOT, link: LINK, kind: hot, chunks: &self.hot }, now, actions);
        }
        if let Some(Plan { entries, byte_cap }) = &self.plan {
            let plan = Event::SetPlan { image: IMAGE, entries, byte_cap: *byte_cap };
            scheduler.step(plan, now, actions);
        }
    }
}

impl Policy for Ours {
    fn on(&mut self, happened: Happened<'_>, now: Now, orders: &mut Vec<Order>) {
        let Self { scheduler, actions, .. } = self;
        match happened {
            Happened::Began => self.begin(now),
            Happened::Touch { unit } | Happened::Avoided { unit } => {
                scheduler.step(Event::Touch { image: IMAGE, chunk: unit }, now, actions);
            }
            Happened::Demand { ticket, units } => {
                let demand = Event::Demand { image: IMAGE, ticket: Ticket(ticket), chunks: units };
                scheduler.step(demand, now, actions);
            }
            Happened::FirstByte { fetch } => {
                scheduler.step(Event::FirstByte { fetch: crate::types::FetchKey(fetch) }, now, actions);
            }
            Happened::Arrived { unit } => {
                scheduler.step(Event::Arrived { chunk: unit }, now, actions);
                scheduler.step(Event::Fetched { chunk: unit }, now, actions);
            }
            Happened::Tick => scheduler.step(Event::Tick, now, actions),
        }
        orders.extend(self.actions.drain(..).map(|action| match action {
            Action::Fetch { fetch, blob, chunks, .. } => Order::Fetch { fetch: fetch.0, blob, units: chunks },
            Action::Wake { ticket, .. } => Order::Wake { ticket: ticket.0 },
            Action::WakeAt { at } => Order::TellAt { at },
        }));
    }

    fn avoids_hot_blob(&self) -> bool {
        !self.scheduler.trusts_plan(IMAGE)
    }
}

/// Chunks that lie one after another, none of them here yet.
fn entries(lens_bytes: impl Iterator<Item = u32>) -> Vec<ChunkEntry> {
    let mut stored_offset_bytes = 0;
    lens_bytes
        .map(|stored_len_bytes| {
            let entry = ChunkEntry { stored_offset_bytes, stored_len_bytes, present: false };
            stored_offset_bytes += u64::from(stored_len_bytes);
            entry
        })
        .collect()
}
