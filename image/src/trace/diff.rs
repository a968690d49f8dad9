//! How much two traces have in common, and whether in the same order.

use super::Trace;
use super::atoms::Atoms;
use crate::{Result, Sha256};

/// What two traces have in common. Shares are in parts per million.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceDiff {
    /// Blocks that both have.
    pub common_blocks: u64,
    /// Blocks that only the first has.
    pub only_a_blocks: u64,
    /// Blocks that only the second has.
    pub only_b_blocks: u64,
    /// Jaccard index: common blocks of all blocks. All of them if neither trace has a block.
    pub jaccard_ppm: u32,
    /// Kendall's tau over the common blocks: 1,000,000 in the same order, -1,000,000 in the reverse one. `None` with
    /// less than two common blocks.
    pub order_ppm: Option<i32>,
    /// All blocks, by blob and place.
    pub runs: Vec<DiffRun>,
}

/// A run of blocks that one or both traces have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiffRun {
    /// The layer blob.
    pub blob: Sha256,
    /// First block in its raw stream.
    pub block: u32,
    /// Number of blocks.
    pub blocks: u32,
    /// Who has them.
    pub side: DiffSide,
}

/// Which of two traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiffSide {
    /// Both.
    Both,
    /// The first one only.
    OnlyA,
    /// The second one only.
    OnlyB,
}

/// Compares two traces. Blocks are the same when their layer blobs are, whatever the images.
///
/// # Errors
/// `Invalid` if one is out of its bounds; `TooLarge` if they have more than [`MAX_DEVICES`](crate::MAX_DEVICES) blobs.
pub fn diff(a: &Trace, b: &Trace) -> Result<TraceDiff> {
    for trace in [a, b] {
        trace.check(|fault| crate::Error::invalid(super::PART, fault))?;
    }
    let atoms = Atoms::new(&[a, b])?;
    let mut runs: Vec<DiffRun> = Vec::new();
    let mut common = Vec::new();
    let [mut common_blocks, mut only_a_blocks, mut only_b_blocks] = [0u64; 3];
    for places in atoms.iter() {
        let first = places[0];
        let blocks = u64::from(first.blocks);
        let side = match places {
            [in_a, in_b] => {
                common.push(Common { rank_a: in_a.rank, rank_b: in_b.rank, blocks });
                common_blocks += blocks;
                DiffSide::Both
            }
            _ if first.trace == 0 => {
                only_a_blocks += blocks;
                DiffSide::OnlyA
            }
            _ => {
                only_b_blocks += blocks;
                DiffSide::OnlyB
            }
        };
        let blob = atoms.blobs[usize::from(first.blob)];
        let run = DiffRun { blob, block: first.block, blocks: u32::from(first.blocks), side };
        match runs.last_mut() {
            Some(last) if (last.blob, last.side, last.block + last.blocks) == (blob, side, run.block) => {
                last.blocks += run.blocks;
            }
            _ => runs.push(run),
        }
    }
    let all = common_blocks + only_a_blocks + only_b_blocks;
    // At most 2^29 blocks: a million times that fits.
    let jaccard_ppm = (common_blocks * 1_000_000).checked_div(all).unwrap_or(1_000_000);
    Ok(TraceDiff {
        common_blocks,
        only_a_blocks,
        only_b_blocks,
        jaccard_ppm: u32::try_from(jaccard_ppm).unwrap_or(u32::MAX),
        order_ppm: kendall_ppm(common, common_blocks),
        runs,
    })
}

/// A run of blocks that both traces have, one after another in both.
struct Common {
    rank_a: u64,
    rank_b: u64,
    blocks: u64,
}

/// Kendall's tau of single blocks: 1 - 4 * pairs in other order / (n * (n - 1)).
fn kendall_ppm(mut common: Vec<Common>, blocks: u64) -> Option<i32> {
    let n = u128::from(blocks);
    let pairs_twice = Some(n * n.checked_sub(1)?).filter(|pairs| *pairs > 0)?;
    common.sort_unstable_by_key(|run| run.rank_b);
    let mut by_a: Vec<usize> = (0..common.len()).collect();
    by_a.sort_unstable_by_key(|place_b| common[*place_b].rank_a);
    // In the order of a: every run already taken that comes later in b is in other order, block by block.
    let mut taken = Sums::new(common.len());
    let mut taken_blocks = 0;
    let mut discordant = 0u128;
    for place_b in by_a {
        let blocks = common[place_b].blocks;
        discordant += u128::from(taken_blocks - taken.before(place_b)) * u128::from(blocks);
        taken.add(place_b, blocks);
        taken_blocks += blocks;
    }
    let lost_ppm = (4_000_000 * discordant + pairs_twice / 2) / pairs_twice;
    i32::try_from(lost_ppm).ok().map(|lost_ppm| 1_000_000 - lost_ppm)
}

/// Sums over a prefix of numbers that change: a Fenwick tree.
struct Sums {
    tree: Vec<u64>,
}

impl Sums {
    fn new(len: usize) -> Self {
        Self { tree: vec![0; len + 1] }
    }

    fn add(&mut self, place: usize, number: u64) {
        let mut at = place + 1;
        while let Some(sum) = self.tree.get_mut(at) {
            *sum += number;
            at += at & at.wrapping_neg();
        }
    }

    /// Sum of the numbers before that place.
    fn before(&self, place: usize) -> u64 {
        let mut at = place;
        let mut sum = 0;
        while at > 0 {
            sum += self.tree[at];
            at &= at - 1;
        }
        sum
    }
}
