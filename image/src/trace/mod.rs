//! Traces: which blocks a start reads first, in order, and when.
//!
//! A trace names blocks by layer blob and place in its raw stream, so it outlives a rebuild that keeps the layer. Blocks
//! of the metadata image are never in a trace: they are on the host before the device exists. Each block is in a trace
//! once, so a trace has a rank for every block: its place in the order of first reads.
//!
//! A trace may come from anywhere. What [`Trace::decode`] returns keeps the bounds below, whatever the bytes were: at most
//! [`TRACE_ENTRIES_MAX`] entries, no block twice, no address out of a device, times whose sum fits 64 bits.

mod atoms;
mod coalesce;
mod codec;
mod diff;
mod files;
mod log;
mod merge;
mod paths;
mod ranks;
mod varint;

pub use coalesce::{COALESCE_GAP_US, coalesce};
pub use diff::{DiffRun, DiffSide, TraceDiff, diff};
pub use files::{FileMap, FilePart, FileUsage, OWN_DATA, TouchedFile};
pub use log::{LOG_BATCH_ENTRIES_MAX, LogEnd, TraceLog};
pub use merge::{MergeError, merge};
pub use paths::{PathTrace, SkipReason, SkippedPath, from_paths};
pub use ranks::{Ranks, TracedBlock};

use std::collections::HashMap;

use crate::{Error, MAX_BLOCKS, MAX_DEVICES, Result, Sha256};

const PART: &str = "trace";

/// Most entries of a trace: 24 MiB of memory. The largest start known (vLLM) has 103,000 first reads.
pub const TRACE_ENTRIES_MAX: usize = 1 << 20;

/// Most blocks of one entry: 1 MiB, the longest request that a device takes.
pub const ENTRY_BLOCKS_MAX: u16 = 256;

/// Longest time between two entries: 12 days. So the sum over all entries stays below 2^60.
pub const GAP_US_MAX: u64 = (1 << 40) - 1;

/// Latest time of readiness: the longest that a trace with the most entries can be.
pub const READY_US_MAX: u64 = (1 << 60) - 1;

/// Most arguments of a command.
pub const COMMAND_ARGS_MAX: usize = 4096;

/// Longest command, in bytes of all its arguments. Linux allows that for one.
pub const COMMAND_BYTES_MAX: usize = 128 << 10;

/// Longest encoded trace: what a reader has to be ready for when it decompresses one. The most entries, of at most 16
/// bytes each, with the longest header.
pub const TRACE_BYTES_MAX: usize = 17 << 20;

/// The first reads of a start, or what several of them have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// What was recorded.
    pub header: TraceHeader,
    /// First reads in order. No block is in two of them.
    pub entries: Vec<TraceEntry>,
}

/// What a trace is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceHeader {
    /// Digest of the image's manifest.
    pub manifest: Sha256,
    /// The command that was run, with its arguments; empty if unknown. No argument has a NUL byte; at most
    /// [`COMMAND_ARGS_MAX`] of them with [`COMMAND_BYTES_MAX`] bytes.
    pub command: Vec<String>,
    /// `read_ahead_kb` of the device: with 0 the entries are what the start touched, else what the kernel asked for.
    pub read_ahead_kb: u32,
    /// Number of recorded starts in this trace, at least 1.
    pub runs: u32,
    /// Time from the start of the clock to readiness, if it was seen; at most [`READY_US_MAX`].
    pub ready_us: Option<u64>,
    /// First reads that are missing here because there was no room for them.
    pub lost: u64,
    /// Digests of the layer blobs that entries refer to, each once; at most [`MAX_DEVICES`].
    pub blobs: Vec<Sha256>,
}

/// A run of blocks that were read for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceEntry {
    /// The layer blob: index into [`TraceHeader::blobs`].
    pub blob: u16,
    /// First block in the raw stream of the blob.
    pub block: u32,
    /// Number of blocks: 1 to [`ENTRY_BLOCKS_MAX`].
    pub blocks: u16,
    /// Time since the entry before, or since the start of the clock. At most [`GAP_US_MAX`].
    pub since_previous_us: u64,
    /// Share of the runs that read it: 255 is every run. At least 1.
    pub confidence: u8,
}

impl TraceHeader {
    /// SHA-256 of the command's arguments, each followed by a NUL byte: the key by which a profile is chosen.
    pub fn command_digest(&self) -> Sha256 {
        command_digest(&self.command)
    }

    /// Why the header cannot be, if so.
    fn fault(&self) -> Option<String> {
        let command_bytes: usize = self.command.iter().map(String::len).sum();
        if self.command.len() > COMMAND_ARGS_MAX || command_bytes > COMMAND_BYTES_MAX {
            return Some(format!("command of {} arguments with {command_bytes} bytes", self.command.len()));
        }
        if self.command.iter().any(|argument| argument.contains('\0')) {
            return Some("an argument of the command has a NUL byte".to_owned());
        }
        if self.runs == 0 {
            return Some("made of 0 runs".to_owned());
        }
        if let Some(ready_us) = self.ready_us.filter(|ready_us| *ready_us > READY_US_MAX) {
            return Some(format!("ready after {ready_us} us"));
        }
        if self.blobs.len() > MAX_DEVICES {
            return Some(format!("{} blobs, at most {MAX_DEVICES}", self.blobs.len()));
        }
        let mut blobs = self.blobs.clone();
        blobs.sort_unstable();
        let twice = blobs.windows(2).find(|pair| pair[0] == pair[1])?;
        Some(format!("blob {} is named twice", twice[0]))
    }
}

impl TraceEntry {
    /// Why the entry cannot be in a trace with so many blobs, if so.
    fn fault(&self, blobs: usize) -> Option<String> {
        let Self { blob, block, blocks, since_previous_us, confidence } = *self;
        if usize::from(blob) >= blobs {
            return Some(format!("blob {blob} of {blobs}"));
        }
        let end = block.checked_add(u32::from(blocks)).filter(|end| *end <= MAX_BLOCKS);
        if end.is_none() || !(1..=ENTRY_BLOCKS_MAX).contains(&blocks) {
            return Some(format!("{blocks} blocks at block {block}"));
        }
        if since_previous_us > GAP_US_MAX {
            return Some(format!("{since_previous_us} us after the entry before"));
        }
        (confidence == 0).then(|| "confidence 0".to_owned())
    }

    /// Sorts by place.
    fn place(&self) -> u64 {
        u64::from(self.blob) << 48 | u64::from(self.block) << 16 | u64::from(self.blocks)
    }
}

impl Trace {
    /// The trace as bytes: the same trace gives the same bytes.
    ///
    /// # Errors
    /// `Invalid` if the header or an entry is out of its bounds or a block is in two entries; `TooLarge` with more than
    /// [`TRACE_ENTRIES_MAX`] entries.
    pub fn encode(&self) -> Result<Vec<u8>> {
        codec::encode(self)
    }

    /// Reads a trace, of at most [`TRACE_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// `Corrupt` if `bytes` is not exactly one trace within the bounds, `Unsupported` if it is of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        codec::decode(bytes)
    }

    /// SHA-256 of the command's arguments, each followed by a NUL byte: the key by which a profile is chosen.
    pub fn command_digest(&self) -> Sha256 {
        self.header.command_digest()
    }

    /// Number of blocks in all entries.
    pub fn blocks(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.blocks)).sum()
    }

    /// Time of the last entry, from the start of the clock.
    pub fn span_us(&self) -> u64 {
        self.entries.iter().fold(0, |sum: u64, entry| sum.saturating_add(entry.since_previous_us))
    }

    /// All blocks in the order of their ranks, with the time at which each was read.
    pub fn traced_blocks(&self) -> impl Iterator<Item = TracedBlock> {
        ranks::traced_blocks(&self.entries)
    }

    /// For looking up the rank of a block.
    pub fn ranks(&self) -> Ranks {
        Ranks::new(&self.entries)
    }

    /// Whether all is within the bounds; `error` makes the error from what is wrong.
    fn check(&self, error: impl Fn(String) -> Error) -> Result<()> {
        if let Some(fault) = self.header.fault() {
            return Err(error(fault));
        }
        for (number, entry) in self.entries.iter().enumerate() {
            if let Some(fault) = entry.fault(self.header.blobs.len()) {
                return Err(error(format!("entry {number}: {fault}")));
            }
        }
        let mut places: Vec<u64> = self.entries.iter().map(TraceEntry::place).collect();
        places.sort_unstable();
        // The end of the first, in the same terms: one more block than fits moves it past the start of the second.
        match places.windows(2).find(|pair| (pair[0] & !0xffff) + ((pair[0] & 0xffff) << 16) > pair[1] & !0xffff) {
            Some(pair) => {
                Err(error(format!("block {} of blob {} is in two entries", pair[1] >> 16 & 0xffff_ffff, pair[1] >> 48)))
            }
            None => Ok(()),
        }
    }
}

/// SHA-256 of a command's arguments, each followed by a NUL byte.
pub fn command_digest(command: &[impl AsRef<str>]) -> Sha256 {
    let mut bytes = Vec::new();
    for argument in command {
        bytes.extend_from_slice(argument.as_ref().as_bytes());
        bytes.push(0);
    }
    Sha256::of(&bytes)
}

/// The blobs of an image for [`TraceHeader::blobs`], each once, and the number of each of `blobs` among them: an image may
/// have the same layer twice.
pub fn distinct_blobs(blobs: impl IntoIterator<Item = Sha256>) -> (Vec<Sha256>, Vec<u16>) {
    let mut distinct = Vec::new();
    let mut numbers = HashMap::new();
    let number_of = blobs.into_iter().map(|blob| {
        *numbers.entry(blob).or_insert_with(|| {
            distinct.push(blob);
            // An image has at most 1000.
            u16::try_from(distinct.len() - 1).unwrap_or(u16::MAX)
        })
    });
    let number_of = number_of.collect();
    (distinct, number_of)
}

#[cfg(test)]
mod operation_tests;
#[cfg(test)]
pub(crate) mod tests;
