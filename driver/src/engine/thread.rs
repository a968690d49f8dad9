//! What the engine's thread does with its messages.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, at, never};
use tokio::sync::watch;
use ublkimg_image::{Chunk, Sha256};
use ublkimg_scheduler::{Action, BlobKey, BlobKind, ChunkKey, Event, FillMode, ImageKey, LinkKey, Scheduler, Ticket};

use super::links::Links;
use super::shared_chunks::{SharedChunks, Way};
use super::{AddedBlob, Control, Demand, IMAGES_MAX, ImageReport, NewBlob, NewImage, Parked, is_present};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{CopyJob, FetchJob, Order, Outcome, Progress, Source, Spawner};
use crate::hot::Withdrawn;
use crate::store::{BlobFile, ChunkPlaces};

pub(super) struct Inbox {
    pub(super) demanded: Receiver<Demand>,
    pub(super) touched: Receiver<(ImageKey, ChunkKey)>,
    pub(super) controlled: Receiver<Control>,
    pub(super) progressed: Receiver<Progress>,
}

/// A layer blob or a hot blob that at least one attached image has.
struct Blob {
    kind: BlobKind,
    file: Arc<BlobFile>,
    withdrawn: Arc<Withdrawn>,
    /// The images that have it, in the order in which they came; those that sent wrong bytes are last.
    sources: Vec<(ImageKey, Arc<Source>)>,
}

impl Blob {
    fn holds(&self, chunk: u32) -> bool {
        let Some((_, source)) = self.sources.first() else { return false };
        is_present(&self.file, &source.index, chunk)
    }

    fn job(&self, order: Order) -> FetchJob {
        let sources = self.sources.iter().map(|(_, source)| Arc::clone(source)).collect();
        FetchJob { order, kind: self.kind, file: Arc::clone(&self.file), sources }
    }

    /// A chunk that other blobs may have too, and whose it is here. A hot frame is nobody else's.
    fn shared(&self, chunk: u32) -> Option<(Chunk, &Arc<Source>)> {
        let (_, source) = self.sources.first()?;
        (self.kind == BlobKind::Layer).then(|| (source.index.chunk(chunk), source))
    }
}

struct Image {
    link: LinkKey,
    blobs: Vec<BlobKey>,
    /// What the scheduler thinks of its plan, for those who read.
    trusts_plan: Arc<AtomicBool>,
    /// Dropped with the image: fetches for it end.
    _attached: watch::Sender<()>,
}

/// How the thread acts on the world outside.
pub(super) struct World {
    /// The scheduler's time counts from here.
    pub(super) start: Instant,
    /// What time it is then.
    pub(super) elapsed: Box<dyn Fn() -> Duration + Send>,
    /// Starts a fetch, if there is a chunk to fetch; never blocks.
    pub(super) fetch: Box<dyn Fn(FetchJob) + Send>,
    /// Starts a copy; never blocks.
    pub(super) copy: Box<dyn Fn(CopyJob) + Send>,
}

impl World {
    pub(super) fn real(spawner: Spawner) -> Self {
        let start = Instant::now();
        let copies = spawner.clone();
        Self {
            start,
            elapsed: Box::new(move || start.elapsed()),
            fetch: Box::new(move |job| spawner.fetch(job)),
            copy: Box::new(move |job| copies.copy(job)),
        }
    }
}

pub(super) struct EngineThread {
    world: World,
    scheduler: Scheduler,
    links: Links,
    shared: SharedChunks,
    blobs: HashMap<BlobKey, Blob>,
    /// Keys of `blobs` by the digest of what vouches for them.
    by_index: BTreeMap<Sha256, BlobKey>,
    images: BTreeMap<ImageKey, Image>,
    waiters: HashMap<Ticket, Parked>,
    /// When the scheduler wants to be told that time has passed.
    wake_at: Option<Duration>,
    next_blob: u32,
    next_ticket: u64,
    actions: Vec<Action>,
}

impl EngineThread {
    pub(super) fn new(world: World, places: Arc<ChunkPlaces>) -> Self {
        Self {
            world,
            scheduler: Scheduler::new(),
            links: Links::default(),
            shared: SharedChunks::new(places),
            blobs: HashMap::new(),
            by_index: BTreeMap::new(),
            images: BTreeMap::new(),
            waiters: HashMap::new(),
            wake_at: None,
            next_blob: 0,
            next_ticket: 0,
            actions: Vec::new(),
        }
    }

    pub(super) fn run(mut self, inbox: &Inbox) {
        loop {
            let tick = self.wake_at.map_or_else(never, |time| at(self.world.start + time));
            crossbeam::select! {
                recv(inbox.demanded) -> demand => if let Ok(demand) = demand { self.demand(demand); },
                recv(inbox.progressed) -> news => if let Ok(news) = news { self.progress(news); },
                recv(inbox.touched) -> touch => if let Ok((image, chunk)) = touch { self.touch(image, chunk); },
                recv(tick) -> _ => self.tick(),
                recv(inbox.controlled) -> control => match control {
                    Ok(Control::Stop) | Err(_) => break,
                    Ok(control) => self.control(control),
                },
            }
        }
    }

    pub(super) fn touch(&mut self, image: ImageKey, chunk: ChunkKey) {
        self.step(Event::Touch { image, chunk });
        self.note_trust(image);
    }

    /// When [`Self::tick`] is due, if nothing else happens before.
    #[cfg(test)]
    pub(super) fn wake_at(&self) -> Option<Duration> {
        self.wake_at
    }

    pub(super) fn tick(&mut self) {
        self.wake_at = None;
        self.step(Event::Tick);
    }

    pub(super) fn control(&mut self, control: Control) {
        match control {
            Control::AddImage { image, new, reply } => drop(reply.send(self.add_image(image, new))),
            Control::AddBlobs { image, blobs, reply } => {
                let added = blobs.into_iter().map(|blob| self.add_blob(image, blob)).collect();
                let _ = reply.send(added);
            }
            Control::SetPlan { image, entries, byte_cap } => {
                self.step(Event::SetPlan { image, entries: &entries, byte_cap });
                self.note_trust(image);
            }
            Control::SetFill { image, mode } => self.set_fill(image, mode),
            Control::Pushed { image, chunks } => {
                chunks.into_iter().for_each(|chunk| self.step(Event::Pushed { image, chunk }));
            }
            Control::Detach { image } => self.detach(image),
            Control::Report { image, reply } => drop(reply.try_send(self.report(image))),
            Control::Counters { reply } => drop(reply.try_send(self.scheduler.counters())),
            Control::SeedLinks(links) => {
                for (name, estimate) in links {
                    self.scheduler.seed_estimate(self.links.key(&name), estimate);
                }
            }
            Control::Links { reply } => drop(reply.try_send(self.links.estimates(&self.scheduler))),
            Control::Stop => {}
        }
    }

    fn step(&mut self, event: Event<'_>) {
        let mut actions = std::mem::take(&mut self.actions);
        self.scheduler.step(event, (self.world.elapsed)(), &mut actions);
        self.carry_out(actions);
    }

    fn carry_out(&mut self, mut actions: Vec<Action>) {
        // Carrying out an action may add more.
        let mut done = 0;
        while let Some(action) = actions.get(done).cloned() {
            done += 1;
            match action {
                Action::Wake { ticket, outcome } => {
                    if let Some(parked) = self.waiters.remove(&ticket) {
                        parked.wake(outcome);
                    }
                }
                Action::Fetch { fetch, blob, chunks, class, since } => {
                    self.fetch(&Order { fetch, blob, chunks, class, since: self.world.start + since }, &mut actions);
                }
                Action::WakeAt { at } => self.wake_at = Some(at),
            }
        }
        actions.clear();
        self.actions = actions;
    }

    /// Fetches chunks of a blob, save those that are on this host.
    fn fetch(&mut self, order: &Order, actions: &mut Vec<Action>) {
        let now = (self.world.elapsed)();
        let key = |chunk: u32| ChunkKey { blob: order.blob, chunk };
        let Some(blob) = self.blobs.get(&order.blob) else {
            for chunk in order.chunks.clone().map(key) {
                self.scheduler.step(Event::Failed { chunk, errno: libc::EIO }, now, actions);
            }
            return self.fetch_shared(order, actions);
        };
        let mut rest = order.chunks.start;
        let link = blob.sources.first().and_then(|(image, _)| self.images.get(image)).map(|image| image.link);
        for chunk in order.chunks.clone() {
            // A fetch for an image that is gone came in after the blob was added again.
            let is_here = blob.holds(chunk);
            if !is_here {
                let (Some((shared, source)), Some(link)) = (blob.shared(chunk), link) else { continue };
                let one = Order { chunks: chunk..chunk + 1, ..order.clone() };
                match self.shared.way(&shared, &blob.file, link, one) {
                    Way::Fetch => continue,
                    Way::Copy(order, place) => {
                        let (file, source) = (Arc::clone(&blob.file), Arc::clone(source));
                        (self.world.copy)(CopyJob { order, place, file, source });
                    }
                    Way::Wait => {}
                }
            }
            (self.world.fetch)(blob.job(Order { chunks: rest..chunk, ..order.clone() }));
            rest = chunk + 1;
            self.scheduler.step(Event::Local { chunk: key(chunk) }, now, actions);
            if is_here {
                self.scheduler.step(Event::Fetched { chunk: key(chunk) }, now, actions);
            }
        }
        (self.world.fetch)(blob.job(Order { chunks: rest..order.chunks.end, ..order.clone() }));
    }

    /// Goes on with the orders of other blobs that wait for chunks of this one, whose fetch is over.
    fn fetch_shared(&mut self, order: &Order, actions: &mut Vec<Action>) {
        for chunk in order.chunks.clone() {
            for waiting in self.shared.over(ChunkKey { blob: order.blob, chunk }) {
                self.fetch(&waiting, actions);
            }
        }
    }

    /// Fetches what an order did not get, or what waited for a chunk of it.
    fn fetch_again(&mut self, orders: &[Order]) {
        let mut actions = std::mem::take(&mut self.actions);
        for order in orders {
            self.fetch(order, &mut actions);
        }
        self.carry_out(actions);
    }

    pub(super) fn demand(&mut self, demand: Demand) {
        for &chunk in &demand.chunks {
            let lost = |blob: &Blob| self.scheduler.is_present(chunk) && !blob.holds(chunk.chunk);
            if self.blobs.get(&chunk.blob).is_some_and(lost) {
                self.step(Event::Lost { chunk });
            }
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.waiters.insert(ticket, demand.parked);
        let misses = self.scheduler.counters().misses;
        let event = Event::Demand { image: demand.image, ticket, chunks: &demand.chunks };
        let mut actions = std::mem::take(&mut self.actions);
        self.scheduler.step(event, (self.world.elapsed)(), &mut actions);
        let is_miss = self.scheduler.counters().misses > misses;
        // Before anybody is woken: the request looks at it when it is answered.
        demand.waited.note(is_miss);
        let counter = if is_miss { &demand.counters.misses } else { &demand.counters.late_hits };
        counter.fetch_add(1, Ordering::Relaxed);
        self.note_trust(demand.image);
        self.carry_out(actions);
    }

    pub(super) fn progress(&mut self, news: Progress) {
        match news {
            Progress::FirstByte(fetch) => self.step(Event::FirstByte { fetch }),
            Progress::Arrived(chunk) => self.step(Event::Arrived { chunk }),
            Progress::Ended { chunk, outcome } => {
                match outcome {
                    Outcome::Stored => self.step(Event::Fetched { chunk }),
                    Outcome::Failed(errno) => self.step(Event::Failed { chunk, errno }),
                    Outcome::Refused(errno) => self.refused(chunk, errno),
                }
                let waiting = self.shared.over(chunk);
                self.fetch_again(&waiting);
            }
            Progress::Wrong { from, rest } => {
                if let Some(blob) = self.blobs.get_mut(&rest.order.blob) {
                    blob.sources.sort_by_key(|(_, source)| Arc::ptr_eq(&source.counters, &from.counters));
                }
                (self.world.fetch)(rest);
            }
            // Another image may have come for the blob since the fetch began; otherwise this fails.
            Progress::Again(order) => {
                let mut orders = vec![order.clone()];
                for chunk in order.chunks {
                    orders.extend(self.shared.over(ChunkKey { blob: order.blob, chunk }));
                }
                self.fetch_again(&orders);
            }
        }
    }

    /// No source has the chunk as it should be. A layer's chunk is an error; a hot frame can be done without.
    fn refused(&mut self, chunk: ChunkKey, errno: i32) {
        let Some(blob) = self.blobs.get(&chunk.blob).filter(|blob| blob.kind == BlobKind::Hot) else {
            return self.step(Event::Failed { chunk, errno });
        };
        if blob.withdrawn.insert(chunk.chunk)
            && let Some((_, source)) = blob.sources.first()
        {
            let (frame, digest) = (chunk.chunk, source.index.chunk(chunk.chunk).id.0);
            tracing::warn!("hot blob {} frame {frame} ({digest}) is withdrawn: chunks take its place", source.blob);
        }
        self.step(Event::Withdrawn { chunk });
    }

    fn note_trust(&self, image: ImageKey) {
        if let Some(of_image) = self.images.get(&image) {
            of_image.trusts_plan.store(self.scheduler.trusts_plan(image), Ordering::Relaxed);
        }
    }

    fn add_image(&mut self, image: ImageKey, new: NewImage) -> Result<()> {
        if self.images.len() >= IMAGES_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{IMAGES_MAX} images are attached, the most there can be: remove one first"),
            ));
        }
        let link = self.links.key(&new.link);
        let NewImage { attached, trusts_plan, .. } = new;
        self.images.insert(image, Image { link, blobs: Vec::new(), trusts_plan, _attached: attached });
        self.step(Event::AddImage { image, link });
        Ok(())
    }

    fn add_blob(&mut self, image: ImageKey, new: NewBlob) -> AddedBlob {
        let index = new.file.index_digest();
        let known = self.by_index.get(&index).copied();
        let link = match self.images.get_mut(&image) {
            Some(image) => {
                image.blobs.extend(known.or(Some(BlobKey(self.next_blob))));
                image.link
            }
            // It was removed meanwhile: whoever asks for this blob gets EIO.
            None => return AddedBlob { key: BlobKey(u32::MAX), withdrawn: Arc::new(Withdrawn::new(0)) },
        };
        if let Some(key) = known
            && let Some(blob) = self.blobs.get_mut(&key)
        {
            blob.sources.push((image, new.source));
            return AddedBlob { key, withdrawn: Arc::clone(&blob.withdrawn) };
        }
        let key = BlobKey(self.next_blob);
        self.next_blob += 1;
        let withdrawn = Arc::new(Withdrawn::new(new.source.index.len()));
        let added = AddedBlob { key, withdrawn: Arc::clone(&withdrawn) };
        let sources = vec![(image, new.source)];
        self.blobs.insert(key, Blob { kind: new.kind, file: new.file, withdrawn, sources });
        self.by_index.insert(index, key);
        self.step(Event::AddBlob { blob: key, link, kind: new.kind, chunks: &new.entries });
        added
    }

    fn set_fill(&mut self, image: ImageKey, mode: FillMode) {
        let Some(of_image) = self.images.get(&image) else { return };
        let is_layer = |key: &&BlobKey| self.blobs.get(key).is_some_and(|blob| blob.kind == BlobKind::Layer);
        let blobs: Vec<BlobKey> = of_image.blobs.iter().filter(is_layer).copied().collect();
        self.step(Event::SetFill { image, mode, blobs: &blobs });
    }

    fn report(&self, image: ImageKey) -> ImageReport {
        ImageReport {
            prefetched: self.scheduler.image_counters(image).unwrap_or_default(),
            plan: self.scheduler.plan_progress(image),
            fill: self.scheduler.fill_progress(image),
            link: self.images.get(&image).and_then(|image| self.scheduler.estimate(image.link)),
        }
    }

    fn detach(&mut self, image: ImageKey) {
        let Some(removed) = self.images.remove(&image) else { return };
        // First this: nothing more is fetched on its behalf.
        self.step(Event::RemoveImage { image });
        for key in removed.blobs {
            let Some(blob) = self.blobs.get_mut(&key) else { continue };
            blob.sources.retain(|(owner, _)| *owner != image);
            if blob.sources.is_empty() {
                self.by_index.remove(&blob.file.index_digest());
                self.blobs.remove(&key);
                self.step(Event::RemoveBlob { blob: key });
            }
        }
    }
}
