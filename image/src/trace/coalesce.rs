//! First reads as they were seen, made into the entries of a trace: no block twice, neighbours together.

use std::collections::BTreeMap;

use super::{ENTRY_BLOCKS_MAX, GAP_US_MAX, TraceEntry};

/// Longest time from the first read of an entry that [`coalesce`] makes to its last one. All blocks of an entry count as
/// read with its first one, so this is how much too early one can seem; it is little beside any round trip.
pub const COALESCE_GAP_US: u64 = 100;

/// Drops blocks that were in an entry before, and joins an entry to the one before it when it follows directly in place
/// and within [`COALESCE_GAP_US`]. The order of blocks stays, and so does the time of every entry that remains.
pub fn coalesce(entries: impl IntoIterator<Item = TraceEntry>) -> Vec<TraceEntry> {
    let mut seen = Seen::default();
    let mut out: Vec<TraceEntry> = Vec::new();
    // Time from the last entry in `out` to the current one.
    let mut gap_us: u64 = 0;
    for entry in entries {
        gap_us = gap_us.saturating_add(entry.since_previous_us).min(GAP_US_MAX);
        for (block, blocks) in seen.add(entry.blob, entry.block, entry.blocks) {
            let new = TraceEntry { block, blocks, since_previous_us: gap_us, ..entry };
            match out.last_mut().filter(|last| follows(last, &new)) {
                // The time passed stays with the gap: it belongs to the next entry.
                Some(last) => last.blocks += blocks,
                None => {
                    out.push(new);
                    gap_us = 0;
                }
            }
        }
    }
    out
}

fn follows(last: &TraceEntry, new: &TraceEntry) -> bool {
    last.blob == new.blob
        && last.confidence == new.confidence
        && last.block + u32::from(last.blocks) == new.block
        && last.blocks + new.blocks <= ENTRY_BLOCKS_MAX
        && new.since_previous_us <= COALESCE_GAP_US
}

/// Blocks seen so far, as runs that do not touch.
#[derive(Default)]
struct Seen {
    /// First block of a run, with its blob, to the end of the run.
    runs: BTreeMap<(u16, u32), u32>,
}

impl Seen {
    /// Adds a run; returns the parts of it that are new, in order.
    fn add(&mut self, blob: u16, block: u32, blocks: u16) -> Vec<(u32, u16)> {
        let end = block.saturating_add(u32::from(blocks));
        let mut new = Vec::new();
        let (mut run_start, mut run_end) = (block, end);
        let mut at = block;
        // The run that starts before this one and may reach into it, then those that start inside of it.
        let before = self.runs.range(..(blob, block)).next_back().filter(|((of, _), to)| *of == blob && **to >= block);
        let touching: Vec<_> = before.into_iter().chain(self.runs.range((blob, block)..=(blob, end))).collect();
        let touching: Vec<_> = touching.into_iter().map(|((_, start), end)| (*start, *end)).collect();
        for (start, stop) in touching {
            if start > at {
                new.push((at, start - at));
            }
            at = at.max(stop);
            (run_start, run_end) = (run_start.min(start), run_end.max(stop));
            self.runs.remove(&(blob, start));
        }
        if at < end {
            new.push((at, end - at));
        }
        self.runs.insert((blob, run_start), run_end);
        // Parts of a run of at most 65535 blocks.
        new.into_iter().map(|(block, blocks)| (block, u16::try_from(blocks).unwrap_or(u16::MAX))).collect()
    }
}
