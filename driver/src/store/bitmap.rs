//! Which blocks of a blob file are there: a bit per block, read without a lock.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const BITS: u32 = u64::BITS;

/// A set of blocks. Bits are set after the data is in the file, with release order, and read with acquire order: who
/// sees the bit sees the data.
#[derive(Debug)]
pub(crate) struct Bitmap {
    blocks: u32,
    words: Box<[AtomicU64]>,
}

impl Bitmap {
    /// Number of words for a number of blocks.
    pub(crate) fn words_for(blocks: u32) -> usize {
        blocks.div_ceil(BITS) as usize
    }

    /// A bitmap with these words; `None` if there are too many or too few, or a bit past the last block is set.
    pub(crate) fn from_words(blocks: u32, words: &[u64]) -> Option<Self> {
        let tail = blocks % BITS;
        let past_end = if tail == 0 { 0 } else { u64::MAX << tail };
        if words.len() != Self::words_for(blocks) || words.last().is_some_and(|last| last & past_end != 0) {
            return None;
        }
        Some(Self { blocks, words: words.iter().map(|word| AtomicU64::new(*word)).collect() })
    }

    /// A bitmap without a bit set.
    pub(crate) fn empty(blocks: u32) -> Self {
        Self { blocks, words: (0..Self::words_for(blocks)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The first block of the range that is not there. Blocks past the end are not there.
    pub(crate) fn first_missing(&self, range: Range<u32>) -> Option<u32> {
        for (word, mask) in masks(range.start..range.end.min(self.blocks)) {
            let missing = !self.words[word].load(Ordering::Acquire) & mask;
            if missing != 0 {
                // A word index times 64 plus a bit is a block of this bitmap, so it fits.
                return u32::try_from(word).ok().map(|word| word * BITS + missing.trailing_zeros());
            }
        }
        (range.end > self.blocks && !range.is_empty()).then(|| range.start.max(self.blocks))
    }

    /// The first block of the range that is there.
    pub(crate) fn first_present(&self, range: Range<u32>) -> Option<u32> {
        for (word, mask) in masks(range.start..range.end.min(self.blocks)) {
            let present = self.words[word].load(Ordering::Acquire) & mask;
            if present != 0 {
                return u32::try_from(word).ok().map(|word| word * BITS + present.trailing_zeros());
            }
        }
        None
    }

    /// Sets the bits of a range. Two threads may set bits of one word at the same time.
    ///
    /// # Panics
    /// If the range lies outside.
    pub(crate) fn set(&self, range: Range<u32>) {
        assert!(range.end <= self.blocks, "{range:?} of {}", self.blocks);
        for (word, mask) in masks(range) {
            self.words[word].fetch_or(mask, Ordering::Release);
        }
    }

    /// Clears the bits of a range.
    ///
    /// # Panics
    /// If the range lies outside.
    pub(crate) fn clear(&self, range: Range<u32>) {
        assert!(range.end <= self.blocks, "{range:?} of {}", self.blocks);
        for (word, mask) in masks(range) {
            self.words[word].fetch_and(!mask, Ordering::SeqCst);
        }
    }

    /// Clears every bit that `keep` does not have.
    pub(crate) fn retain(&self, keep: &Self) {
        for (word, keep) in self.words.iter().zip(&keep.words) {
            word.fetch_and(keep.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The words as they are now; each is read at its own moment.
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Sets the bits of an earlier snapshot again.
    pub(crate) fn restore(&self, snapshot: &[u64]) {
        for (word, bits) in self.words.iter().zip(snapshot) {
            word.fetch_or(*bits, Ordering::Release);
        }
    }

    /// The words that a range touches with its bits set, and the index of the first: what [`Self::set`] will make of
    /// them if nobody else sets bits meanwhile.
    pub(crate) fn words_with(&self, range: Range<u32>) -> (usize, Vec<u64>) {
        let first = (range.start / BITS) as usize;
        let word = |(word, mask): (usize, u64)| self.words[word].load(Ordering::Relaxed) | mask;
        (first, masks(range).map(word).collect())
    }

    /// Number of blocks of a range that are there.
    pub(crate) fn count_in(&self, range: Range<u32>) -> u32 {
        let words = masks(range.start..range.end.min(self.blocks));
        words.map(|(word, mask)| (self.words[word].load(Ordering::Relaxed) & mask).count_ones()).sum()
    }

    /// Number of blocks that are there.
    pub(crate) fn count(&self) -> u32 {
        self.words.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum()
    }
}

/// The words that a range of bits touches, with the bits of each.
fn masks(range: Range<u32>) -> impl Iterator<Item = (usize, u64)> {
    let words = if range.is_empty() { 0..0 } else { range.start / BITS..range.end.div_ceil(BITS) };
    words.map(move |word| {
        let from = range.start.max(word * BITS) - word * BITS;
        let len = range.end.min(word.saturating_add(1).saturating_mul(BITS)) - word * BITS - from;
        (word as usize, (u64::MAX >> (BITS - len)) << from)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn ranges(blocks: u32) -> impl Strategy<Value = Range<u32>> {
        (0..blocks, 0..blocks).prop_map(|(a, b)| a.min(b)..a.max(b))
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_blocks(sets in prop::collection::vec(ranges(300), 0..20), ask in ranges(340)) {
            let bitmap = Bitmap::empty(300);
            let mut model = BTreeSet::new();
            for range in sets {
                let (first, words) = bitmap.words_with(range.clone());
                bitmap.set(range.clone());
                prop_assert_eq!(&bitmap.snapshot()[first..first + words.len()], &words[..]);
                model.extend(range);
            }
            prop_assert_eq!(bitmap.first_missing(ask.clone()), ask.clone().find(|block| !model.contains(block)));
            prop_assert_eq!(bitmap.first_present(ask.clone()), ask.clone().find(|block| model.contains(block)));
            prop_assert_eq!(bitmap.count() as usize, model.len());
            prop_assert_eq!(bitmap.count_in(ask.clone()) as usize, model.range(ask.clone()).count());
            let again = Bitmap::from_words(300, &bitmap.snapshot()).unwrap();
            prop_assert_eq!(again.snapshot(), bitmap.snapshot());
        }
    }

    #[test]
    fn words_that_do_not_fit_are_refused() {
        assert!(Bitmap::from_words(65, &[0, 1]).is_some());
        assert!(Bitmap::from_words(65, &[0, 2]).is_none(), "a bit past the last block");
        assert!(Bitmap::from_words(65, &[0]).is_none());
        assert!(Bitmap::from_words(64, &[u64::MAX]).is_some());
        assert!(Bitmap::from_words(0, &[]).is_some());
    }

    #[test]
    fn the_last_block_of_the_largest_file_can_be_asked_for() {
        assert_eq!(masks(u32::MAX - 1..u32::MAX).count(), 1);
    }

    #[test]
    fn a_range_is_cleared_and_no_more() {
        let bitmap = Bitmap::empty(200);
        bitmap.set(0..200);
        let before = bitmap.snapshot();
        bitmap.clear(60..130);
        assert_eq!((bitmap.first_missing(0..200), bitmap.first_present(60..200)), (Some(60), Some(130)));
        assert_eq!(bitmap.count(), 130);
        bitmap.restore(&before);
        assert_eq!(bitmap.count(), 200);
    }

    #[test]
    fn what_is_not_kept_is_cleared() {
        let (all, some) = (Bitmap::empty(100), Bitmap::empty(100));
        all.set(0..100);
        some.set(10..20);
        all.retain(&some);
        assert_eq!(all.snapshot(), some.snapshot());
    }
}
