//! The simulated program: recorded reads with the thinking between them.

use std::time::Duration;

use crate::bound::{Bound, BoundLink, Start, UnitRead, lower_bound};
use crate::types::ChunkKey;

use super::image::SimulatedImage;
use super::link::Link;

/// A read as it was recorded, in blocks of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordedRead {
    /// Since the program was executed; negative for what was read before that, by the mount and the search for the
    /// program.
    pub at_us: i64,
    /// First block.
    pub block: u32,
    /// Number of blocks.
    pub blocks: u32,
}

/// One read to replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramRead {
    /// Since the answer to the read before it.
    pub think: Duration,
    /// Where it lies in the recording: the sum of all thinking up to it.
    pub due: Duration,
    /// As recorded.
    pub recorded: RecordedRead,
    /// What it needs while nothing is there: frames of the hot blob, and chunks for the blocks outside.
    pub units: Vec<ChunkKey>,
}

/// A start to replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its reads in order.
    pub reads: Vec<ProgramRead>,
    /// From the last answer until ready.
    pub tail: Duration,
}

impl Program {
    /// The recorded reads on the given image.
    ///
    /// The recordings come from storage that was memory, so the times between reads are thinking. What came before the
    /// program (negative times) happens at 0, in its order: the mount is no thinking of the program. `warm` is the
    /// measured time to ready when nothing is read at all. Where the recording took longer than that (each recorded read
    /// cost something, and so did recording it) its thinking is scaled down to `warm`; where it ended earlier, the rest
    /// is the tail.
    #[must_use]
    pub fn new(image: &SimulatedImage, reads: &[RecordedRead], warm: Duration) -> Self {
        let at = |read: &RecordedRead| Duration::from_micros(u64::try_from(read.at_us).unwrap_or(0));
        let recorded = reads.iter().map(at).max().unwrap_or(Duration::ZERO);
        let scale = if recorded > warm { warm.as_secs_f64() / recorded.as_secs_f64() } else { 1.0 };
        let mut clock = Duration::ZERO;
        let replayed = reads.iter().map(|read| {
            let due = at(read).mul_f64(scale).max(clock);
            let think = due - clock;
            clock = due;
            ProgramRead { think, due, recorded: *read, units: image.units_of(*read) }
        });
        let reads: Vec<ProgramRead> = replayed.collect();
        Self { reads, tail: warm.saturating_sub(clock) }
    }

    /// T* of this start on this image, over this link.
    #[must_use]
    pub fn bound(&self, image: &SimulatedImage, link: Link, lead: Duration) -> Bound {
        let mut reads = Vec::new();
        for read in &self.reads {
            let mut think = read.think;
            for index in read.units.iter().filter_map(|unit| image.index(*unit)) {
                reads.push(UnitRead { unit: u32::try_from(index).unwrap_or(u32::MAX), think });
                think = Duration::ZERO;
            }
            if think > Duration::ZERO {
                reads.push(UnitRead { unit: u32::MAX, think });
            }
        }
        let bandwidth_bytes_per_s = link.bandwidth_bytes_per_s;
        lower_bound(&Start {
            units: &image.bound_units(),
            reads: &reads,
            tail: self.tail,
            link: BoundLink { bandwidth_bytes_per_s, first_byte: link.round_trip, slow_start: None },
            lead,
            decode: None,
            processors: None,
        })
    }
}
