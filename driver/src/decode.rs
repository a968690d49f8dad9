//! The last step of a fetch: verify, decode, store, tell the engine. A chunk that another blob has ([`Content::Copy`])
//! is read there instead, and compared with its sums.
//!
//! These are the only threads that may block on the disk, and what they do costs processor time, so there are few of
//! them, and a demanded chunk goes before others. A stored frame is checked against its digest before
//! anything looks at it, and decoded into exactly the bytes that the chunk index promises.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, bounded};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use ublkimg_image::{BLOCK_SIZE, CHUNK_BYTES, Chunk, Sha256};
use ublkimg_scheduler::{BlobKind, ChunkKey, Class};

use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{CopyJob, FetchJob, Order, Outcome, Progress, Source, name_of, tell};
use crate::store::{BlobFile, ChunkPlace, Store};

/// Threads, if the machine has as many processors. A core verifies and decodes some 300 MB/s.
const THREADS_MAX: usize = 4;

/// Bytes that have arrived and are not decoded yet: of what is fetched ahead. A fifth of a second for one core.
const UNDECODED_KIB_MAX: u32 = 64 << 10;

/// The same of what is demanded, so that a demand never waits for room behind the others. More than the scheduler has in
/// flight for demands at a time.
const UNDECODED_DEMAND_KIB_MAX: u32 = 16 << 10;

/// Chunks that are shorter tell nothing of how fast decoding can be.
const TELLING_BYTES: u64 = 64 << 10;

/// What a chunk counts for at least: it bounds their number.
const COST_KIB_MIN: u32 = 16;

/// Where the blocks of a chunk come from.
#[derive(Debug)]
pub(crate) enum Content {
    /// From its frame, which has arrived; `others` have it too.
    Stored { frame: Bytes, others: Vec<Arc<Source>> },
    /// From another blob; the order is given back if it is not there.
    Copy(ChunkPlace),
}

/// A chunk that has arrived, or is to be copied.
#[derive(Debug)]
pub(crate) struct DecodeJob {
    /// Of this one chunk.
    pub(crate) order: Order,
    pub(crate) kind: BlobKind,
    pub(crate) content: Content,
    pub(crate) file: Arc<BlobFile>,
    pub(crate) source: Arc<Source>,
}

impl DecodeJob {
    pub(crate) fn copy(job: CopyJob) -> Self {
        let CopyJob { order, place, file, source } = job;
        Self { order, kind: BlobKind::Layer, content: Content::Copy(place), file, source }
    }

    pub(crate) fn chunk(&self) -> ChunkKey {
        ChunkKey { blob: self.order.blob, chunk: self.order.chunks.start }
    }
}

/// A job and its share of the bound; the share is given back with it.
type Accepted = (DecodeJob, OwnedSemaphorePermit);

/// The sending side: two queues, each with a bound in bytes.
#[derive(Debug, Clone)]
pub(crate) struct DecodeQueue {
    demand: Lane,
    ahead: Lane,
}

#[derive(Debug, Clone)]
struct Lane {
    jobs: Sender<Accepted>,
    room_kib: Arc<Semaphore>,
}

impl Lane {
    fn new(kib_max: u32) -> (Self, Receiver<Accepted>) {
        let (jobs, accepted) = bounded((kib_max / COST_KIB_MIN) as usize);
        (Self { jobs, room_kib: Arc::new(Semaphore::new(kib_max as usize)) }, accepted)
    }
}

impl DecodeQueue {
    /// Waits for room. False when the decoders are gone.
    pub(crate) async fn push(&self, job: DecodeJob) -> bool {
        let lane = match job.order.class {
            Class::Demand => &self.demand,
            Class::Trace | Class::ReadAhead | Class::Fill => &self.ahead,
        };
        let len_bytes = match &job.content {
            Content::Stored { frame, .. } => frame.len(),
            Content::Copy(_) => 0,
        };
        // The index bounds a stored chunk to 260 KiB.
        let cost_kib = u32::try_from(len_bytes.div_ceil(1024)).unwrap_or(u32::MAX).max(COST_KIB_MIN);
        let Ok(share) = Arc::clone(&lane.room_kib).acquire_many_owned(cost_kib).await else { return false };
        // Who has a share has a place.
        lane.jobs.try_send((job, share)).is_ok()
    }
}

/// The threads.
#[derive(Debug)]
pub(crate) struct Decoders {
    queue: DecodeQueue,
    threads: Vec<JoinHandle<()>>,
}

impl Decoders {
    /// Starts the threads. They end when every queue handle is dropped.
    pub(crate) fn start(progress: &Sender<Progress>, store: &Weak<Store>) -> Result<Self> {
        let (demand, demanded) = Lane::new(UNDECODED_DEMAND_KIB_MAX);
        let (ahead, fetched_ahead) = Lane::new(UNDECODED_KIB_MAX);
        let mut threads = Vec::new();
        for _ in 0..thread_count() {
            let (demanded, ahead) = (demanded.clone(), fetched_ahead.clone());
            let (progress, store) = (progress.clone(), Weak::clone(store));
            let thread = std::thread::Builder::new().name("decode".to_owned());
            let thread = thread.spawn(move || decode_loop(&demanded, &ahead, &progress, &store));
            threads.push(thread.map_err(|error| Error::io("start a decoder thread", error))?);
        }
        Ok(Self { queue: DecodeQueue { demand, ahead }, threads })
    }

    pub(crate) fn queue(&self) -> DecodeQueue {
        self.queue.clone()
    }

    /// Waits for the threads; every other handle of the queue must be gone.
    pub(crate) fn stop(self) {
        drop(self.queue);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a decoder thread panicked");
            }
        }
    }
}

/// Decoder threads on this machine.
pub(crate) fn thread_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

fn decode_loop(
    demanded: &Receiver<Accepted>,
    ahead: &Receiver<Accepted>,
    progress: &Sender<Progress>,
    store: &Weak<Store>,
) {
    let mut decoder = zstd::bulk::Decompressor::new();
    let mut raw = Vec::with_capacity(usize::try_from(CHUNK_BYTES).unwrap_or(0));
    loop {
        // Demand first; when there is none, whatever comes.
        let job = demanded.try_recv().or_else(|_| {
            crossbeam::select! {
                recv(demanded) -> job => job,
                recv(ahead) -> job => job,
            }
        });
        let Ok((job, share)) = job else { return };
        let Ok(decoder) = &mut decoder else {
            tracing::error!("fetch: no zstd decoder can be made");
            tell(progress, Progress::Ended { chunk: job.chunk(), outcome: Outcome::Failed(libc::EIO) });
            continue;
        };
        end(job, decoder, &mut raw, progress, store);
        drop(share);
    }
}

/// Stores a chunk that has arrived or is to be copied, and only then tells what became of it: who is woken finds it there.
pub(crate) fn end(
    job: DecodeJob,
    decoder: &mut zstd::bulk::Decompressor<'_>,
    raw: &mut Vec<u8>,
    progress: &Sender<Progress>,
    store: &Weak<Store>,
) {
    let chunk = job.chunk();
    let news = match &job.content {
        Content::Stored { frame, others } => match store_chunk(&job, frame, decoder, raw) {
            Ok(()) => Progress::Ended { chunk, outcome: Outcome::Stored },
            Err(error) => failure(&job, others, &error),
        },
        Content::Copy(place) if is_copied(&job, place, store, raw) => {
            Progress::Ended { chunk, outcome: Outcome::Stored }
        }
        Content::Copy(_) => Progress::Again(job.order.clone()),
    };
    // Its bytes are not needed any more.
    drop(job);
    tell(progress, news);
}

/// Who sent wrong bytes is not asked again, but everybody else is.
fn failure(job: &DecodeJob, others: &[Arc<Source>], error: &Error) -> Progress {
    let (image, what, chunk) = (&job.source.counters.image, name_of(job.kind), job.chunk());
    tracing::error!("fetch: {image}: blob {} {what} {}: {}", job.source.blob, chunk.chunk, error.chain());
    if error.kind() != ErrorKind::Corrupt {
        return Progress::Ended { chunk, outcome: Outcome::Failed(error.errno()) };
    }
    let sources: Vec<_> = job.source.without_mirrors().into_iter().chain(others.iter().cloned()).collect();
    if sources.is_empty() {
        return Progress::Ended { chunk, outcome: Outcome::Refused(error.errno()) };
    }
    // Something was heard, so the read deadline begins anew.
    let order = Order { since: Instant::now(), ..job.order.clone() };
    let rest = FetchJob { order, kind: job.kind, file: Arc::clone(&job.file), sources };
    Progress::Wrong { from: Arc::clone(&job.source), rest }
}

fn store_chunk(
    job: &DecodeJob,
    stored: &[u8],
    decoder: &mut zstd::bulk::Decompressor<'_>,
    raw: &mut Vec<u8>,
) -> Result<()> {
    let chunk = job.source.index.chunk(job.order.chunks.start);
    let counters = &job.source.counters;
    let began = Instant::now();
    if let Err(error) = decode(&chunk, stored, decoder, raw) {
        counters.verification_failures.fetch_add(1, Ordering::Relaxed);
        return Err(error);
    }
    write(job, &chunk, raw)?;
    if raw.len() as u64 >= TELLING_BYTES {
        let took_us = began.elapsed().as_micros().max(1);
        let bytes_per_s = u64::try_from(raw.len() as u128 * 1_000_000 / took_us).unwrap_or(u64::MAX);
        counters.decode_bytes_per_s.fetch_max(bytes_per_s, Ordering::Relaxed);
    }
    counters.fetched_chunks.fetch_add(1, Ordering::Relaxed);
    counters.fetched_bytes.fetch_add(stored.len() as u64, Ordering::Relaxed);
    Ok(())
}

/// Copies a chunk from another blob if it can be had there; else its place is forgotten.
fn is_copied(job: &DecodeJob, place: &ChunkPlace, store: &Weak<Store>, raw: &mut Vec<u8>) -> bool {
    let Some(store) = store.upgrade() else { return false };
    let chunk = job.source.index.chunk(job.order.chunks.start);
    let copied = copy_chunk(job, &chunk, place, &store, raw);
    if let Err(error) = &copied {
        tracing::warn!("store: chunk {} is fetched though another blob has it: {}", chunk.id.0, error.chain());
    }
    let is_copied = copied.unwrap_or(false);
    if !is_copied {
        store.chunk_places().forget(chunk.id.0);
    }
    is_copied
}

fn copy_chunk(job: &DecodeJob, chunk: &Chunk, place: &ChunkPlace, store: &Store, raw: &mut Vec<u8>) -> Result<bool> {
    // An index may lie about the length of a chunk. Its frame is refused then, and what another blob has is no better.
    if place.len_bytes() != chunk.raw.end - chunk.raw.start || !store.read_chunk(place, raw)? {
        return Ok(false);
    }
    write(job, chunk, raw)?;
    let counters = &job.source.counters;
    counters.copied_chunks.fetch_add(1, Ordering::Relaxed);
    counters.copied_bytes.fetch_add(raw.len() as u64, Ordering::Relaxed);
    Ok(true)
}

/// Keeps the blocks of a chunk.
fn write(job: &DecodeJob, chunk: &Chunk, raw: &[u8]) -> Result<()> {
    let block = u32::try_from(chunk.raw.start / BLOCK_SIZE as u64);
    let block = block.map_err(|_| Error::new(ErrorKind::Internal, "a chunk beyond 16 TiB"))?;
    job.file.write(block, raw)?;
    if job.kind == BlobKind::Layer {
        job.file.note_chunk(chunk.id.0, &chunk.raw);
    }
    Ok(())
}

/// Fills `raw` with the raw bytes of a chunk, or says why `stored` is not that chunk.
fn decode(chunk: &Chunk, stored: &[u8], decoder: &mut zstd::bulk::Decompressor<'_>, raw: &mut Vec<u8>) -> Result<()> {
    let corrupt = |why: String| Error::new(ErrorKind::Corrupt, why);
    let found = Sha256::of(stored);
    if found != chunk.id.0 {
        return Err(corrupt(format!("the registry sent {found} where {} was expected", chunk.id.0)));
    }
    let len_bytes = usize::try_from(chunk.raw.end - chunk.raw.start).unwrap_or(usize::MAX);
    // The decoder writes to the capacity of its output and no further.
    raw.clear();
    raw.resize(len_bytes, 0);
    let decoded = decoder.decompress_to_buffer(stored, &mut raw[..]);
    match decoded {
        Ok(decoded) if decoded == len_bytes => Ok(()),
        Ok(decoded) => Err(corrupt(format!("chunk {} has {decoded} raw bytes, not {len_bytes}", chunk.id.0))),
        Err(error) => Err(Error::caused(
            ErrorKind::Corrupt,
            format!("chunk {} does not decode to {len_bytes} bytes", chunk.id.0),
            error,
        )),
    }
}

#[cfg(test)]
mod tests {
    use ublkimg_image::ChunkId;

    use super::*;

    fn chunk_of(stored: &[u8], raw_blocks: u64) -> Chunk {
        let raw = 0..raw_blocks * BLOCK_SIZE as u64;
        Chunk { index: 0, stored: 0..stored.len() as u64, raw, id: ChunkId(Sha256::of(stored)) }
    }

    fn decode_new(chunk: &Chunk, stored: &[u8]) -> Result<Vec<u8>> {
        let mut raw = vec![7; 10];
        decode(chunk, stored, &mut zstd::bulk::Decompressor::new().unwrap(), &mut raw).map(|()| raw)
    }

    #[test]
    fn a_good_frame_decodes() {
        let raw: Vec<u8> = (0..2 * BLOCK_SIZE).map(|at| at.to_le_bytes()[0]).collect();
        let stored = zstd::bulk::compress(&raw, 3).unwrap();
        assert_eq!(decode_new(&chunk_of(&stored, 2), &stored).unwrap(), raw);
    }

    #[test]
    fn a_changed_byte_is_refused_before_it_is_decoded() {
        // Stored as they are, so that the frame decodes whatever they are.
        let raw: Vec<u8> = (0..BLOCK_SIZE).map(|at| Sha256::of(&at.to_le_bytes()).0[0]).collect();
        let mut stored = zstd::bulk::compress(&raw, 3).unwrap();
        let chunk = chunk_of(&stored, 1);
        stored[BLOCK_SIZE / 2] ^= 1;
        assert_eq!(zstd::bulk::decompress(&stored, BLOCK_SIZE).unwrap().len(), BLOCK_SIZE);
        let error = decode_new(&chunk, &stored).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(&chunk.id.0.to_string()), "{error}");
    }

    #[test]
    fn another_length_than_promised_is_refused() {
        let stored = zstd::bulk::compress(&vec![1; 2 * BLOCK_SIZE], 3).unwrap();
        for promised in [1, 3, 64] {
            assert_eq!(decode_new(&chunk_of(&stored, promised), &stored).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        assert_eq!(decode_new(&chunk_of(b"no frame", 1), b"no frame").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
