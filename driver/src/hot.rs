//! Where the blocks of the layer blobs lie in the hot file, and which of its frames are not to be used.
//!
//! The hot blob of a profile holds blocks of the layer blobs, packed in the order of their first use. On this host it is
//! a [`crate::store::BlobFile`] like those of the layers, named by the digest of the hot table, which vouches for its
//! frames as a chunk index does for its chunks. Its blocks are numbered by **rank**: the order of the trace. The trace
//! alone says which block of which layer a rank is, so the map is made from it.
//!
//! A block of a layer is looked up by binary search among runs of neighbours that are packed together; nothing is
//! allocated and no lock is taken. A frame that cannot be had, or is not what the table promises, is *withdrawn*: its
//! blocks come from the layers' chunks from then on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Blocks of a layer blob that lie side by side in the hot file too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// First block in the layer blob.
    block: u32,
    len_blocks: u32,
    /// Rank of the first.
    rank: u32,
}

/// The ranks of packed blocks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct HotMap {
    /// For each layer blob, in the order of the device table, its runs by block; no block is in two.
    layers: Vec<Vec<Run>>,
}

impl HotMap {
    /// The map of a hot blob of `packed_blocks` blocks. `first_reads` are the reads of the trace in order, as a place in
    /// the device table and a range of blocks; each block counts when it comes first. `None` if the trace has fewer
    /// blocks than are packed: the two do not belong together.
    pub(crate) fn new(
        layers: usize,
        packed_blocks: u32,
        first_reads: impl Iterator<Item = (usize, Range<u32>)>,
    ) -> Option<Self> {
        let mut ranked: Vec<BTreeMap<u32, Run>> = vec![BTreeMap::new(); layers];
        let mut rank = 0;
        for (layer, blocks) in first_reads {
            let runs = ranked.get_mut(layer)?;
            let mut at = blocks.start;
            while rank < packed_blocks && at < blocks.end {
                let before = runs.range(..=at).next_back().map(|(_, run)| *run);
                if let Some(run) = before.filter(|run| at - run.block < run.len_blocks) {
                    at = run.block.saturating_add(run.len_blocks);
                    continue;
                }
                let next = runs.range(at..).next().map_or(blocks.end, |(start, _)| (*start).min(blocks.end));
                let len_blocks = (next - at).min(packed_blocks - rank);
                let run = Run { block: at, len_blocks, rank };
                match before.filter(|before| before.continues_with(&run)) {
                    Some(before) => {
                        let len_blocks = before.len_blocks + len_blocks;
                        runs.insert(before.block, Run { len_blocks, ..before });
                    }
                    None => drop(runs.insert(at, run)),
                }
                rank += len_blocks;
                at += len_blocks;
            }
        }
        let layers = ranked.into_iter().map(|runs| runs.into_values().collect()).collect();
        (rank == packed_blocks).then_some(Self { layers })
    }

    /// Looks at a range of blocks of a layer blob, not empty: the rank of its first block if that is packed, and the end
    /// of the blocks from there on that are packed side by side, or that are not packed.
    pub(crate) fn find(&self, layer: usize, blocks: Range<u32>) -> (Option<u32>, u32) {
        let runs = self.layers.get(layer).map_or(&[][..], Vec::as_slice);
        let after = runs.partition_point(|run| run.block <= blocks.start);
        if let Some(run) = after.checked_sub(1).and_then(|before| runs.get(before)) {
            let into = blocks.start - run.block;
            if into < run.len_blocks {
                return (Some(run.rank + into), run.block.saturating_add(run.len_blocks).min(blocks.end));
            }
        }
        (None, runs.get(after).map_or(blocks.end, |run| run.block.min(blocks.end)))
    }
}

impl Run {
    fn continues_with(&self, next: &Self) -> bool {
        self.block + self.len_blocks == next.block && self.rank + self.len_blocks == next.rank
    }
}

/// The frames of a hot blob that are not to be asked for again.
#[derive(Debug)]
pub(crate) struct Withdrawn {
    words: Box<[AtomicU64]>,
    frames: AtomicU32,
}

impl Withdrawn {
    /// None of so many frames.
    pub(crate) fn new(frames: u32) -> Self {
        let words = (0..frames.div_ceil(u64::BITS)).map(|_| AtomicU64::new(0)).collect();
        Self { words, frames: AtomicU32::new(0) }
    }

    pub(crate) fn contains(&self, frame: u32) -> bool {
        let word = self.words.get((frame / u64::BITS) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (frame % u64::BITS) != 0)
    }

    /// Withdraws a frame; false if it was already.
    pub(crate) fn insert(&self, frame: u32) -> bool {
        let Some(word) = self.words.get((frame / u64::BITS) as usize) else { return false };
        let bit = 1 << (frame % u64::BITS);
        let new = word.fetch_or(bit, Ordering::AcqRel) & bit == 0;
        if new {
            self.frames.fetch_add(1, Ordering::Relaxed);
        }
        new
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.frames.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// The rank of every packed block, one by one.
    fn naive(packed: u32, reads: &[(usize, Range<u32>)]) -> BTreeMap<(usize, u32), u32> {
        let mut ranks = BTreeMap::new();
        for (layer, block) in reads.iter().flat_map(|(layer, blocks)| blocks.clone().map(|block| (*layer, block))) {
            let next = u32::try_from(ranks.len()).unwrap();
            if next < packed {
                ranks.entry((layer, block)).or_insert(next);
            }
        }
        ranks
    }

    fn reads() -> impl Strategy<Value = Vec<(usize, Range<u32>)>> {
        let read = (0..3_usize, 0..80_u32, 1..20_u32).prop_map(|(layer, block, len)| (layer, block..block + len));
        prop::collection::vec(read, 0..30)
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_blocks(reads in reads(), packed in 0..200_u32, ask in 0..100_u32, len in 1..40_u32) {
            let ranks = naive(packed, &reads);
            let map = HotMap::new(3, packed, reads.into_iter());
            prop_assert_eq!(map.is_some(), ranks.len() == packed as usize);
            let Some(map) = map else { return Ok(()) };
            for layer in 0..3 {
                let mut at = ask;
                while at < ask + len {
                    let (rank, end) = map.find(layer, at..ask + len);
                    prop_assert!(end > at && end <= ask + len);
                    for block in at..end {
                        prop_assert_eq!(rank.map(|rank| rank + block - at), ranks.get(&(layer, block)).copied());
                    }
                    at = end;
                }
            }
        }
    }

    #[test]
    fn neighbours_that_are_read_one_after_another_are_one_run() {
        let map = HotMap::new(1, 6, [(0, 4..6), (0, 6..8), (0, 0..2)].into_iter()).unwrap();
        assert_eq!(map.layers, [[Run { block: 0, len_blocks: 2, rank: 4 }, Run { block: 4, len_blocks: 4, rank: 0 }]]);
        assert_eq!(map.find(0, 5..100), (Some(1), 8));
        assert_eq!(map.find(0, 8..100), (None, 100));
        assert_eq!(map.find(1, 0..9), (None, 9), "a layer that has none");
    }

    #[test]
    fn a_trace_of_another_image_has_no_map() {
        assert_eq!(HotMap::new(1, 1, [(1, 0..1)].into_iter()), None);
    }

    #[test]
    fn a_frame_is_withdrawn_once() {
        let withdrawn = Withdrawn::new(70);
        assert!(withdrawn.insert(69) && !withdrawn.insert(69) && !withdrawn.insert(200));
        assert!(withdrawn.contains(69) && !withdrawn.contains(68) && !withdrawn.contains(1000));
        assert_eq!(withdrawn.count(), 1);
    }
}
