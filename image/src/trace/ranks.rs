//! The rank of a block: its place in the order of first reads.

use super::TraceEntry;

/// A block of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TracedBlock {
    /// Index of the layer blob in the header of the trace.
    pub blob: u16,
    /// Block in the raw stream of the blob.
    pub block: u32,
    /// When it was read, from the start of the clock.
    pub due_us: u64,
    /// Share of the runs that read it: 255 is every run.
    pub confidence: u8,
}

/// All blocks of the entries in order.
pub(super) fn traced_blocks(entries: &[TraceEntry]) -> impl Iterator<Item = TracedBlock> {
    let timed = entries.iter().scan(0u64, |clock_us, entry| {
        *clock_us = clock_us.saturating_add(entry.since_previous_us);
        Some((*clock_us, entry))
    });
    timed.flat_map(|(due_us, entry)| {
        let TraceEntry { blob, block, blocks, confidence, .. } = *entry;
        (block..block.saturating_add(u32::from(blocks))).map(move |block| TracedBlock {
            blob,
            block,
            due_us,
            confidence,
        })
    })
}

/// Finds the rank of a block. 16 bytes for each entry.
#[derive(Debug, Clone)]
pub struct Ranks {
    /// Runs of blocks, by blob and place.
    runs: Vec<Run>,
    blocks: u64,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    blob: u16,
    blocks: u16,
    block: u32,
    rank: u32,
}

impl Ranks {
    pub(super) fn new(entries: &[TraceEntry]) -> Self {
        let mut blocks = 0;
        let mut runs = Vec::with_capacity(entries.len());
        for entry in entries {
            // 2^20 entries of 256 blocks have 2^28 ranks.
            let rank = u32::try_from(blocks).unwrap_or(u32::MAX);
            runs.push(Run { blob: entry.blob, blocks: entry.blocks, block: entry.block, rank });
            blocks += u64::from(entry.blocks);
        }
        runs.sort_unstable_by_key(|run| (run.blob, run.block));
        Self { runs, blocks }
    }

    /// The rank of a block, from 0; `None` if it is not in the trace.
    pub fn of(&self, blob: u16, block: u32) -> Option<u32> {
        let after = self.runs.partition_point(|run| (run.blob, run.block) <= (blob, block));
        let run = self.runs.get(after.checked_sub(1)?).filter(|run| run.blob == blob)?;
        let within = block - run.block;
        (within < u32::from(run.blocks)).then(|| run.rank + within)
    }

    /// Number of ranks: of blocks in the trace.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }
}
