//! Traces that do not fit: what a policy must survive.

use std::collections::BTreeSet;

use super::image::{FRAME_BLOCKS, FrameSize};
use super::program::RecordedRead;

/// A trace as recorded, and the frames that a hot blob packed from it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recording {
    /// First reads.
    pub reads: Vec<RecordedRead>,
    /// Frames that hold their blocks, in order of first use.
    pub frames: Vec<FrameSize>,
}

impl Recording {
    /// Blocks in the order of first use.
    #[must_use]
    pub fn blocks(&self) -> Vec<u32> {
        let mut seen = BTreeSet::new();
        let blocks = self.reads.iter().flat_map(|read| read.block..read.block.saturating_add(read.blocks));
        blocks.filter(|block| seen.insert(*block)).collect()
    }

    /// The first half of its reads: the recording stopped early.
    #[must_use]
    pub fn cut(&self) -> Self {
        let reads = self.reads.iter().take(self.reads.len() / 2).copied().collect();
        let mut cut = Self { reads, frames: Vec::new() };
        let mut blocks = u32::try_from(cut.blocks().len()).unwrap_or(u32::MAX);
        for frame in &self.frames {
            let kept = frame.blocks.min(blocks);
            blocks -= kept;
            if kept > 0 {
                let stored_len_bytes = share(frame.stored_len_bytes, kept, frame.blocks);
                cut.frames.push(FrameSize { blocks: kept, stored_len_bytes });
            }
        }
        cut
    }

    /// The last read first.
    #[must_use]
    pub fn reversed(&self) -> Self {
        let end_us = self.reads.iter().map(|read| read.at_us).max().unwrap_or(0);
        let reads = self.reads.iter().rev().map(|read| RecordedRead { at_us: end_us - read.at_us, ..*read }).collect();
        Self { reads, frames: self.frames.iter().rev().copied().collect() }
    }

    /// As many reads at the same times, each of one block anywhere in an image of `image_blocks`; frames as large as
    /// these are on average.
    #[must_use]
    pub fn random(&self, image_blocks: u32, seed: u64) -> Self {
        let mut draws = SplitMix(seed);
        let scattered = |read: &RecordedRead| {
            let block = u32::try_from(draws.next() % u64::from(image_blocks.max(1))).unwrap_or(0);
            RecordedRead { block, blocks: 1, ..*read }
        };
        let mut random = Self { reads: self.reads.iter().map(scattered).collect(), frames: Vec::new() };
        let (blocks, stored) = self.frames.iter().fold((0_u64, 0_u64), |(blocks, stored), frame| {
            (blocks + u64::from(frame.blocks), stored + u64::from(frame.stored_len_bytes))
        });
        let full_bytes = (stored * u64::from(FRAME_BLOCKS)).checked_div(blocks).unwrap_or(0);
        let full_bytes = u32::try_from(full_bytes).unwrap_or(u32::MAX);
        let mut left = u32::try_from(random.blocks().len()).unwrap_or(u32::MAX);
        while left > 0 {
            let blocks = left.min(FRAME_BLOCKS);
            left -= blocks;
            random.frames.push(FrameSize { blocks, stored_len_bytes: share(full_bytes, blocks, FRAME_BLOCKS) });
        }
        random
    }
}

fn share(bytes: u32, part: u32, whole: u32) -> u32 {
    let share = u64::from(bytes) * u64::from(part) / u64::from(whole.max(1));
    u32::try_from(share).unwrap_or(u32::MAX).max(1)
}

/// Sebastiano Vigna's splitmix64: small, and the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording() -> Recording {
        let reads = (0_u32..200).map(|read| RecordedRead { at_us: i64::from(read) * 10, block: read * 3, blocks: 2 });
        let frame = |blocks| FrameSize { blocks, stored_len_bytes: blocks * 1000 };
        Recording { reads: reads.collect(), frames: [64, 64, 64, 64, 64, 64, 16].map(frame).to_vec() }
    }

    #[test]
    fn a_cut_recording_keeps_the_front_and_its_frames() {
        let cut = recording().cut();
        assert_eq!(cut.reads, recording().reads[..100]);
        assert_eq!(cut.frames.iter().map(|frame| frame.blocks).collect::<Vec<_>>(), [64, 64, 64, 8]);
        assert_eq!(cut.frames[3].stored_len_bytes, 8000);
    }

    #[test]
    fn a_reversed_recording_runs_forward_in_time() {
        let reversed = recording().reversed();
        assert_eq!((reversed.reads[0].at_us, reversed.reads[0].block), (0, 199 * 3));
        assert!(reversed.reads.is_sorted_by_key(|read| read.at_us));
        assert_eq!(reversed.frames[0].blocks, 16);
    }

    #[test]
    fn random_recordings_depend_on_the_seed_alone_and_fill_their_frames() {
        let random = recording().random(10_000, 7);
        assert_eq!(random, recording().random(10_000, 7));
        assert_ne!(random, recording().random(10_000, 8));
        let blocks = random.blocks();
        assert!(blocks.iter().all(|block| *block < 10_000));
        assert_eq!(random.frames.iter().map(|frame| frame.blocks as usize).sum::<usize>(), blocks.len());
        assert_eq!(random.frames[0].stored_len_bytes, 64_000);
    }
}
