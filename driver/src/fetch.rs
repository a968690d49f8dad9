//! From "fetch these chunks" to "they are in the store": one task per order on a small runtime.
//!
//! A task asks the registry for exactly the bytes of the stored frames, which lie one after another, and reads the answer
//! as it comes: each frame is handed to the decoders ([`crate::decode`]) when its last byte is there. They verify, decode
//! and store it and tell the engine. While there is no room for what is not decoded yet, the answer is not read.
//!
//! Trouble with the network is waited out here, until the read deadline of the image that the bytes are fetched for: so
//! long nothing may come, or too little ([`Patience`]). The registry crate retries each request on its own for a shorter time, so an outage shows here
//! as one slow failure after another. Images that have the same blob take turns: an outage of one registry does not hold
//! up a chunk that another one has. A chunk that has arrived whole is never asked for again, unless it was not the right
//! one: then the others are asked for it. A source that answers for certain (not found, not allowed, not these bytes) is
//! not asked again; when none is left, the chunks that did not arrive have failed.
//!
//! Nothing here is without a bound: the scheduler bounds what is asked for, each order holds less than two pieces of its
//! answer, and [`crate::decode`] bounds what has arrived.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use crossbeam::channel::Sender;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use ublkimg_image::ChunkIndex;
use ublkimg_registry::{Digest, ErrorKind as RegistryErrorKind, Repository};
use ublkimg_scheduler::{BlobKey, BlobKind, ChunkKey, Class, FetchKey};

use crate::counters::ImageCounters;
use crate::decode::{Content, DecodeJob, DecodeQueue, Decoders};
use crate::error::{Error, Result};
use crate::outage::{SILENCE_MIN, Wait};
use crate::patience::Patience;
use crate::start_events::Get;
use crate::store::{BlobFile, ChunkPlace, Store};

/// News that wait for the engine. It takes microseconds for each; who finds no room waits for it.
pub(crate) const PROGRESS_MAX: usize = 1024;

/// Threads that speak to registries: TLS at 10 Gbit/s needs no more.
const NETWORK_THREADS: usize = 2;

/// Threads for what blocks on the disk or the kernel: what all commands and the recovery of all images do at a time. Who
/// finds none waits for one; none of them waits for another.
pub(crate) const BLOCKING_THREADS_MAX: usize = 128;

/// Where the chunks of a blob can be had: an attached image's repository.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) repository: Repository,
    /// The blob there.
    pub(crate) blob: Digest,
    /// Its chunks; the frames of a hot blob.
    pub(crate) index: Arc<ChunkIndex>,
    /// How long a read waits for a registry that does not answer.
    pub(crate) read_deadline: Duration,
    pub(crate) counters: Arc<ImageCounters>,
    /// Its sender lives as long as the image is attached.
    pub(crate) attached: watch::Receiver<()>,
}

impl Source {
    /// After wrong bytes that may be a mirror's: the same, which is asked without them.
    pub(crate) fn without_mirrors(&self) -> Option<Arc<Self>> {
        let repository = self.repository.distrust_mirrors(&self.blob)?;
        Some(Arc::new(Self { repository, ..self.clone() }))
    }
}

/// What the scheduler wants.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) fetch: FetchKey,
    pub(crate) blob: BlobKey,
    /// Their stored bytes lie one after another.
    pub(crate) chunks: Range<u32>,
    pub(crate) class: Class,
    /// Read deadlines count from here.
    pub(crate) since: std::time::Instant,
}

/// An order and who can fulfil it.
#[derive(Debug)]
pub(crate) struct FetchJob {
    pub(crate) order: Order,
    pub(crate) kind: BlobKind,
    pub(crate) file: Arc<BlobFile>,
    /// In the order in which they are tried.
    pub(crate) sources: Vec<Arc<Source>>,
}

impl FetchJob {
    /// A chunk of it, whose frame a source has sent.
    pub(crate) fn arrived(&self, chunk: u32, frame: Bytes, source: &Arc<Source>) -> DecodeJob {
        let others = self.sources.iter().filter(|other| !Arc::ptr_eq(other, source)).cloned().collect();
        DecodeJob {
            order: Order { chunks: chunk..chunk + 1, ..self.order.clone() },
            kind: self.kind,
            content: Content::Stored { frame, others },
            file: Arc::clone(&self.file),
            source: Arc::clone(source),
        }
    }
}

/// An order of one chunk that another blob has.
#[derive(Debug)]
pub(crate) struct CopyJob {
    pub(crate) order: Order,
    pub(crate) place: ChunkPlace,
    pub(crate) file: Arc<BlobFile>,
    pub(crate) source: Arc<Source>,
}

/// News of an order.
#[derive(Debug)]
pub(crate) enum Progress {
    /// The answer has begun.
    FirstByte(FetchKey),
    /// All bytes of a chunk are here; how it ends follows.
    Arrived(ChunkKey),
    /// The last news of a chunk.
    Ended { chunk: ChunkKey, outcome: Outcome },
    /// A chunk of `from` is not what its name says; `rest` have it too.
    Wrong { from: Arc<Source>, rest: FetchJob },
    /// These chunks did not arrive: the images that they were fetched for were removed, or they are not where they were
    /// to be copied from.
    Again(Order),
}

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is in the store.
    Stored,
    /// It could not be had; a positive errno.
    Failed(i32),
    /// Nobody has it, or not the right bytes: asking again is of no use. A positive errno.
    Refused(i32),
}

/// The runtime and the decoders.
#[derive(Debug)]
pub(crate) struct Fetcher {
    runtime: tokio::runtime::Runtime,
    decoders: Decoders,
    progress: Sender<Progress>,
}

impl Fetcher {
    /// Starts the threads. `progress` has room for [`PROGRESS_MAX`].
    pub(crate) fn start(progress: Sender<Progress>, store: &Weak<Store>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(NETWORK_THREADS)
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name("fetch")
            .enable_all()
            .build()
            .map_err(|error| Error::io("start the network threads", error))?;
        let decoders = Decoders::start(&progress, store)?;
        Ok(Self { runtime, decoders, progress })
    }

    /// The runtime, for others that speak to registries.
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        self.runtime.handle()
    }

    /// A handle for the engine.
    pub(crate) fn spawner(&self) -> Spawner {
        Spawner {
            runtime: self.runtime.handle().clone(),
            decoders: self.decoders.queue(),
            progress: self.progress.clone(),
        }
    }

    /// Drops what is under way and ends the threads. Not to be called from an asynchronous context.
    pub(crate) fn stop(self) {
        self.runtime.shutdown_timeout(Duration::from_secs(1));
        self.decoders.stop();
    }

    /// Drops what is under way; the threads end when they notice.
    pub(crate) fn abandon(self) {
        self.runtime.shutdown_background();
    }
}

/// Starts fetches.
#[derive(Debug, Clone)]
pub(crate) struct Spawner {
    runtime: tokio::runtime::Handle,
    decoders: DecodeQueue,
    progress: Sender<Progress>,
}

impl Spawner {
    /// Starts a fetch, if there is a chunk to fetch; never blocks.
    pub(crate) fn fetch(&self, job: FetchJob) {
        if job.order.chunks.is_empty() {
            return;
        }
        let (decoders, progress) = (self.decoders.clone(), self.progress.clone());
        self.runtime.spawn(async move {
            let (frame, frame_of) = (BytesMut::new(), None);
            let mut download = Download { job, decoders, progress, frame, frame_of, begun: false, wait: None };
            let outcome = download.read_from_any().await;
            download.finish(outcome);
        });
    }

    /// Starts a copy; never blocks.
    pub(crate) fn copy(&self, job: CopyJob) {
        let (decoders, progress) = (self.decoders.clone(), self.progress.clone());
        self.runtime.spawn(async move { hand_over(&decoders, DecodeJob::copy(job), &progress).await });
    }
}

/// Gives a job to the decoders, when there is room.
async fn hand_over(decoders: &DecodeQueue, job: DecodeJob, progress: &Sender<Progress>) {
    let chunk = job.chunk();
    if !decoders.push(job).await {
        tell(progress, Progress::Ended { chunk, outcome: Outcome::Failed(libc::EIO) });
    }
}

/// How often is looked why nothing comes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// An order under way. Its chunks are those that did not arrive yet.
struct Download {
    job: FetchJob,
    decoders: DecodeQueue,
    progress: Sender<Progress>,
    /// What there is of the first of them, and who sent it: a frame comes from one source, so that it is known who sent a
    /// wrong one.
    frame: BytesMut,
    frame_of: Option<Arc<Source>>,
    begun: bool,
    /// While the registry does not answer.
    wait: Option<Wait>,
}

/// Why one source did not deliver.
enum Trouble {
    /// It is worth asking again.
    Later,
    /// Its image was removed.
    Removed,
    /// It says so for certain, or its time is up.
    Certain(Outcome),
}

impl Download {
    /// Tells what became of the chunks that did not arrive; `None` if nobody is left to ask.
    fn finish(self, outcome: Option<Outcome>) {
        let order = self.job.order;
        match outcome {
            None if order.chunks.is_empty() => {}
            None => tell(&self.progress, Progress::Again(order)),
            Some(outcome) => {
                for chunk in order.chunks.map(|chunk| ChunkKey { blob: order.blob, chunk }) {
                    tell(&self.progress, Progress::Ended { chunk, outcome });
                }
            }
        }
    }

    /// Asks the sources in turns until everything has arrived or none is worth asking.
    async fn read_from_any(&mut self) -> Option<Outcome> {
        let mut outcome = None;
        let mut patience = Patience::new(self.job.order.since.into());
        let mut sources = self.job.sources.clone();
        loop {
            let mut unavailable = Vec::new();
            for source in sources {
                let left = self.job.order.chunks.len();
                let trouble = match self.read_from_one(&source, &mut patience).await {
                    Ok(()) => return None,
                    Err(trouble) => trouble,
                };
                match trouble {
                    Trouble::Later => unavailable.push(source),
                    Trouble::Removed => {}
                    Trouble::Certain(certain) => outcome = Some(certain),
                }
                if self.job.order.chunks.len() < left {
                    patience.progressed();
                }
            }
            let Some(first) = unavailable.first() else { return outcome };
            tokio::select! {
                () = sleep(patience.pause()) => {}
                () = removal(first) => {}
            }
            sources = unavailable;
        }
    }

    /// Reads from one source what did not arrive yet.
    async fn read_from_one(&mut self, source: &Arc<Source>, patience: &mut Patience) -> Result<(), Trouble> {
        let mut get = Get::begin();
        let read = self.read_answer(source, patience, &mut get).await;
        source.counters.events.fetched(self.job.order.class.into(), &get);
        read
    }

    async fn read_answer(
        &mut self,
        source: &Arc<Source>,
        patience: &mut Patience,
        get: &mut Get,
    ) -> Result<(), Trouble> {
        let chunks = self.job.order.chunks.clone();
        let there = if self.has_begun_frame(source) { self.frame.len() as u64 } else { 0 };
        let start = source.index.chunk(chunks.start).stored.start + there;
        let range = start..source.index.chunk(chunks.end - 1).stored.end;
        source.counters.registry_requests.fetch_add(1, Ordering::Relaxed);
        let mut answer = source.repository.blob_stream(&source.blob, range);
        let mut look_at = (patience.heard() + SILENCE_MIN).max(Instant::now() + LOOK_AGAIN);
        while !self.job.order.chunks.is_empty() {
            let deadline = patience.heard() + source.read_deadline;
            let piece = tokio::select! {
                piece = timeout_at(deadline, answer.next()) => piece,
                () = removal(source) => return Err(Trouble::Removed),
                () = sleep_until(look_at) => {
                    let trouble = answer.last_trouble();
                    if self.wait.is_none() || trouble.is_some() {
                        let cause = trouble.as_deref().unwrap_or("the registry is silent, or all but");
                        self.waits(source, patience.heard(), cause);
                    }
                    look_at = Instant::now() + LOOK_AGAIN;
                    continue;
                }
            };
            let piece = match piece {
                Ok(Some(Ok(piece))) => piece,
                Ok(Some(Err(error))) => {
                    let is_certain = error.kind() != RegistryErrorKind::Unavailable;
                    return Err(self.trouble(source, is_certain, &error.to_string(), deadline, patience));
                }
                // A stream that is shorter than its range; it promises not to be.
                Ok(None) => return Err(Trouble::Certain(Outcome::Failed(libc::EIO))),
                Err(_) => {
                    let last = answer.last_trouble().map_or_else(String::new, |last| format!(": {last}"));
                    let cause = format!("the read deadline passed{last}");
                    return Err(self.trouble(source, false, &cause, deadline, patience));
                }
            };
            let now = Instant::now();
            patience.came(piece.len(), now);
            if now < patience.heard() + SILENCE_MIN {
                self.wait = None;
            }
            get.came(piece.len());
            if !self.begun {
                self.begun = true;
                tell(&self.progress, Progress::FirstByte(self.job.order.fetch));
            }
            self.take(source, piece).await;
            patience.discount(now.elapsed());
            look_at = look_at.max(patience.heard() + SILENCE_MIN);
        }
        Ok(())
    }

    /// Whether what there is of a frame is this source's.
    fn has_begun_frame(&self, source: &Arc<Source>) -> bool {
        self.frame_of.as_ref().is_some_and(|of| Arc::ptr_eq(of, source))
    }

    /// Cuts what came into frames, and hands over those that are whole. Waits while too much is not decoded yet.
    async fn take(&mut self, source: &Arc<Source>, mut piece: Bytes) {
        if !self.has_begun_frame(source) {
            self.frame.clear();
            self.frame_of = Some(Arc::clone(source));
        }
        while !piece.is_empty() && !self.job.order.chunks.is_empty() {
            let index = self.job.order.chunks.start;
            let stored = source.index.chunk(index).stored;
            // The index bounds a stored chunk to 260 KiB.
            let len_bytes = usize::try_from(stored.end - stored.start).unwrap_or(usize::MAX);
            let part = piece.split_to((len_bytes - self.frame.len()).min(piece.len()));
            let frame = if part.len() == len_bytes {
                part
            } else {
                self.frame.reserve(len_bytes - self.frame.len());
                self.frame.extend_from_slice(&part);
                if self.frame.len() < len_bytes {
                    return;
                }
                self.frame.split().freeze()
            };
            self.job.order.chunks.start += 1;
            let chunk = ChunkKey { blob: self.job.order.blob, chunk: index };
            tell(&self.progress, Progress::Arrived(chunk));
            let job = self.job.arrived(index, frame, source);
            hand_over(&self.decoders, job, &self.progress).await;
        }
    }

    /// The fetch waits, because of `cause`; something was last heard at `heard`.
    fn waits(&mut self, source: &Source, heard: Instant, cause: &str) {
        match &self.wait {
            Some(wait) => wait.heard(cause),
            None => self.wait = Some(Wait::begin(&source.counters, self.what(source), heard.into_std(), cause)),
        }
    }

    /// What is asked for, as `status` and the log have it.
    fn what(&self, source: &Source) -> String {
        let (what, blob, chunks) = (name_of(self.job.kind), source.blob, &self.job.order.chunks);
        match chunks.len() {
            1 => format!("{what} {} of blob {blob}", chunks.start),
            _ => format!("{what}s {} to {} of blob {blob}", chunks.start, chunks.end - 1),
        }
    }

    /// What it means that a source does not deliver: it said something certain, is in trouble, or was silent until the
    /// deadline.
    fn trouble(
        &mut self,
        source: &Source,
        is_certain: bool,
        cause: &str,
        deadline: Instant,
        patience: &Patience,
    ) -> Trouble {
        if !is_certain && Instant::now() + patience.longest_pause() < deadline {
            self.waits(source, patience.heard(), cause);
            return Trouble::Later;
        }
        tracing::error!("fetch: {}: {}: {cause}", source.counters.image, self.what(source));
        Trouble::Certain(if is_certain { Outcome::Refused(libc::EIO) } else { Outcome::Failed(libc::EIO) })
    }
}

/// What the parts of a blob are called.
pub(crate) fn name_of(kind: BlobKind) -> &'static str {
    match kind {
        BlobKind::Layer => "chunk",
        BlobKind::Hot => "hot frame",
    }
}

/// The engine always comes to read its messages; without it nobody waits any more.
pub(crate) fn tell(progress: &Sender<Progress>, news: Progress) {
    let _ = progress.send(news);
}

/// Returns when the image of a source was removed.
async fn removal(source: &Source) {
    let mut attached = source.attached.clone();
    while attached.changed().await.is_ok() {}
}
