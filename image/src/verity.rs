//! dm-verity hash trees (format 1 of the kernel, admin-guide/device-mapper/verity) over the blocks of a device.
//!
//! The kernel's verity target checks every block that it reads below a file system against a tree of digests, whose root
//! it is given. The digest of a block is SHA-256 of salt and block. Level 0 holds the digests of all data blocks in order,
//! 128 to a block of 4 KiB; each level above those of the blocks of the level below it, until one block is left, whose
//! digest is the root. Rests of blocks are zeros. Stored, the levels follow one another from the top down.
//!
//! [`TreeHasher`] makes a tree in one pass with a block of each level in memory: a block is handed out when it is full.

use sha2::Digest as _;

use crate::{BLOCK_SIZE, Sha256};

/// The tag of the tree's slot in a device table: the digest of its blob, as other slots have it, would depend on itself.
pub const TREE_TAG: Sha256 = Sha256([0; 32]);

/// Digests in a block.
const PER_BLOCK: u32 = 128;

/// Where the levels of a tree lie in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeShape {
    /// First block of each level, from level 0.
    starts: Vec<u32>,
    total_blocks: u32,
}

impl TreeShape {
    /// The tree over a device of so many blocks.
    pub fn new(data_blocks: u32) -> Self {
        let mut lengths = vec![data_blocks.div_ceil(PER_BLOCK)];
        while let Some(&last) = lengths.last().filter(|last| **last > 1) {
            lengths.push(last.div_ceil(PER_BLOCK));
        }
        let mut total_blocks = 0;
        let mut starts = Vec::with_capacity(lengths.len());
        for length in lengths.iter().rev() {
            starts.push(total_blocks);
            // A tree has less than a hundredth of the blocks below it.
            total_blocks += length;
        }
        starts.reverse();
        Self { starts, total_blocks }
    }

    /// Length of the tree.
    pub fn total_blocks(&self) -> u32 {
        self.total_blocks
    }
}

/// The blocks of one level that were not handed out yet.
#[derive(Debug)]
struct Level {
    /// Where the block under way goes in the tree.
    place: u32,
    block: Vec<u8>,
}

/// Makes a tree: see the module.
#[derive(Debug)]
pub struct TreeHasher {
    salted: sha2::Sha256,
    levels: Vec<Level>,
}

impl TreeHasher {
    /// For a device of the length that `shape` was made for.
    pub fn new(shape: &TreeShape, salt: Sha256) -> Self {
        let level = |start: &u32| Level { place: *start, block: Vec::with_capacity(BLOCK_SIZE) };
        Self { salted: sha2::Sha256::new_with_prefix(salt.0), levels: shape.starts.iter().map(level).collect() }
    }

    /// The next block of the device. `put` takes blocks of the tree with their place in it, in no order.
    ///
    /// # Errors
    /// Those of `put`.
    ///
    /// # Panics
    /// With more blocks than the shape is for, by far.
    pub fn push<E>(&mut self, block: &[u8], put: &mut impl FnMut(u32, &[u8]) -> Result<(), E>) -> Result<(), E> {
        self.push_at(0, self.digest(block), put)
    }

    /// The end of the device: hands out what is left, and tells the root.
    ///
    /// # Errors
    /// Those of `put`.
    pub fn finish<E>(mut self, put: &mut impl FnMut(u32, &[u8]) -> Result<(), E>) -> Result<Sha256, E> {
        let mut root = Sha256([0; 32]);
        for level in 0..self.levels.len() {
            if let Some(digest) = self.hand_out(level, put)? {
                root = digest;
                if level + 1 < self.levels.len() {
                    self.push_at(level + 1, digest, put)?;
                }
            }
        }
        Ok(root)
    }

    fn push_at<E>(
        &mut self,
        level: usize,
        digest: Sha256,
        put: &mut impl FnMut(u32, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        // A full block is handed out when its level goes on: the last one is left to the end.
        if self.levels[level].block.len() == BLOCK_SIZE
            && let Some(full) = self.hand_out(level, put)?
        {
            self.push_at(level + 1, full, put)?;
        }
        self.levels[level].block.extend_from_slice(&digest.0);
        Ok(())
    }

    /// Hands the block of a level out, filled up with zeros; its digest. None without one.
    fn hand_out<E>(
        &mut self,
        level: usize,
        put: &mut impl FnMut(u32, &[u8]) -> Result<(), E>,
    ) -> Result<Option<Sha256>, E> {
        let mut block = std::mem::take(&mut self.levels[level].block);
        if block.is_empty() {
            return Ok(None);
        }
        block.resize(BLOCK_SIZE, 0);
        put(self.levels[level].place, &block)?;
        let digest = self.digest(&block);
        self.levels[level].place += 1;
        block.clear();
        self.levels[level].block = block;
        Ok(Some(digest))
    }

    fn digest(&self, block: &[u8]) -> Sha256 {
        let mut hasher = self.salted.clone();
        hasher.update(block);
        Sha256(hasher.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree as the kernel's documentation says it, level by level.
    fn naive(device: &[u8], salt: Sha256) -> (Vec<u8>, Sha256) {
        let digest = |block: &[u8]| Sha256::of(&[&salt.0, block].concat());
        let (mut tree, mut below) = (Vec::new(), device.to_vec());
        loop {
            let mut level: Vec<u8> = below.chunks(BLOCK_SIZE).flat_map(|block| digest(block).0).collect();
            level.resize(level.len().next_multiple_of(BLOCK_SIZE), 0);
            tree = [level.clone(), tree].concat();
            if level.len() == BLOCK_SIZE {
                return (tree, digest(&level));
            }
            below = level;
        }
    }

    fn made(device: &[u8], salt: Sha256) -> (Vec<u8>, Sha256) {
        let shape = TreeShape::new(u32::try_from(device.len() / BLOCK_SIZE).unwrap());
        let mut tree = vec![0xEE; shape.total_blocks() as usize * BLOCK_SIZE];
        let mut put = |place: u32, block: &[u8]| {
            tree[place as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(block);
            Ok::<_, ()>(())
        };
        let mut hasher = TreeHasher::new(&shape, salt);
        for block in device.chunks(BLOCK_SIZE) {
            hasher.push(block, &mut put).unwrap();
        }
        let root = hasher.finish(&mut put).unwrap();
        (tree, root)
    }

    #[test]
    fn trees_of_all_heights_are_those_of_the_documentation() {
        let salt = Sha256::of(b"salt");
        for blocks in [1, 2, 127, 128, 129, 255, 256, 257, 128 * 128 - 1, 128 * 128, 128 * 128 + 1] {
            let device: Vec<u8> =
                (0..blocks * BLOCK_SIZE).map(|at| (at / 4000).to_le_bytes()[0] ^ at.to_le_bytes()[0]).collect();
            assert!(made(&device, salt) == naive(&device, salt), "{blocks} blocks");
        }
    }

    #[test]
    fn a_tree_of_veritysetup() {
        // veritysetup format --salt=00..1f (32 bytes) of 300 blocks, block n filled with n as a byte.
        let salt = Sha256(std::array::from_fn(|at| u8::try_from(at).unwrap()));
        let device: Vec<u8> = (0..300_usize).flat_map(|block| vec![block.to_le_bytes()[0]; BLOCK_SIZE]).collect();
        assert_eq!(TreeShape::new(300).total_blocks(), 1 + 3);
        let (_, root) = made(&device, salt);
        assert_eq!(root.to_string(), "sha256:c382722c1ecf53fb069ad2c8daf053944e8583184cd65423f47418e4d5ab59ee");
    }

    #[test]
    fn the_longest_device() {
        let blocks = TreeShape::new(crate::MAX_BLOCKS).total_blocks();
        assert_eq!(blocks, 33_554_432 + 262_144 + 2048 + 16 + 1);
    }
}
