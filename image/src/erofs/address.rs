//! Between data blocks as trees name them and block addresses as inodes store them.

use std::ops::Range;

use crate::MAX_BLOCKS;
use crate::tree::{DataBlock, Space};

/// Where the data of an image lies in its address space, after the metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AddressSpace {
    /// In one area of its own.
    Own(Range<u32>),
    /// On devices, one after another.
    Devices(Vec<Range<u32>>),
}

impl AddressSpace {
    /// `None` if there are more blocks than addresses.
    pub(super) fn own(metadata_blocks: u32, data_blocks: u32) -> Option<Self> {
        let end = metadata_blocks.checked_add(data_blocks).filter(|end| *end <= MAX_BLOCKS)?;
        Some(Self::Own(metadata_blocks..end))
    }

    /// `None` if there are more blocks than addresses.
    pub(super) fn devices(metadata_blocks: u32, lengths: impl Iterator<Item = u32>) -> Option<Self> {
        let mut start = metadata_blocks;
        let ranges = lengths.map(|blocks| {
            let end = start.checked_add(blocks).filter(|end| *end <= MAX_BLOCKS)?;
            Some(std::mem::replace(&mut start, end)..end)
        });
        Some(Self::Devices(ranges.collect::<Option<_>>()?))
    }

    /// First address after all data; `metadata_blocks` if there is none.
    pub(super) fn end(&self, metadata_blocks: u32) -> u32 {
        match self {
            Self::Own(range) => range.end,
            Self::Devices(ranges) => ranges.last().map_or(metadata_blocks, |range| range.end),
        }
    }

    /// The address of a run of data blocks; `None` if it is not inside of its space.
    pub(super) fn address(&self, first: DataBlock, len_blocks: u64) -> Option<u32> {
        let range = match (self, first.space) {
            (Self::Own(range), Space::Own) => range,
            (Self::Devices(ranges), Space::Device(device)) => ranges.get(usize::from(device))?,
            _ => return None,
        };
        let address = range.start.checked_add(first.block)?;
        fits(range, address, len_blocks).then_some(address)
    }

    /// The data block at an address; `None` if a run of that length is not all data of one space.
    pub(super) fn data_block(&self, address: u32, len_blocks: u64) -> Option<DataBlock> {
        let (space, range) = match self {
            Self::Own(range) => (Space::Own, range),
            Self::Devices(ranges) => {
                let device = ranges.partition_point(|range| range.end <= address);
                (Space::Device(u16::try_from(device).ok()?), ranges.get(device)?)
            }
        };
        let block = address.checked_sub(range.start)?;
        fits(range, address, len_blocks).then_some(DataBlock { space, block })
    }
}

fn fits(range: &Range<u32>, address: u32, len_blocks: u64) -> bool {
    len_blocks <= u64::from(range.end.saturating_sub(address))
}
