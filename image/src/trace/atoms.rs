//! Several traces in the same terms: runs of blocks that each of them has whole or not at all.
//!
//! Traces cut the same blocks into different entries. Cutting all of them at every place where one of them begins or
//! ends an entry makes runs that can be compared, without a table of single blocks: an entry may have 256 of those.

use super::{PART, Trace, TraceEntry, distinct_blobs};
use crate::{Error, MAX_DEVICES, Result, Sha256};

/// Most places of runs in traces: 40 bytes each. Traces that are alike have hardly more than they have entries.
const PLACES_MAX: usize = 1 << 24;

/// Runs of blocks and their places in each trace.
pub(super) struct Atoms {
    /// The blobs of all traces, each once: those of the first trace in its order, then those that others add.
    pub(super) blobs: Vec<Sha256>,
    /// Sorted by run, then by trace. No run is twice in one trace.
    places: Vec<Place>,
}

/// A run of blocks in one trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Index into [`Atoms::blobs`].
    pub(super) blob: u16,
    pub(super) block: u32,
    /// At most 256.
    pub(super) blocks: u16,
    pub(super) trace: usize,
    /// Blocks before it in that trace.
    pub(super) rank: u64,
    pub(super) due_us: u64,
    pub(super) confidence: u8,
}

impl Atoms {
    /// Of traces within their bounds.
    pub(super) fn new(traces: &[&Trace]) -> Result<Self> {
        let (blobs, numbers) = distinct_blobs(traces.iter().flat_map(|trace| trace.header.blobs.iter().copied()));
        if blobs.len() > MAX_DEVICES {
            return Err(Error::too_large(PART, format!("{} blobs, at most {MAX_DEVICES}", blobs.len())));
        }
        let mut numbers = &numbers[..];
        let mut runs = Vec::with_capacity(traces.iter().map(|trace| trace.entries.len()).sum());
        for (number, trace) in traces.iter().enumerate() {
            let (own, rest) = numbers.split_at(trace.header.blobs.len());
            runs.extend(whole(number, trace, own));
            numbers = rest;
        }
        let mut cuts: Vec<(u16, u32)> =
            runs.iter().flat_map(|run| [(run.blob, run.block), (run.blob, run.end())]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let mut places = Vec::with_capacity(runs.len());
        for run in runs {
            let first = cuts.partition_point(|cut| *cut <= (run.blob, run.block));
            let cuts = cuts[first..].iter().take_while(|cut| **cut <= (run.blob, run.end()));
            let mut rest = run;
            for (_, cut) in cuts {
                let blocks = u16::try_from(cut - rest.block).unwrap_or(u16::MAX);
                places.push(Place { blocks, ..rest });
                (rest.block, rest.rank) = (*cut, rest.rank + u64::from(blocks));
            }
            if places.len() > PLACES_MAX {
                return Err(Error::too_large(PART, "the traces cut blocks in too many different ways"));
            }
        }
        places.sort_unstable();
        Ok(Self { blobs, places })
    }

    /// The places of each run, by blob and block.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[Place]> {
        self.places.chunk_by(|a, b| (a.blob, a.block) == (b.blob, b.block))
    }
}

impl Place {
    fn end(&self) -> u32 {
        self.block.saturating_add(u32::from(self.blocks))
    }
}

/// The entries of one trace, whose blobs have these numbers.
fn whole(number: usize, trace: &Trace, blobs: &[u16]) -> impl Iterator<Item = Place> {
    let (mut rank, mut due_us) = (0u64, 0u64);
    trace.entries.iter().map(move |entry| {
        let start = rank;
        rank += u64::from(entry.blocks);
        due_us = due_us.saturating_add(entry.since_previous_us);
        let TraceEntry { block, blocks, confidence, .. } = *entry;
        Place { blob: blobs[usize::from(entry.blob)], block, blocks, trace: number, rank: start, due_us, confidence }
    })
}
