//! The thread that owns the scheduler.
//!
//! Queue threads, fetches and attaching send it messages; it steps the policy and carries out the actions: it starts
//! fetches, and wakes requests. It performs no I/O and takes no lock that others hold for long, so a demand is on its
//! way, and a waiter woken, within microseconds.
//!
//! Blob files are shared by what vouches for them, the digest of the chunk index or of the hot table: images with the
//! same layer share one entry here, and so its fetches. Any of them is a source of its chunks; an entry ends with its
//! last image. Blobs that have only some chunks in common, by name, share those ([`shared_chunks`]). What is known of a registry's link lasts as long as the engine.
//!
//! No sender is kept waiting for long. Demands: each request of a device sends one and waits for its answer, so
//! [`DEMANDS_MAX`] is never reached. Touches are hints and are dropped when there are too many. All others may wait for
//! room: this thread always comes to read its messages, and waits for nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, bounded};
use tokio::sync::{oneshot, watch};
use ublkimg_image::{BLOCK_SIZE, ChunkIndex};
use ublkimg_scheduler::{
    BlobKey, BlobKind, ChunkEntry, ChunkKey, Counters, Estimate, FillMode, FillProgress, ImageCounters as Prefetched,
    ImageKey, PlanEntry, PlanProgress,
};

use crate::counters::ImageCounters;
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{Fetcher, PROGRESS_MAX, Source};
use crate::first_reads::Waited;
use crate::hot::Withdrawn;
use crate::image::Waiter;
use crate::memory::Share;
use crate::store::{BlobFile, HeldObject, Store};

mod links;
mod shared_chunks;
#[cfg(test)]
mod simulation;
mod thread;

use thread::{EngineThread, Inbox, World};

/// Images attached at the same time. With the tags of a device it bounds the demands.
pub const IMAGES_MAX: usize = 64;

/// Requests of one device that can wait at the same time: four queues of 128.
const TAGS_PER_IMAGE_MAX: usize = 512;

/// Requests that can wait at the same time; room for all of them, so that sending one never blocks (1.5 MiB).
const DEMANDS_MAX: usize = IMAGES_MAX * TAGS_PER_IMAGE_MAX;

/// Hints about first reads. A reader at 1 GB/s makes 4000 of them a second; what is beyond is not worth waiting for.
const TOUCHES_MAX: usize = 1024;

/// Every image is added and removed once, gets a plan or two, and is looked at by few.
const CONTROLS_MAX: usize = 8 * IMAGES_MAX;

/// A blob of an image that is being attached.
#[derive(Debug)]
pub(crate) struct NewBlob {
    pub(crate) kind: BlobKind,
    pub(crate) file: Arc<BlobFile>,
    pub(crate) source: Arc<Source>,
    pub(crate) entries: Vec<ChunkEntry>,
}

/// The same blob when the engine knows it.
#[derive(Debug, Clone)]
pub(crate) struct AddedBlob {
    pub(crate) key: BlobKey,
    /// Frames of a hot blob that are not to be demanded.
    pub(crate) withdrawn: Arc<Withdrawn>,
}

/// What the engine can say of one image.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ImageReport {
    /// What was fetched for it and why.
    pub prefetched: Prefetched,
    /// How far it has followed its profile, if it has one.
    pub plan: Option<PlanProgress>,
    /// How far its fill is, if it has one.
    pub fill: Option<FillProgress>,
    /// What is believed of the link to its registry.
    pub link: Option<Estimate>,
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
    image: ImageKey,
    chunks: Vec<ChunkKey>,
    counters: Arc<ImageCounters>,
    waited: Arc<Waited>,
    parked: Parked,
}

struct NewImage {
    link: String,
    attached: watch::Sender<()>,
    trusts_plan: Arc<AtomicBool>,
}

enum Control {
    AddImage { image: ImageKey, new: NewImage, reply: oneshot::Sender<Result<()>> },
    AddBlobs { image: ImageKey, blobs: Vec<NewBlob>, reply: oneshot::Sender<Vec<AddedBlob>> },
    SetPlan { image: ImageKey, entries: Vec<PlanEntry>, byte_cap: u64 },
    SetFill { image: ImageKey, mode: FillMode },
    Pushed { image: ImageKey, chunks: Vec<ChunkKey> },
    Detach { image: ImageKey },
    Report { image: ImageKey, reply: Sender<ImageReport> },
    Counters { reply: Sender<Counters> },
    SeedLinks(Vec<(String, Estimate)>),
    Links { reply: Sender<Vec<(String, Estimate)>> },
    Stop,
}

/// Sends messages to the engine.
#[derive(Debug, Clone)]
pub(crate) struct EngineHandle {
    demands: Sender<Demand>,
    touches: Sender<(ImageKey, ChunkKey)>,
    controls: Sender<Control>,
    // Keys are never used twice; 32 bits are enough for a new image every second for a century.
    next_image: Arc<AtomicU32>,
}

fn stopped() -> Error {
    Error::new(ErrorKind::Internal, "the engine has stopped")
}

impl EngineHandle {
    /// Parks a request of an image until its chunks are there. Never blocks.
    pub(crate) fn demand(
        &self,
        image: ImageKey,
        chunks: Vec<ChunkKey>,
        counters: Arc<ImageCounters>,
        waited: Arc<Waited>,
        waiter: Waiter,
    ) {
        // It fails only when the engine has stopped, and then wakes the request with EIO.
        let _ = self.demands.try_send(Demand { image, chunks, counters, waited, parked: Parked(Some(waiter)) });
    }

    /// Hints at the first read of a chunk that was there. Never blocks.
    pub(crate) fn touch(&self, image: ImageKey, chunk: ChunkKey) {
        let _ = self.touches.try_send((image, chunk));
    }

    /// Registers an image whose chunks come over the link of this name. Sources have receivers of `attached`, which lives
    /// as long as the image. It ends with the [`Attachment`], also if this is never answered.
    pub(crate) async fn add_image(&self, link: String, attached: watch::Sender<()>) -> Result<Attachment> {
        let image = ImageKey(self.next_image.fetch_add(1, Ordering::Relaxed));
        let trusts_plan = Arc::new(AtomicBool::new(true));
        let new = NewImage { link, attached, trusts_plan: Arc::clone(&trusts_plan) };
        let attachment = Attachment { engine: self.clone(), image, trusts_plan, kept: Vec::new(), held: Vec::new() };
        let (reply, answer) = oneshot::channel();
        self.controls.send(Control::AddImage { image, new, reply }).map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?.map(|()| attachment)
    }

    /// Makes blobs of an image known, in this order.
    pub(crate) async fn add_blobs(&self, image: ImageKey, blobs: Vec<NewBlob>) -> Result<Vec<AddedBlob>> {
        let (reply, answer) = oneshot::channel();
        self.controls.send(Control::AddBlobs { image, blobs, reply }).map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())
    }

    /// Says what is expected to be read, instead of what was said before.
    pub(crate) fn set_plan(&self, image: ImageKey, entries: Vec<PlanEntry>, byte_cap: u64) {
        let _ = self.controls.send(Control::SetPlan { image, entries, byte_cap });
    }

    /// Says whether to fetch what nobody asked for.
    pub(crate) fn set_fill(&self, image: ImageKey, mode: FillMode) {
        let _ = self.controls.send(Control::SetFill { image, mode });
    }

    /// Says that blocks of these chunks are pushed: that they are not read says nothing against the plan.
    pub(crate) fn pushed(&self, image: ImageKey, chunks: Vec<ChunkKey>) {
        let _ = self.controls.send(Control::Pushed { image, chunks });
    }

    /// What the engine can say of an image; nothing if it has stopped.
    pub(crate) fn report(&self, image: ImageKey) -> ImageReport {
        self.ask(|reply| Control::Report { image, reply })
    }

    /// Removes an image; whoever waits for what only it could fetch gets EIO.
    pub(crate) fn detach(&self, image: ImageKey) {
        // Without a receiver there is nothing to detach from.
        let _ = self.controls.send(Control::Detach { image });
    }

    fn ask<T: Default>(&self, question: impl FnOnce(Sender<T>) -> Control) -> T {
        let (reply, answer) = bounded(1);
        let _ = self.controls.send(question(reply));
        answer.recv().unwrap_or_default()
    }
}

/// How an image reaches the engine; detaches it when dropped.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) engine: EngineHandle,
    pub(crate) image: ImageKey,
    trusts_plan: Arc<AtomicBool>,
    /// Memory of the image that is given back with it.
    kept: Vec<Share>,
    /// What of the store the image needs to be attached again.
    held: Vec<HeldObject>,
}

impl Attachment {
    /// Memory that the image takes for as long as it is attached.
    pub(crate) fn keep(&mut self, share: Share) {
        self.kept.push(share);
    }

    /// Objects that stay in the store for as long as the image is attached.
    pub(crate) fn hold(&mut self, objects: Vec<HeldObject>) {
        self.held.extend(objects);
    }

    /// Whether the plan of the image is still believed. When it is not, a block is better had with its chunk than with its
    /// hot frame, whose other blocks will not be read.
    pub(crate) fn trusts_plan(&self) -> bool {
        self.trusts_plan.load(Ordering::Relaxed)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.engine.detach(self.image);
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
    /// Starts the threads. Chunks that blobs of `store` have in common are copied from one to the other; it is not kept
    /// open by that.
    ///
    /// # Errors
    /// `Io` if the system has no more of them.
    pub fn start(store: &Arc<Store>) -> Result<Self> {
        let (demands, demanded) = bounded(DEMANDS_MAX);
        let (touches, touched) = bounded(TOUCHES_MAX);
        let (controls, controlled) = bounded(CONTROLS_MAX);
        let (progress, progressed) = bounded(PROGRESS_MAX);
        let fetcher = Fetcher::start(progress, &Arc::downgrade(store))?;
        let engine = EngineThread::new(World::real(fetcher.spawner()), Arc::clone(store.chunk_places()));
        let inbox = Inbox { demanded, touched, controlled, progressed };
        let thread = std::thread::Builder::new().name("engine".to_owned());
        let thread = thread.spawn(move || engine.run(&inbox));
        let thread = thread.map_err(|error| Error::io("start the engine thread", error))?;
        Ok(Self {
            handle: EngineHandle { demands, touches, controls, next_image: Arc::default() },
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
        self.handle.ask(|reply| Control::Counters { reply })
    }

    /// What is believed of each registry's link, by its name. Worth keeping for [`Engine::seed_links`].
    #[must_use]
    pub fn links(&self) -> Vec<(String, Estimate)> {
        self.handle.ask(|reply| Control::Links { reply })
    }

    /// What was believed of links by an earlier process.
    pub fn seed_links(&self, links: Vec<(String, Estimate)>) {
        let _ = self.handle.controls.send(Control::SeedLinks(links));
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

/// Whether all blocks of a chunk are in the store.
pub(crate) fn is_present(file: &BlobFile, index: &ChunkIndex, chunk: u32) -> bool {
    let raw = index.chunk(chunk).raw;
    let block = |offset_bytes: u64| u32::try_from(offset_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
    file.holds(block(raw.start)..block(raw.end))
}

/// The chunks of a blob as the scheduler is told of them.
pub(crate) fn entries(file: &BlobFile, index: &ChunkIndex) -> Vec<ChunkEntry> {
    let entry = |chunk: ublkimg_image::Chunk| ChunkEntry {
        stored_offset_bytes: chunk.stored.start,
        // The index bounds a stored chunk to 260 KiB.
        stored_len_bytes: u32::try_from(chunk.stored.end - chunk.stored.start).unwrap_or(u32::MAX),
        present: is_present(file, index, chunk.index),
    };
    index.iter().map(entry).collect()
}
