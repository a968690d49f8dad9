//! Which blob a block of the assembled device comes from: metadata first, then the layer blobs one after another, then
//! zeros that belong to no blob.

use crate::{Error, MAX_BLOCKS, Result};

const PART: &str = "device map";

/// Blocks of zeros at the end of every device: 1 MiB. Programs probe the end of a block device for backup superblocks
/// and RAID metadata; they find zeros there and need no network.
pub const TAIL_BLOCKS: u32 = 256;

/// The layout of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMap {
    /// Start of each blob, then the end of the last one. The first is the length of the metadata.
    starts: Vec<u32>,
    total_blocks: u32,
}

/// A run of device blocks with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First block on the device.
    pub device_block: u32,
    /// Number of blocks, at least 1.
    pub len_blocks: u32,
    /// Where they come from.
    pub target: Target,
}

/// The source of device blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The metadata image, from this block on.
    Metadata {
        /// Block in the metadata image.
        block: u32,
    },
    /// The raw stream of a layer blob, from this block on.
    Blob {
        /// Place of the blob in the device table.
        index: u16,
        /// Block in the raw stream of the blob.
        block: u32,
    },
    /// Zeros.
    Zero,
}

impl DeviceMap {
    /// Lays out a device. `blob_blocks` are the raw lengths of the layer blobs in the order of the device table.
    ///
    /// # Errors
    /// `TooLarge` if the device gets more than [`MAX_BLOCKS`] blocks or 65536 blobs; `Invalid` without metadata.
    pub fn new(metadata_blocks: u32, blob_blocks: &[u32]) -> Result<Self> {
        if metadata_blocks == 0 {
            return Err(Error::invalid(PART, "no metadata"));
        }
        if blob_blocks.len() > usize::from(u16::MAX) {
            return Err(Error::too_large(PART, format!("{} blobs", blob_blocks.len())));
        }
        let too_large = || Error::too_large(PART, format!("more than {MAX_BLOCKS} blocks"));
        let mut starts = Vec::with_capacity(blob_blocks.len() + 1);
        let mut end = metadata_blocks;
        starts.push(end);
        for blocks in blob_blocks {
            end = end.checked_add(*blocks).ok_or_else(too_large)?;
            starts.push(end);
        }
        let total = end.checked_add(TAIL_BLOCKS).filter(|total| *total <= MAX_BLOCKS);
        Ok(Self { starts, total_blocks: total.ok_or_else(too_large)? })
    }

    /// Length of the device: metadata, blobs and [`TAIL_BLOCKS`] of zeros.
    pub fn total_blocks(&self) -> u32 {
        self.total_blocks
    }

    /// Where the first `count` blobs end; all of them, if there are fewer.
    pub fn end_of(&self, count: usize) -> u32 {
        self.starts[count.min(self.blobs())]
    }

    /// Length of the metadata: the blobs start after it.
    pub fn metadata_blocks(&self) -> u32 {
        self.starts[0]
    }

    /// Number of blobs.
    pub fn blobs(&self) -> usize {
        self.starts.len() - 1
    }

    /// Device block where a blob starts (its `mapped_blkaddr`).
    ///
    /// # Panics
    /// If there is no such blob.
    pub fn blob_start(&self, index: u16) -> u32 {
        assert!(usize::from(index) < self.blobs(), "blob {index} of {}", self.blobs());
        self.starts[usize::from(index)]
    }

    /// The sources of a range of device blocks, in order. What lies past the end of the device is left out.
    pub fn segments(&self, start_block: u32, len_blocks: u32) -> impl Iterator<Item = Segment> + '_ {
        let end = start_block.saturating_add(len_blocks).min(self.total_blocks);
        let mut at = start_block;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (target, target_end) = self.locate(at);
            let segment = Segment { device_block: at, len_blocks: target_end.min(end) - at, target };
            at += segment.len_blocks;
            Some(segment)
        })
    }

    /// The source of a block of the device, and the device block where that source ends.
    fn locate(&self, block: u32) -> (Target, u32) {
        // Number of starts that are not after the block: 0 = metadata, n = blob n - 1, all = zeros. Of blobs without
        // blocks, which share a start with their successor, only the last is ever found, so runs are never empty.
        match self.starts.partition_point(|start| *start <= block) {
            0 => (Target::Metadata { block }, self.starts[0]),
            found if found == self.starts.len() => (Target::Zero, self.total_blocks),
            found => {
                let index = u16::try_from(found - 1).expect("new() refuses more than 65535 blobs");
                (Target::Blob { index, block: block - self.starts[found - 1] }, self.starts[found])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The source of every block, one by one.
    fn naive(metadata_blocks: u32, blob_blocks: &[u32]) -> Vec<Target> {
        let metadata = (0..metadata_blocks).map(|block| Target::Metadata { block });
        let blobs = (0..)
            .zip(blob_blocks)
            .flat_map(|(index, blocks)| (0..*blocks).map(move |block| Target::Blob { index, block }));
        metadata.chain(blobs).chain((0..TAIL_BLOCKS).map(|_| Target::Zero)).collect()
    }

    /// The source of each block of a segment.
    fn blocks_of(segment: Segment) -> impl Iterator<Item = Target> {
        (0..segment.len_blocks).map(move |offset| match segment.target {
            Target::Metadata { block } => Target::Metadata { block: block + offset },
            Target::Blob { index, block } => Target::Blob { index, block: block + offset },
            Target::Zero => Target::Zero,
        })
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_blocks(
            metadata_blocks in 1u32..20,
            blob_blocks in prop::collection::vec(0u32..30, 0..8),
            start in 0u32..600,
            len in 0u32..600,
        ) {
            let map = DeviceMap::new(metadata_blocks, &blob_blocks).unwrap();
            let expected = naive(metadata_blocks, &blob_blocks);
            prop_assert_eq!(map.total_blocks() as usize, expected.len());
            let segments: Vec<_> = map.segments(start, len).collect();
            let mut at = start;
            for segment in &segments {
                prop_assert!(segment.len_blocks > 0);
                prop_assert_eq!(segment.device_block, at);
                at += segment.len_blocks;
            }
            let found: Vec<_> = segments.into_iter().flat_map(blocks_of).collect();
            let range = (start as usize).min(expected.len())..(start as usize + len as usize).min(expected.len());
            prop_assert_eq!(&found[..], &expected[range]);
            prop_assert_eq!(map.end_of(blob_blocks.len()) + TAIL_BLOCKS, map.total_blocks());
            for (index, start) in (0..).zip(0..blob_blocks.len()) {
                let sum: u32 = blob_blocks[..start].iter().sum();
                prop_assert_eq!(map.blob_start(index), metadata_blocks + sum);
                prop_assert_eq!(map.end_of(start), metadata_blocks + sum);
            }
        }
    }

    #[test]
    fn limits() {
        assert_eq!(DeviceMap::new(0, &[1]).unwrap_err().kind(), crate::ErrorKind::Invalid);
        assert_eq!(DeviceMap::new(1, &[u32::MAX]).unwrap_err().kind(), crate::ErrorKind::TooLarge);
        assert_eq!(DeviceMap::new(1, &[MAX_BLOCKS - TAIL_BLOCKS]).unwrap_err().kind(), crate::ErrorKind::TooLarge);
        let map = DeviceMap::new(1, &[MAX_BLOCKS - TAIL_BLOCKS - 1]).unwrap();
        assert_eq!(map.total_blocks(), MAX_BLOCKS);
        let lengths: Vec<_> = map.segments(0, u32::MAX).map(|segment| segment.len_blocks).collect();
        assert_eq!(lengths, [1, MAX_BLOCKS - TAIL_BLOCKS - 1, TAIL_BLOCKS]);
        assert_eq!(map.segments(u32::MAX, u32::MAX).next(), None);
    }
}
