//! The step: one event in, actions out.

use std::collections::BTreeMap;

use crate::counters::Counters;
use crate::demand::Demands;
use crate::fill::Fill;
use crate::flight::{Flight, Flights};
use crate::guard::Level;
use crate::link::Link;
use crate::plan::Plan;
use crate::streams::Streams;
use crate::table::{State, Table};
use crate::types::{
    Action, BlobKey, BlobKind, ChunkKey, Class, Estimate, Event, FetchKey, FillMode, FillProgress, ImageCounters,
    ImageKey, LinkKey, Now, PlanEntry, PlanProgress,
};

/// How long a chunk that could not be had stays so without asking again. The kernel follows a failed read-ahead with a
/// read of each of its pages: without this a bad chunk is fetched once for each, and a registry that is down makes each
/// of them wait for the whole deadline. A program that tries again later finds what was mended.
pub const FAILURE_HOLD: Now = Now::from_secs(1);

/// Chunks held as failed at a time; more are asked for again. As many demands can fail within [`FAILURE_HOLD`] when a
/// registry refuses everything at once.
pub const FAILURES_MAX: usize = 4096;

/// The errno of a request that needs what cannot be had (Linux, `errno-base.h`).
pub(crate) const EIO: i32 = 5;

/// An attached image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) link: LinkKey,
    pub(crate) plan: Option<Plan>,
    pub(crate) fill: Option<Fill>,
    pub(crate) counters: ImageCounters,
}

/// The policy. See the crate's documentation.
#[derive(Debug, Default)]
pub struct Scheduler {
    pub(crate) table: Table,
    /// Every link that was ever named: what is known of one outlives its images. There are as many as registries.
    pub(crate) links: BTreeMap<LinkKey, Link>,
    pub(crate) images: BTreeMap<ImageKey, Image>,
    pub(crate) flights: Flights,
    pub(crate) demands: Demands,
    /// Chunks that failed a moment ago: until when they stay so, and why. At most [`FAILURES_MAX`].
    pub(crate) failures: BTreeMap<ChunkKey, (Now, i32)>,
    pub(crate) streams: Streams,
    pub(crate) counters: Counters,
    /// The tick that was asked for.
    pub(crate) armed: Option<Now>,
}

impl Scheduler {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one event and appends what is to be done about it.
    pub fn step(&mut self, event: Event<'_>, now: Now, actions: &mut Vec<Action>) {
        match event {
            Event::AddImage { image, link } => self.add_image(image, link),
            Event::RemoveImage { image } => self.remove_image(image),
            Event::AddBlob { blob, link, kind, chunks } => {
                self.links.entry(link).or_default();
                self.table.add(blob, link, kind, chunks);
            }
            Event::RemoveBlob { blob } => self.remove_blob(blob, actions),
            Event::SetPlan { image, entries, byte_cap } => self.set_plan(image, entries, byte_cap),
            Event::SetFill { image, mode, blobs } => self.set_fill(image, mode, blobs),
            Event::Demand { image, ticket, chunks } => self.demand(image, ticket, chunks, now, actions),
            Event::Touch { image, chunk } => self.touch(image, chunk, now),
            Event::Pushed { image, chunk } => {
                if let Some(plan) = self.images.get_mut(&image).and_then(|image| image.plan.as_mut()) {
                    plan.pushed(chunk);
                }
            }
            Event::FirstByte { fetch } => self.first_byte(fetch, now),
            Event::Arrived { chunk } => self.arrived(chunk, now),
            Event::Local { chunk } => self.local(chunk, now),
            Event::Fetched { chunk } => self.fetched(chunk, now, actions),
            Event::Failed { chunk, errno } => self.failed(chunk, errno, now, actions),
            Event::Withdrawn { chunk } => self.withdrawn(chunk, now, actions),
            Event::Lost { chunk } => self.lost(chunk),
            Event::Tick => {}
        }
        self.issue_demands(now, actions);
        self.issue_prefetch(now, actions);
    }

    /// What has been decided so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether the plan of an image has not been dropped. Once it is, a block that its hot blob has is better had with its
    /// chunk, for the rest of the frame will not be read: the caller demands the chunk then, and sends
    /// [`Event::Touch`] for the frame, by which the plan can prove itself again.
    #[must_use]
    pub fn trusts_plan(&self, image: ImageKey) -> bool {
        let plan = self.images.get(&image).and_then(|image| image.plan.as_ref());
        plan.is_none_or(|plan| plan.level() != Level::Dropped)
    }

    /// What has been decided for an image; `None` if it is unknown.
    #[must_use]
    pub fn image_counters(&self, image: ImageKey) -> Option<ImageCounters> {
        let image = self.images.get(&image)?;
        let plan_bytes = image.counters.plan_bytes + image.plan.as_ref().map_or(0, Plan::spent_bytes);
        Some(ImageCounters { plan_bytes, ..image.counters })
    }

    /// How far an image has followed its plan; `None` if it has none.
    #[must_use]
    pub fn plan_progress(&self, image: ImageKey) -> Option<PlanProgress> {
        self.images.get(&image)?.plan.as_ref().map(Plan::progress)
    }

    /// How far the fill of an image is; `None` if it has none.
    #[must_use]
    pub fn fill_progress(&self, image: ImageKey) -> Option<FillProgress> {
        self.images.get(&image)?.fill.as_ref().map(|fill| fill.progress(&self.table))
    }

    /// What is believed of a link; `None` while nothing was seen of it.
    #[must_use]
    pub fn estimate(&self, link: LinkKey) -> Option<Estimate> {
        self.links.get(&link)?.estimator.get()
    }

    /// What was believed of a link before: it need not be found out again.
    pub fn seed_estimate(&mut self, link: LinkKey, estimate: Estimate) {
        self.links.entry(link).or_default().estimator.seed(estimate);
    }

    /// The most bytes of prefetch that a link may have in flight now.
    #[must_use]
    pub fn window_bytes(&self, link: LinkKey) -> Option<u64> {
        self.links.get(&link).map(Link::window_bytes)
    }

    /// Whether the table holds the chunk as present in the store.
    #[must_use]
    pub fn is_present(&self, chunk: ChunkKey) -> bool {
        self.table.state(chunk) == Some(State::Present)
    }

    /// Device requests that wait now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.demands.tickets.len()
    }

    fn add_image(&mut self, image: ImageKey, link: LinkKey) {
        self.links.entry(link).or_default();
        let new = Image { link, plan: None, fill: None, counters: ImageCounters::default() };
        self.images.insert(image, new);
    }

    fn remove_image(&mut self, image: ImageKey) {
        let Some(removed) = self.images.remove(&image) else { return };
        if let Some(link) = self.links.get_mut(&removed.link) {
            link.plans.remove(image);
            link.fills.remove(image);
        }
    }

    fn remove_blob(&mut self, blob: BlobKey, actions: &mut Vec<Action>) {
        let Some(link) = self.table.blob(blob).map(|blob| blob.link) else { return };
        self.table.remove(blob);
        self.streams.remove(blob);
        self.failures.retain(|chunk, _| chunk.blob != blob);
        if let Some(link) = self.links.get_mut(&link) {
            link.queue.retain(|queued| queued.chunk.blob != blob);
        }
        self.demands.wake_blob(blob, EIO, actions);
    }

    fn set_plan(&mut self, image: ImageKey, entries: &[PlanEntry], byte_cap: u64) {
        let Some(found) = self.images.get_mut(&image) else { return };
        let table = &self.table;
        let plan = Plan::new(entries, byte_cap, |chunk| table.chunk(chunk).is_some());
        if let Some(before) = found.plan.replace(plan) {
            found.counters.plan_bytes += before.spent_bytes();
        }
        if let Some(link) = self.links.get_mut(&found.link) {
            link.plans.add(image);
        }
    }

    fn set_fill(&mut self, image: ImageKey, mode: FillMode, blobs: &[BlobKey]) {
        let Some(found) = self.images.get_mut(&image) else { return };
        found.fill = Some(Fill::new(mode, blobs));
        if let Some(link) = self.links.get_mut(&found.link) {
            link.fills.add(image);
        }
    }

    fn touch(&mut self, image: ImageKey, chunk: ChunkKey, now: Now) {
        let is_avoided = self.table.state(chunk) == Some(State::Absent);
        if is_avoided && let Some(plan) = self.images.get_mut(&image).and_then(|image| image.plan.as_mut()) {
            plan.avoided();
        }
        self.read(image, chunk, true, now);
    }

    /// Takes note of a read: of a chunk that was there, or one that is demanded. `is_first` holds if it is known to be
    /// the first of the image.
    pub(crate) fn read(&mut self, image: ImageKey, key: ChunkKey, is_first: bool, now: Now) {
        let Some(chunk) = self.table.chunk_mut(key) else { return };
        let is_first = is_first || !chunk.read;
        let used_bytes = if chunk.prefetched && !chunk.read { chunk.len_bytes() } else { 0 };
        chunk.read = true;
        let mut is_planned = false;
        if let Some(image) = self.images.get_mut(&image) {
            image.counters.used_bytes += used_bytes;
            if let Some(plan) = &mut image.plan {
                is_planned = plan.read(key, is_first, now) && plan.level() != Level::Dropped;
            }
        }
        // What a plan knows of is no sign of a sequential reader, and hot blobs have none.
        if let Some(blob) = self.table.blob(key.blob)
            && blob.kind == BlobKind::Layer
            && !is_planned
        {
            let stored_len = |index: u32| blob.chunks.get(index as usize).map(|chunk| chunk.stored_len_bytes);
            self.streams.access(key, now, stored_len);
        }
    }

    fn first_byte(&mut self, fetch: FetchKey, now: Now) {
        let Some(request) = self.flights.requests.get_mut(&fetch) else { return };
        if std::mem::replace(&mut request.has_first_byte, true) {
            return;
        }
        let Some(link) = self.links.get_mut(&request.link) else { return };
        if request.class == Class::Fill {
            link.idle_fill.first_byte(now.saturating_sub(request.mark.at), link.estimator.round_trip());
        }
        link.estimator.first_byte(&request.mark, now);
        link.speaks(now);
    }

    fn arrived(&mut self, chunk: ChunkKey, now: Now) {
        self.leave(chunk, true, now);
    }

    /// The bytes of a chunk are no longer on the link; they have arrived, or will not come.
    fn leave(&mut self, key: ChunkKey, well: bool, now: Now) {
        let Some(flight) = self.flights.chunks.get_mut(&key) else { return };
        if std::mem::replace(&mut flight.has_arrived, true) {
            return;
        }
        let flight = *flight;
        if well {
            self.first_byte(flight.fetch, now);
        }
        let Some(link) = self.links.get_mut(&flight.link) else { return };
        let Some(request) = self.flights.requests.get_mut(&flight.fetch) else { return };
        if well {
            link.estimator.arrived(&request.mark, flight.len_bytes, now);
        }
        request.left -= 1;
        let is_over = request.left == 0;
        link.left(flight.class, flight.len_bytes, is_over, now);
        if is_over {
            self.flights.requests.remove(&flight.fetch);
        }
    }

    /// A chunk needs no link. What its fetch was counted for is given back, also to the cap of a plan.
    fn local(&mut self, key: ChunkKey, now: Now) {
        let Some(flight) = self.flights.chunks.get(&key).copied().filter(|flight| !flight.has_arrived) else { return };
        let request = self.flights.requests.get(&flight.fetch);
        let was_all = request.is_some_and(|request| request.left == 1 && !request.has_first_byte);
        self.leave(key, false, now);
        self.counters.took_back(flight.class, flight.len_bytes, was_all);
        if let Some(key) = flight.image
            && let Some(image) = self.images.get_mut(&key)
        {
            image.counters.took_back(flight.class, flight.len_bytes, was_all);
            if let (Class::Trace, Some(plan)) = (flight.class, &mut image.plan) {
                plan.take_back(flight.len_bytes);
                // It may have come to its cap.
                if let Some(link) = self.links.get_mut(&image.link) {
                    link.plans.add(key);
                }
            }
        }
        if let Some(chunk) = self.table.chunk_mut(key) {
            chunk.prefetched = false;
        }
    }

    fn fetched(&mut self, chunk: ChunkKey, now: Now, actions: &mut Vec<Action>) {
        self.leave(chunk, true, now);
        if self.end(chunk).is_some() {
            self.counters.fetched += 1;
            self.table.set_state(chunk, State::Present);
            self.demands.wake(chunk, actions);
        }
    }

    fn withdrawn(&mut self, chunk: ChunkKey, now: Now, actions: &mut Vec<Action>) {
        self.leave(chunk, true, now);
        self.end(chunk);
        self.counters.withdrawn += 1;
        if let Some(link) = self.table.blob(chunk.blob).map(|blob| blob.link)
            && let Some(link) = self.links.get_mut(&link)
        {
            link.queue.retain(|queued| queued.chunk != chunk);
        }
        self.table.set_state(chunk, State::Withdrawn);
        self.demands.wake(chunk, actions);
    }

    fn failed(&mut self, key: ChunkKey, errno: i32, now: Now, actions: &mut Vec<Action>) {
        self.leave(key, false, now);
        let Some(flight) = self.end(key) else { return };
        self.counters.failed += 1;
        if let (Some((image, since)), Some(_)) = (flight.late_hit, self.table.chunk(key)) {
            // Who joined a prefetch has waited for less time than that, and may wait for longer.
            self.queue_demand(key, image, since);
            return;
        }
        self.table.set_state(key, State::Absent);
        self.demands.wake_with_error(key, errno, actions);
        self.failures.retain(|_, (until, _)| now < *until);
        let Some(chunk) = self.table.chunk_mut(key) else { return };
        chunk.failures = chunk.failures.saturating_add(1);
        let failures = chunk.failures;
        if self.failures.len() < FAILURES_MAX {
            self.failures.insert(key, (now + FAILURE_HOLD, errno));
        }
        if flight.class == Class::Trace {
            self.retry_of_plan(flight, key, failures, now + FAILURE_HOLD);
        }
    }

    fn retry_of_plan(&mut self, flight: Flight, chunk: ChunkKey, failures: u8, at: Now) {
        let Some(key) = flight.image else { return };
        let Some(image) = self.images.get_mut(&key) else { return };
        if let Some(plan) = &mut image.plan
            && plan.failed(chunk, failures, at)
            && let Some(link) = self.links.get_mut(&image.link)
        {
            link.plans.add(key);
        }
    }

    fn end(&mut self, chunk: ChunkKey) -> Option<Flight> {
        let flight = self.flights.end(chunk)?;
        if flight.class == Class::Demand
            && let Some(link) = self.links.get_mut(&flight.link)
        {
            link.demands -= 1;
        }
        Some(flight)
    }

    fn lost(&mut self, chunk: ChunkKey) {
        if self.is_present(chunk) {
            self.table.set_state(chunk, State::Absent);
        }
    }

    /// Why the chunk cannot be had now, if that is known.
    pub(crate) fn recent_failure(&self, chunk: ChunkKey, now: Now) -> Option<(Now, i32)> {
        self.failures.get(&chunk).filter(|(until, _)| now < *until).copied()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
