//! What is pushed next: the blocks of a trace, in its order, as far as they are here.
//!
//! Of every [`STRETCHES`] stretches of a trace one is left to the reader: its reads are what the guard of the plan and the
//! figures of the start go by. So is the end, whose reads tell that the start is over.

use std::collections::VecDeque;
use std::ops::Range;

/// Blocks of the device, side by side.
pub(crate) type Run = Range<u32>;

/// What has become of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Not in the store.
    Absent,
    /// In the store, and nobody has read it.
    Here,
    /// A reader was there first.
    Read,
}

/// Blocks of a turn: 4 MiB, some milliseconds of work, so that what is asked for next is never far from what is read next.
const TURN_BLOCKS: u32 = 1024;

/// Runs that are looked at in a turn: beyond those that have not arrived lies what was packed with them, not the rest of a
/// trace.
const LOOKED_AT: usize = 1024;

/// Blocks of a stretch: those of a frame of the hot blob.
const STRETCH_BLOCKS: u64 = 64;

/// Of so many stretches the last is not pushed.
const STRETCHES: u64 = 8;

/// Entries at the end of a trace that tell whether a start has got there: when half of them were read.
pub(crate) const END_ENTRIES: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    /// In the order of the trace.
    runs: VecDeque<Run>,
}

impl Feed {
    /// Of the first reads of a trace.
    pub(crate) fn new(reads: impl Iterator<Item = Run>) -> Self {
        let mut runs: VecDeque<Run> = reads.collect();
        runs.truncate(runs.len().saturating_sub(END_ENTRIES));
        let mut rank = 0;
        runs.retain(|run| {
            let stretch = rank / STRETCH_BLOCKS;
            rank += run.len() as u64;
            stretch % STRETCHES != STRETCHES - 1
        });
        Self { runs }
    }

    /// Nothing is left.
    pub(crate) fn is_over(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs of the next turn; none if none of the next ones has arrived.
    pub(crate) fn turn(&mut self, state: impl Fn(&Run) -> State) -> Vec<Run> {
        let (mut taken, mut absent, mut blocks) = (Vec::new(), Vec::new(), 0);
        for _ in 0..LOOKED_AT {
            if blocks >= TURN_BLOCKS {
                break;
            }
            let Some(run) = self.runs.pop_front() else { break };
            match state(&run) {
                State::Read => {}
                State::Absent => absent.push(run),
                State::Here => {
                    blocks += run.end - run.start;
                    taken.push(run);
                }
            }
        }
        for run in absent.into_iter().rev() {
            self.runs.push_front(run);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// One block each, as a trace of a device without read-ahead.
    fn single(blocks: Range<u32>) -> impl Iterator<Item = Run> {
        blocks.map(|block| block..block + 1)
    }

    fn all_here(_: &Run) -> State {
        State::Here
    }

    #[test]
    fn one_stretch_in_eight_and_the_end_are_left_to_the_reader() {
        let mut feed = Feed::new(single(0..1024 + 64));
        let pushed: Vec<u32> = feed.turn(all_here).into_iter().map(|run| run.start).collect();
        let left = |block: &u32| (448..512).contains(block) || (960..1024).contains(block) || *block >= 1024;
        assert_eq!(pushed, (0..1088).filter(|block| !left(block)).collect::<Vec<_>>());
        assert!(feed.is_over());
        assert!(Feed::new(single(0..64)).is_over(), "a start of so few reads is all end");
    }

    #[test]
    fn what_has_not_arrived_keeps_its_turn_and_holds_nobody_up() {
        let mut feed = Feed::new(single(0..10 + 64));
        let here_from = |first: u32| move |run: &Run| if run.start < first { State::Absent } else { State::Here };
        assert_eq!(feed.turn(here_from(8)), [8..9, 9..10]);
        assert_eq!(feed.turn(here_from(8)), []);
        assert!(!feed.is_over());
        assert_eq!(feed.turn(here_from(6)), [6..7, 7..8]);
        assert_eq!(feed.turn(here_from(0)), single(0..6).collect::<Vec<_>>());
        assert!(feed.is_over());
    }

    #[test]
    fn a_turn_is_short() {
        let mut feed = Feed::new((0..40_000).map(|at| at * 256..(at + 1) * 256));
        let blocks = |runs: Vec<Run>| runs.iter().map(ExactSizeIterator::len).sum::<usize>();
        assert_eq!(blocks(feed.turn(all_here)), TURN_BLOCKS as usize);
        assert_eq!(blocks(feed.turn(|_| State::Read)), 0);
        assert_eq!(blocks(feed.turn(all_here)), TURN_BLOCKS as usize);
    }

    proptest! {
        /// Whatever arrives when: each run is pushed once, not before it is here, and never when somebody has read it.
        #[test]
        fn each_is_pushed_once_when_it_is_here(
            lens in prop::collection::vec(1u32..40, 64..400),
            turns in prop::collection::vec(prop::collection::btree_set(0u32..400, 0..80), 0..12),
        ) {
            let mut at = 0;
            let runs: Vec<Run> = lens.iter().map(|len| { at += len; at - len..at }).collect();
            let mut feed = Feed::new(runs.iter().cloned());
            let wanted: BTreeSet<u32> = feed.runs.iter().map(|run| run.start).collect();
            let number = |run: &Run| u32::try_from(runs.iter().position(|of| of == run).unwrap()).unwrap();
            let (mut here, mut done) = (BTreeSet::new(), BTreeSet::new());
            for arrived in turns {
                here.extend(arrived);
                let state = |run: &Run| match number(run) {
                    number if !here.contains(&number) => State::Absent,
                    number if number % 5 == 0 => State::Read,
                    _ => State::Here,
                };
                let turn = feed.turn(state);
                prop_assert!(turn.iter().map(number).is_sorted());
                for run in turn {
                    prop_assert_eq!(state(&run), State::Here);
                    prop_assert!(done.insert(run.start) && wanted.contains(&run.start));
                }
            }
            while !feed.is_over() {
                done.extend(feed.turn(all_here).iter().map(|run| run.start));
            }
            let read = runs.iter().filter(|run| number(run) % 5 == 0 && here.contains(&number(run)));
            let read: BTreeSet<u32> = read.map(|run| run.start).filter(|start| !done.contains(start)).collect();
            prop_assert_eq!(done.union(&read).filter(|start| wanted.contains(start)).count(), wanted.len());
        }
    }
}
