//! Fetches: what was ordered, what of it has come, and what is being decoded.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, unbounded};
use ublkimg_image::ChunkIndex;
use ublkimg_scheduler::ChunkKey;

use super::Life;
use crate::decode::DecodeJob;
use crate::fetch::{CopyJob, FetchJob, Outcome, Progress, tell};
use crate::random::Random;
use crate::store::BlobFile;

/// The registry, and what is between it and the decoders.
pub(super) struct Network {
    ordered: Receiver<FetchJob>,
    jobs: Sender<FetchJob>,
    to_copy: Receiver<CopyJob>,
    copies: Sender<CopyJob>,
    progress: Sender<Progress>,
    transfers: Vec<Transfer>,
    arrived: VecDeque<DecodeJob>,
    /// Chunks that were ordered and have not ended.
    on_their_way: BTreeSet<ChunkKey>,
}

struct Transfer {
    job: FetchJob,
    has_begun: bool,
}

impl Network {
    pub(super) fn new(progress: Sender<Progress>) -> Self {
        let (jobs, ordered) = unbounded();
        let (copies, to_copy) = unbounded();
        let (transfers, arrived, on_their_way) = Default::default();
        Self { ordered, jobs, to_copy, copies, progress, transfers, arrived, on_their_way }
    }

    /// Where the engine orders.
    pub(super) fn jobs(&self) -> Sender<FetchJob> {
        self.jobs.clone()
    }

    /// Where it has chunks copied.
    pub(super) fn copies(&self) -> Sender<CopyJob> {
        self.copies.clone()
    }

    pub(super) fn progress(&self) -> Sender<Progress> {
        self.progress.clone()
    }

    /// A chunk to be decoded: any of those that are here, as there are several decoders.
    pub(super) fn take_arrived(&mut self, random: &mut Random) -> Option<DecodeJob> {
        if self.arrived.is_empty() { None } else { self.arrived.remove(random.index(self.arrived.len())) }
    }

    /// A chunk was decoded, and its end was told.
    pub(super) fn is_over(&mut self, chunk: ChunkKey) {
        self.on_their_way.remove(&chunk);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.ordered.is_empty() && self.to_copy.is_empty() && self.transfers.is_empty() && self.arrived.is_empty()
    }

    /// An order is taken, or an answer goes on.
    pub(super) fn step(&mut self, life: &Life) {
        while let Ok(job) = self.ordered.try_recv() {
            life.note(|| format!("fetch {:?} {:?} {:?}", job.order.blob, job.order.chunks, job.order.class));
            for chunk in job.order.chunks.clone().map(|chunk| ChunkKey { blob: job.order.blob, chunk }) {
                assert!(self.on_their_way.insert(chunk), "{chunk:?} is fetched while it is on its way");
            }
            self.transfers.push(Transfer { job, has_begun: false });
        }
        for job in self.to_copy.try_iter() {
            life.note(|| format!("copy {:?} {:?} {:?}", job.order.blob, job.order.chunks, job.order.class));
            self.arrived.push_back(DecodeJob::copy(job));
        }
        if self.transfers.is_empty() {
            return;
        }
        let at = usize::try_from(life.below(self.transfers.len() as u64)).unwrap();
        if self.go_on(at, life) {
            self.transfers.swap_remove(at);
        }
    }

    /// True when the transfer is over.
    fn go_on(&mut self, at: usize, life: &Life) -> bool {
        let Transfer { job, has_begun } = &mut self.transfers[at];
        let (order, is_new) = (job.order.clone(), !std::mem::replace(has_begun, true));
        let source = job.sources.iter().find(|source| source.attached.has_changed().is_ok()).cloned();
        let rest: Vec<ChunkKey> = order.chunks.clone().map(|chunk| ChunkKey { blob: order.blob, chunk }).collect();
        let Some(&chunk) = rest.first() else { return true };
        let Some(source) = source else {
            rest.iter().for_each(|chunk| self.is_over(*chunk));
            tell(&self.progress, Progress::Again(order));
            return true;
        };
        if life.has_faults && life.happens(40) {
            let outcome = if life.happens(2) { Outcome::Failed(libc::EIO) } else { Outcome::Refused(libc::EIO) };
            life.note_fault(|| format!("{rest:?}: {outcome:?}"));
            for chunk in rest {
                self.is_over(chunk);
                tell(&self.progress, Progress::Ended { chunk, outcome });
            }
            return true;
        }
        if is_new {
            tell(&self.progress, Progress::FirstByte(order.fetch));
            return false;
        }
        let job = &mut self.transfers[at].job;
        job.order.chunks.start += 1;
        tell(&self.progress, Progress::Arrived(chunk));
        self.arrived.push_back(job.arrived(chunk.chunk, stored(life, &job.file, chunk.chunk), &source));
        rest.len() == 1
    }
}

/// The stored frame of a chunk, as it comes.
fn stored(life: &Life, file: &BlobFile, chunk: u32) -> Bytes {
    let is_of = |(_, index): &&(Vec<u8>, Arc<ChunkIndex>)| index.digest() == file.index_digest();
    let (blob, index) = life.host.blobs.iter().find(is_of).unwrap();
    let range = index.chunk(chunk).stored;
    let mut stored = blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].to_vec();
    if life.has_faults && life.happens(40) {
        let at = life.random.borrow_mut().index(stored.len());
        stored[at] ^= 1 << life.below(8);
        life.note_fault(|| format!("chunk {chunk} comes with a wrong bit"));
    }
    Bytes::from(stored)
}
