//! From "fetch this chunk" to "it is in the store": one task per chunk on a small runtime.
//!
//! A task asks the registry for exactly the bytes of the stored frame, and hands them to the decoders ([`crate::decode`]),
//! which verify, decode and store them and tell the engine. Trouble with the network is waited out here, until the read
//! deadline of the image that the bytes are fetched for; the registry crate retries each request on its own for a
//! shorter time, so an outage shows here as one slow failure after another. Images that have the same blob take turns: an
//! outage of one registry does not hold up a chunk that another one has. A source that answers for certain (not found,
//! not allowed, not these bytes) is not asked again; when none is left, that is an error.
//!
//! Nothing here is queued without a bound: the scheduler asks for at most [`FETCHES_MAX`] chunks at a time, each of which
//! ends in exactly one [`Completion`], so neither the decoders' queues nor the channel of completions can be full.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use crossbeam::channel::Sender;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use ublkimg_image::ChunkIndex;
use ublkimg_registry::{Digest, ErrorKind as RegistryErrorKind, Repository};
use ublkimg_scheduler::{ChunkKey, Class, DEMAND_CHUNKS_MAX, READ_AHEAD_CHUNKS_MAX};

use crate::counters::ImageCounters;
use crate::decode::{DecodeJob, Decoders};
use crate::error::{Error, Result};
use crate::store::BlobFile;

/// Chunks between the action to fetch them and their completion. At most 260 KiB stored and 256 KiB raw each, so buffers
/// take less than 64 MiB.
pub(crate) const FETCHES_MAX: usize = DEMAND_CHUNKS_MAX + READ_AHEAD_CHUNKS_MAX;

/// Threads that speak to registries: TLS at 10 Gbit/s needs no more.
const NETWORK_THREADS: usize = 2;

/// First and longest pause between attempts, on top of the pauses that the registry crate makes.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Where the chunks of a blob can be had: an attached image's repository.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) repository: Repository,
    /// The layer blob there.
    pub(crate) blob: Digest,
    pub(crate) index: Arc<ChunkIndex>,
    /// How long a read waits for a registry that does not answer.
    pub(crate) read_deadline: Duration,
    pub(crate) counters: Arc<ImageCounters>,
    /// Its sender lives as long as the image is attached.
    pub(crate) attached: watch::Receiver<()>,
}

/// A chunk to fetch.
#[derive(Debug)]
pub(crate) struct FetchJob {
    pub(crate) chunk: ChunkKey,
    pub(crate) class: Class,
    /// Read deadlines count from here.
    pub(crate) since: std::time::Instant,
    pub(crate) file: Arc<BlobFile>,
    /// In the order in which they are tried.
    pub(crate) sources: Vec<Arc<Source>>,
}

/// How a fetch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) chunk: ChunkKey,
    pub(crate) outcome: Outcome,
}

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is in the store.
    Stored,
    /// It cannot be had; a positive errno.
    Failed(i32),
    /// The images that it was fetched for were removed meanwhile.
    Abandoned,
}

/// The runtime and the decoders.
#[derive(Debug)]
pub(crate) struct Fetcher {
    runtime: tokio::runtime::Runtime,
    decoders: Decoders,
    completions: Sender<Completion>,
}

impl Fetcher {
    /// Starts the threads. `completions` has room for [`FETCHES_MAX`].
    pub(crate) fn start(completions: Sender<Completion>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(NETWORK_THREADS)
            .thread_name("fetch")
            .enable_all()
            .build()
            .map_err(|error| Error::io("start the network threads", error))?;
        let decoders = Decoders::start(&completions)?;
        Ok(Self { runtime, decoders, completions })
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
            completions: self.completions.clone(),
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
    decoders: crate::decode::DecodeQueue,
    completions: Sender<Completion>,
}

impl Spawner {
    /// Starts a fetch; never blocks.
    pub(crate) fn fetch(&self, job: FetchJob) {
        let (decoders, completions) = (self.decoders.clone(), self.completions.clone());
        self.runtime.spawn(async move {
            let chunk = job.chunk;
            let outcome = match download_from_any(&job.sources, chunk.chunk, job.since.into()).await {
                Ok((stored, source)) => {
                    let decode = DecodeJob { chunk, class: job.class, stored, file: job.file, source };
                    match decoders.push(decode) {
                        Ok(()) => return,
                        Err(_) => Outcome::Failed(libc::EIO),
                    }
                }
                Err(outcome) => outcome,
            };
            // Room is there by construction; without a receiver nobody waits any more.
            let _ = completions.try_send(Completion { chunk, outcome });
        });
    }
}

/// The stored bytes of a chunk, unverified, and who had them, or how it ended.
async fn download_from_any(
    sources: &[Arc<Source>],
    chunk: u32,
    since: Instant,
) -> Result<(Bytes, Arc<Source>), Outcome> {
    let mut outcome = Outcome::Abandoned;
    let mut pause = PAUSE_MIN;
    let mut sources: Vec<_> = sources.to_vec();
    loop {
        let mut unavailable = Vec::new();
        for source in sources {
            match download(&source, chunk, since + source.read_deadline, pause).await {
                Ok(stored) => return Ok((stored, source)),
                Err(None) => unavailable.push(source),
                Err(Some(Outcome::Abandoned)) => {}
                Err(Some(failed)) => outcome = failed,
            }
        }
        let Some(first) = unavailable.first() else { return Err(outcome) };
        tokio::select! {
            () = sleep(pause) => {}
            () = removal(first) => {}
        }
        sources = unavailable;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Asks one source once: the stored bytes of a chunk, unverified; or how it ended; or `None` when it is worth asking
/// again after `pause`.
async fn download(source: &Source, chunk: u32, deadline: Instant, pause: Duration) -> Result<Bytes, Option<Outcome>> {
    let range = source.index.chunk(chunk).stored;
    source.counters.registry_requests.fetch_add(1, Ordering::Relaxed);
    let attempt = timeout_at(deadline, source.repository.blob_range(&source.blob, range));
    let attempt = tokio::select! {
        attempt = attempt => attempt,
        () = removal(source) => return Err(Some(Outcome::Abandoned)),
    };
    let error = match attempt {
        Ok(Ok(stored)) => return Ok(stored),
        Ok(Err(error)) => Some(error),
        Err(_) => None,
    };
    let waits = error.as_ref().is_none_or(|error| error.kind() == RegistryErrorKind::Unavailable);
    if waits && Instant::now() + pause < deadline {
        return Err(None);
    }
    let cause = error.map_or_else(|| "the read deadline passed".to_owned(), |error| error.to_string());
    tracing::error!("fetch: blob {} chunk {chunk}: {cause}", source.blob);
    Err(Some(Outcome::Failed(libc::EIO)))
}

/// Returns when the image of a source was removed.
async fn removal(source: &Source) {
    let mut attached = source.attached.clone();
    while attached.changed().await.is_ok() {}
}
