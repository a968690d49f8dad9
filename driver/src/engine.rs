//! The thread that owns the scheduler.
//!
//! Queue threads, fetches and attaching send it messages; it steps the policy and carries out the actions: it starts
//! fetches, and wakes requests. It performs no I/O and takes no lock that others hold for long, so a demand is on its
//! way, and a waiter woken, within microseconds.
//!
//! Blob files are shared by what vouches for them, the digest of the chunk index: images with the same layer share one
//! entry here, and so its fetches. Any of them is a source of its chunks; an entry ends with its last image.
//!
//! No sender is ever kept waiting by this thread being slow. Demands: each request of a device sends one and waits for
//! its answer, so [`DEMANDS_MAX`] is never reached. Completions: one for each fetch. Touches are hints and are dropped
//! when there are too many.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded};
use tokio::sync::{oneshot, watch};
use ublkimg_image::{BLOCK_SIZE, ChunkIndex, Sha256};
use ublkimg_scheduler::{
    Action, BlobKey, BlobKind, ChunkEntry, ChunkKey, Class, Counters, Event, ImageKey, LinkKey, Now, Scheduler, Ticket,
};

use crate::counters::ImageCounters;
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{Completion, FETCHES_MAX, FetchJob, Fetcher, Outcome, Source, Spawner};
use crate::first_reads::Waited;
use crate::image::Waiter;
use crate::store::BlobFile;

/// Images attached at the same time. With the tags of a device it bounds the demands.
pub const IMAGES_MAX: usize = 64;

/// Requests of one device that can wait at the same time: four queues of 128.
const TAGS_PER_IMAGE_MAX: usize = 512;

/// Requests that can wait at the same time; room for all of them, so that sending one never blocks (1.5 MiB).
const DEMANDS_MAX: usize = IMAGES_MAX * TAGS_PER_IMAGE_MAX;

/// Hints about first reads. A reader at 1 GB/s makes 4000 of them a second; what is beyond is not worth waiting for.
const TOUCHES_MAX: usize = 1024;

/// Every image is added once, removed once, and looked at by few.
const CONTROLS_MAX: usize = 4 * IMAGES_MAX;

/// All registries count as one, until images say which is theirs.
const LINK: LinkKey = LinkKey(0);

/// Who reads is not told yet.
const ANY_IMAGE: ImageKey = ImageKey(u32::MAX);

/// A layer blob of an image that is being attached.
#[derive(Debug)]
pub(crate) struct NewBlob {
    pub(crate) file: Arc<BlobFile>,
    pub(crate) source: Arc<Source>,
    pub(crate) entries: Vec<ChunkEntry>,
}

#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) image: ImageKey,
    /// Keys of the blobs, in the order in which they were given.
    pub(crate) blobs: Vec<BlobKey>,
}

/// A waiter that is called exactly once whatever happens: with EIO if it is dropped, as all are when the engine stops.
struct Parked(Option<Waiter>);

impl Parked {
    fn wake(mut self, outcome: Result<(), i32>) {
        if let Some(waiter) = self.0.take() {
            waiter(outcome);
        }
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        if let Some(waiter) = self.0.take() {
            waiter(Err(libc::EIO));
        }
    }
}

struct Demand {
    chunks: Vec<ChunkKey>,
    counters: Arc<ImageCounters>,
    waited: Arc<Waited>,
    parked: Parked,
}

enum Control {
    Attach { blobs: Vec<NewBlob>, attached: watch::Sender<()>, reply: oneshot::Sender<Result<Attached>> },
    Detach { image: ImageKey },
    Counters { reply: Sender<Counters> },
    Stop,
}

/// Sends messages to the engine.
#[derive(Debug, Clone)]
pub(crate) struct EngineHandle {
    demands: Sender<Demand>,
    touches: Sender<ChunkKey>,
    controls: Sender<Control>,
}

impl EngineHandle {
    /// Parks a request until its chunks are there. Never blocks.
    pub(crate) fn demand(
        &self,
        chunks: Vec<ChunkKey>,
        counters: Arc<ImageCounters>,
        waited: Arc<Waited>,
        waiter: Waiter,
    ) {
        // It fails only when the engine has stopped, and then wakes the request with EIO.
        let _ = self.demands.try_send(Demand { chunks, counters, waited, parked: Parked(Some(waiter)) });
    }

    /// Hints at the first read of a chunk that was there. Never blocks.
    pub(crate) fn touch(&self, chunk: ChunkKey) {
        let _ = self.touches.try_send(chunk);
    }

    /// Registers the blobs of an image. Their sources have receivers of `attached`, which lives as long as the image.
    pub(crate) async fn attach(&self, blobs: Vec<NewBlob>, attached: watch::Sender<()>) -> Result<Attached> {
        let (reply, answer) = oneshot::channel();
        let stopped = || Error::new(ErrorKind::Internal, "the engine has stopped");
        self.controls.try_send(Control::Attach { blobs, attached, reply }).map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Removes an image; whoever waits for what only it could fetch gets EIO.
    pub(crate) fn detach(&self, image: ImageKey) {
        // Without a receiver there is nothing to detach from.
        let _ = self.controls.try_send(Control::Detach { image });
    }
}

/// The running engine with its fetcher. Stop it with [`Engine::stop`].
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
    fetcher: Option<Fetcher>,
    runtime: tokio::runtime::Handle,
}

impl Engine {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Io` if the system has no more of them.
    pub fn start() -> Result<Self> {
        let (demands, demanded) = bounded(DEMANDS_MAX);
        let (touches, touched) = bounded(TOUCHES_MAX);
        let (controls, controlled) = bounded(CONTROLS_MAX);
        let (completions, completed) = bounded(FETCHES_MAX);
        let fetcher = Fetcher::start(completions)?;
        let engine = EngineThread::new(fetcher.spawner());
        let inbox = Inbox { demanded, touched, controlled, completed };
        let thread = std::thread::Builder::new().name("engine".to_owned());
        let thread = thread.spawn(move || engine.run(&inbox));
        let thread = thread.map_err(|error| Error::io("start the engine thread", error))?;
        Ok(Self {
            handle: EngineHandle { demands, touches, controls },
            thread: Some(thread),
            runtime: fetcher.runtime().clone(),
            fetcher: Some(fetcher),
        })
    }

    pub(crate) fn handle(&self) -> &EngineHandle {
        &self.handle
    }

    /// The runtime that fetches run on, for attaching images.
    #[must_use]
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// What the scheduler has decided so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let (reply, answer) = bounded(1);
        let _ = self.handle.controls.try_send(Control::Counters { reply });
        answer.recv().unwrap_or_default()
    }

    /// Answers all that wait with EIO, drops what is under way, and ends the threads. Not to be called from an
    /// asynchronous context.
    pub fn stop(mut self) {
        self.stop_thread();
        if let Some(fetcher) = self.fetcher.take() {
            fetcher.stop();
        }
    }

    fn stop_thread(&mut self) {
        // The thread always comes to read its messages.
        let _ = self.handle.controls.send(Control::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine thread panicked");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(fetcher) = self.fetcher.take() {
            self.stop_thread();
            fetcher.abandon();
        }
    }
}

struct Inbox {
    demanded: Receiver<Demand>,
    touched: Receiver<ChunkKey>,
    controlled: Receiver<Control>,
    completed: Receiver<Completion>,
}

/// A layer blob that at least one attached image has.
struct Blob {
    file: Arc<BlobFile>,
    /// The images that have it, in the order in which they came.
    sources: Vec<(ImageKey, Arc<Source>)>,
}

impl Blob {
    fn holds(&self, chunk: u32) -> bool {
        let Some((_, source)) = self.sources.first() else { return false };
        is_present(&self.file, &source.index, chunk)
    }
}

/// Whether all blocks of a chunk are in the store.
pub(crate) fn is_present(file: &BlobFile, index: &ChunkIndex, chunk: u32) -> bool {
    let raw = index.chunk(chunk).raw;
    let block = |offset_bytes: u64| u32::try_from(offset_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
    file.first_missing(block(raw.start)..block(raw.end)).is_none()
}

struct Image {
    blobs: Vec<BlobKey>,
    /// Dropped with the image: fetches for it end.
    _attached: watch::Sender<()>,
}

struct EngineThread {
    start: Instant,
    scheduler: Scheduler,
    spawner: Spawner,
    blobs: HashMap<BlobKey, Blob>,
    /// Keys of `blobs` by the digest of their chunk index.
    by_index: BTreeMap<Sha256, BlobKey>,
    images: BTreeMap<ImageKey, Image>,
    waiters: HashMap<Ticket, Parked>,
    // Keys are never used twice; 32 bits are enough for a new image every second for a century.
    next_image: u32,
    next_blob: u32,
    next_ticket: u64,
    actions: Vec<Action>,
}

impl EngineThread {
    fn new(spawner: Spawner) -> Self {
        Self {
            start: Instant::now(),
            scheduler: Scheduler::new(),
            spawner,
            blobs: HashMap::new(),
            by_index: BTreeMap::new(),
            images: BTreeMap::new(),
            waiters: HashMap::new(),
            next_image: 0,
            next_blob: 0,
            next_ticket: 0,
            actions: Vec::new(),
        }
    }

    fn run(mut self, inbox: &Inbox) {
        loop {
            crossbeam::select! {
                recv(inbox.demanded) -> demand => if let Ok(demand) = demand { self.demand(demand); },
                recv(inbox.completed) -> completion => if let Ok(completion) = completion { self.complete(completion); },
                recv(inbox.touched) -> chunk => if let Ok(chunk) = chunk { self.step(Event::Touch { image: ANY_IMAGE, chunk }); },
                recv(inbox.controlled) -> control => match control {
                    Ok(Control::Attach { blobs, attached, reply }) => { let _ = reply.send(self.attach(blobs, attached)); }
                    Ok(Control::Detach { image }) => self.detach(image),
                    Ok(Control::Counters { reply }) => { let _ = reply.try_send(self.scheduler.counters()); }
                    Ok(Control::Stop) | Err(_) => break,
                },
            }
        }
    }

    fn step(&mut self, event: Event<'_>) {
        let mut actions = std::mem::take(&mut self.actions);
        self.scheduler.step(event, self.start.elapsed(), &mut actions);
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
                Action::Fetch { blob, chunks, class, since, .. } => {
                    for chunk in chunks {
                        self.fetch(ChunkKey { blob, chunk }, class, since, &mut actions);
                    }
                }
                Action::WakeAt { .. } => {}
            }
        }
        actions.clear();
        self.actions = actions;
    }

    fn fetch(&mut self, chunk: ChunkKey, class: Class, since: Now, actions: &mut Vec<Action>) {
        let now = self.start.elapsed();
        match self.blobs.get(&chunk.blob) {
            None => self.scheduler.step(Event::Failed { chunk, errno: libc::EIO }, now, actions),
            // A fetch for an image that is gone came in after the blob was added again.
            Some(blob) if blob.holds(chunk.chunk) => self.scheduler.step(Event::Fetched { chunk }, now, actions),
            Some(blob) => self.spawner.fetch(FetchJob {
                chunk,
                class,
                since: self.start + since,
                file: Arc::clone(&blob.file),
                sources: blob.sources.iter().map(|(_, source)| Arc::clone(source)).collect(),
            }),
        }
    }

    fn demand(&mut self, demand: Demand) {
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
        let mut actions = std::mem::take(&mut self.actions);
        let event = Event::Demand { image: ANY_IMAGE, ticket, chunks: &demand.chunks };
        self.scheduler.step(event, self.start.elapsed(), &mut actions);
        let is_miss = self.scheduler.counters().misses > misses;
        // Before anybody is woken: the request looks at it when it is answered.
        demand.waited.note(is_miss);
        let counter = if is_miss { &demand.counters.misses } else { &demand.counters.late_hits };
        counter.fetch_add(1, Ordering::Relaxed);
        self.carry_out(actions);
    }

    fn complete(&mut self, completion: Completion) {
        let chunk = completion.chunk;
        match completion.outcome {
            Outcome::Stored => self.step(Event::Fetched { chunk }),
            Outcome::Failed(errno) => self.step(Event::Failed { chunk, errno }),
            // Another image may have come for the blob since the fetch began; otherwise this fails.
            Outcome::Abandoned => {
                let mut actions = Vec::new();
                self.fetch(chunk, Class::Demand, self.start.elapsed(), &mut actions);
                self.carry_out(actions);
            }
        }
    }

    fn attach(&mut self, blobs: Vec<NewBlob>, attached: watch::Sender<()>) -> Result<Attached> {
        if self.images.len() >= IMAGES_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{IMAGES_MAX} images are attached, the most there can be: remove one first"),
            ));
        }
        let image = ImageKey(self.next_image);
        self.next_image += 1;
        let blobs: Vec<BlobKey> = blobs.into_iter().map(|blob| self.add_blob(image, blob)).collect();
        self.step(Event::AddImage { image, link: LINK });
        self.images.insert(image, Image { blobs: blobs.clone(), _attached: attached });
        Ok(Attached { image, blobs })
    }

    fn add_blob(&mut self, image: ImageKey, new: NewBlob) -> BlobKey {
        let index = new.file.index_digest();
        if let Some(key) = self.by_index.get(&index).copied()
            && let Some(blob) = self.blobs.get_mut(&key)
        {
            blob.sources.push((image, new.source));
            return key;
        }
        let key = BlobKey(self.next_blob);
        self.next_blob += 1;
        self.blobs.insert(key, Blob { file: new.file, sources: vec![(image, new.source)] });
        self.by_index.insert(index, key);
        let kind = BlobKind::Layer;
        self.step(Event::AddBlob { blob: key, link: LINK, kind, chunks: &new.entries });
        key
    }

    fn detach(&mut self, image: ImageKey) {
        let Some(removed) = self.images.remove(&image) else { return };
        for key in removed.blobs {
            let Some(blob) = self.blobs.get_mut(&key) else { continue };
            blob.sources.retain(|(owner, _)| *owner != image);
            if blob.sources.is_empty() {
                self.by_index.remove(&blob.file.index_digest());
                self.blobs.remove(&key);
                self.step(Event::RemoveBlob { blob: key });
            }
        }
        self.step(Event::RemoveImage { image });
    }
}
