//! One trace of several runs.
//!
//! A block's place in the merged trace is the median of its places in the runs that read it, each as a share of its run's
//! length; its time is the median of its times. Its confidence is the share of all runs that read it. Nothing is dropped:
//! what to do with blocks of low confidence is the reader's to decide.

use super::atoms::{Atoms, Place};
use super::{GAP_US_MAX, TRACE_ENTRIES_MAX, Trace, TraceEntry, TraceHeader, coalesce};
use crate::{Error, Sha256};

/// Why traces are not merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There is none.
    #[error("no trace to merge")]
    Empty,
    /// They are of different commands: what one reads says little of what the other will.
    #[error("the traces are of different commands: {first:?} and {other:?}")]
    Commands {
        /// Of the first trace.
        first: Vec<String>,
        /// Of the first one that differs.
        other: Vec<String>,
    },
    /// They are of different images.
    #[error("the traces are of different images: {first} and {other}")]
    Images {
        /// Of the first trace.
        first: Sha256,
        /// Of the first one that differs.
        other: Sha256,
    },
    /// They were recorded with different read-ahead: one has blocks that only the kernel asked for.
    #[error("the traces were recorded with different read-ahead: {first} and {other} KiB")]
    ReadAhead {
        /// Of the first trace.
        first: u32,
        /// Of the first one that differs.
        other: u32,
    },
    /// A trace is out of its bounds, or the merged one would be.
    #[error(transparent)]
    Format(#[from] Error),
}

/// Merges traces of one command on one image, recorded with the same read-ahead. With `force`, of any: blocks are the
/// same when their layer blobs are; image and command are then those of the first trace.
///
/// The order of the traces does not matter, except for that and for the order of their blobs. A trace that was merged
/// before counts as often as it has runs.
///
/// # Errors
/// The cases of [`MergeError`].
pub fn merge(traces: &[Trace], force: bool) -> Result<Trace, MergeError> {
    let Some(first) = traces.first() else {
        return Err(MergeError::Empty);
    };
    for trace in traces {
        trace.check(|fault| Error::invalid(super::PART, fault))?;
        if !force {
            check_alike(&first.header, &trace.header)?;
        }
    }
    let all: Vec<&Trace> = traces.iter().collect();
    let atoms = Atoms::new(&all)?;
    let weights = Weights::new(traces);
    let mut merged: Vec<Merged> = atoms.iter().map(|places| weights.merged(places)).collect();
    merged.sort_unstable_by_key(|run| (run.rank, run.blob, run.block));
    let mut clock_us = 0;
    let entries = merged.iter().map(|run| {
        // The medians of times need not ascend as those of ranks do.
        let since_previous_us = run.due_us.saturating_sub(clock_us).min(GAP_US_MAX);
        clock_us += since_previous_us;
        let Merged { blob, block, blocks, confidence, .. } = *run;
        TraceEntry { blob, block, blocks, since_previous_us, confidence }
    });
    let mut entries = coalesce(entries);
    let lost = entries.len().saturating_sub(TRACE_ENTRIES_MAX) as u64;
    entries.truncate(TRACE_ENTRIES_MAX);
    Ok(Trace { header: header(traces, first, atoms.blobs, lost), entries })
}

fn check_alike(first: &TraceHeader, other: &TraceHeader) -> Result<(), MergeError> {
    if first.command != other.command {
        return Err(MergeError::Commands { first: first.command.clone(), other: other.command.clone() });
    }
    if first.manifest != other.manifest {
        return Err(MergeError::Images { first: first.manifest, other: other.manifest });
    }
    if first.read_ahead_kb != other.read_ahead_kb {
        return Err(MergeError::ReadAhead { first: first.read_ahead_kb, other: other.read_ahead_kb });
    }
    Ok(())
}

/// The header of the merged trace; `lost` entries did not fit into it.
fn header(traces: &[Trace], first: &Trace, blobs: Vec<Sha256>, lost: u64) -> TraceHeader {
    let ready: Vec<_> =
        traces.iter().filter_map(|trace| Some((trace.header.ready_us?, u64::from(trace.header.runs)))).collect();
    TraceHeader {
        manifest: first.header.manifest,
        command: first.header.command.clone(),
        // The most that the kernel may have asked for on its own.
        read_ahead_kb: traces.iter().map(|trace| trace.header.read_ahead_kb).max().unwrap_or(0),
        runs: traces.iter().fold(0, |sum: u32, trace| sum.saturating_add(trace.header.runs)),
        ready_us: median(ready),
        lost: traces.iter().fold(lost, |sum, trace| sum.saturating_add(trace.header.lost)),
        blobs,
    }
}

/// A run of blocks in the merged trace.
struct Merged {
    rank: u64,
    blob: u16,
    block: u32,
    blocks: u16,
    due_us: u64,
    confidence: u8,
}

/// How much each trace counts.
struct Weights {
    /// Runs and blocks of each trace.
    traces: Vec<(u64, u64)>,
    runs: u64,
}

impl Weights {
    fn new(traces: &[Trace]) -> Self {
        let traces: Vec<_> = traces.iter().map(|trace| (u64::from(trace.header.runs), trace.blocks())).collect();
        let runs = traces.iter().map(|(runs, _)| runs).sum();
        Self { traces, runs }
    }

    fn merged(&self, places: &[Place]) -> Merged {
        let (mut ranks, mut times) = (Vec::with_capacity(places.len()), Vec::with_capacity(places.len()));
        let mut votes = 0;
        for place in places {
            let (runs, blocks) = self.traces[place.trace];
            // In 2^32ths of the trace, which has at most 2^28 blocks, and at least the ones of this place.
            ranks.push(((place.rank << 32) / blocks, runs));
            times.push((place.due_us, runs));
            votes += u64::from(place.confidence) * runs;
        }
        let confidence = (2 * votes + self.runs) / (2 * self.runs);
        let Place { blob, block, blocks, .. } = places[0];
        Merged {
            rank: median(ranks).unwrap_or(0),
            blob,
            block,
            blocks,
            due_us: median(times).unwrap_or(0),
            confidence: u8::try_from(confidence.max(1)).unwrap_or(u8::MAX),
        }
    }
}

/// The median of values that count several times each; between the two in the middle of an even number.
fn median(mut values: Vec<(u64, u64)>) -> Option<u64> {
    values.sort_unstable();
    let count: u64 = values.iter().map(|(_, times)| times).sum();
    let at = |position: u64| {
        let mut before = 0;
        values.iter().find_map(|(value, times)| {
            before += times;
            (position < before).then_some(*value)
        })
    };
    let (low, high) = (at(count.checked_sub(1)? / 2)?, at(count / 2)?);
    Some(low + (high - low) / 2)
}
