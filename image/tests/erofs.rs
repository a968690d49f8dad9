//! The EROFS writer and reader against each other, and the reader against damaged metadata.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use proptest::prelude::*;
use support::{SPACE_BLOCKS, Spaces, slots, tree};
use ublkimg_image::{
    BLOCK_SIZE, DataBlock, DeviceSlot, FileData, FileLayout, Kind, Space, flat_block0, read_geometry, read_tree,
    write_layer, write_merged,
};

const DEVICES: u16 = 30;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layer_reads_back(tree in tree(Spaces::Own, 60)) {
        let metadata = write_layer(&tree, SPACE_BLOCKS).unwrap();
        prop_assert_eq!(&metadata, &write_layer(&tree.clone(), SPACE_BLOCKS).unwrap());
        let (read, geometry) = read_tree(&metadata).unwrap();
        prop_assert_eq!(&read, &tree);
        prop_assert_eq!(geometry.metadata_blocks as usize * BLOCK_SIZE, metadata.len());
        prop_assert_eq!(geometry.total_blocks, geometry.metadata_blocks + SPACE_BLOCKS);
        prop_assert!(geometry.devices.is_empty());
        // The reader numbers its nodes in an order of its own; the bytes do not depend on it.
        prop_assert_eq!(write_layer(&read, SPACE_BLOCKS).unwrap(), metadata);
    }

    #[test]
    fn merged_reads_back(tree in tree(Spaces::Devices(DEVICES), 60)) {
        let slots = slots(DEVICES);
        let metadata = write_merged(&tree, &slots).unwrap();
        let (read, geometry) = read_tree(&metadata).unwrap();
        prop_assert_eq!(&read, &tree);
        prop_assert_eq!(&read_geometry(&metadata).unwrap(), &geometry);
        prop_assert_eq!(write_merged(&read, &slots).unwrap(), metadata);
        let mut mapped_block = geometry.metadata_blocks;
        for (device, slot) in geometry.devices.iter().zip(&slots) {
            prop_assert_eq!((device.blocks, device.tag, device.mapped_block), (slot.blocks, slot.tag, mapped_block));
            mapped_block += slot.blocks;
        }
        prop_assert_eq!(geometry.devices.len(), slots.len());
        prop_assert_eq!(geometry.total_blocks, mapped_block);
    }

    /// As served, a merged image is one file system whose own data are all the devices.
    #[test]
    fn flat_block0_serves_the_same_tree(tree in tree(Spaces::Devices(DEVICES), 30)) {
        let mut metadata = write_merged(&tree, &slots(DEVICES)).unwrap();
        let total = u32::try_from(metadata.len() / BLOCK_SIZE).unwrap() + u32::from(DEVICES) * SPACE_BLOCKS + 256;
        let block0 = flat_block0(metadata.first_chunk().unwrap(), total).unwrap();
        metadata[..BLOCK_SIZE].copy_from_slice(&block0);
        let (flat, geometry) = read_tree(&metadata).unwrap();
        prop_assert_eq!(geometry.total_blocks, total);
        let mut expected = tree.clone();
        let unify = |block: &mut DataBlock| {
            if let Space::Device(device) = block.space {
                *block = DataBlock { space: Space::Own, block: u32::from(device) * SPACE_BLOCKS + block.block };
            }
        };
        let ids: Vec<_> = expected.iter().map(|(id, _)| id).collect();
        for id in ids {
            match &mut expected.node_mut(id).kind {
                Kind::File(FileData { layout: FileLayout::Contiguous(block), .. }) => unify(block),
                Kind::File(FileData { layout: FileLayout::Chunked { blocks, .. }, .. }) => {
                    blocks.iter_mut().flatten().for_each(unify);
                }
                _ => {}
            }
        }
        prop_assert_eq!(flat, expected);
        prop_assert_eq!(flat_block0(&block0, total).unwrap(), block0);
    }
}

/// Damages metadata and repairs the checksum of the superblock, which would stop most damage before it is seen.
fn damage(metadata: &mut [u8], changes: &[(prop::sample::Index, u8)], keep_superblock: bool) {
    for (at, value) in changes {
        let at = at.index(metadata.len());
        if !(keep_superblock && at < BLOCK_SIZE) {
            metadata[at] = *value;
        }
    }
    metadata[1028..1032].fill(0);
    let sum = !crc32c::crc32c(&metadata[1024..BLOCK_SIZE]);
    metadata[1028..1032].copy_from_slice(&sum.to_le_bytes());
}

fn damages() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    let value = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(1), Just(2)];
    prop::collection::vec((any::<prop::sample::Index>(), value), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the reader takes can be written again and means the same.
    #[test]
    fn damaged_layer_is_refused_or_sound(tree in tree(Spaces::Own, 12), changes in damages()) {
        let mut metadata = write_layer(&tree, SPACE_BLOCKS).unwrap();
        damage(&mut metadata, &changes, false);
        if let Ok((read, geometry)) = read_tree(&metadata) {
            let data_blocks = geometry.total_blocks - geometry.metadata_blocks;
            let again = write_layer(&read, data_blocks).unwrap();
            prop_assert_eq!(read_tree(&again).unwrap().0, read);
        }
    }

    #[test]
    fn damaged_merged_is_refused_or_sound(tree in tree(Spaces::Devices(3), 12), changes in damages()) {
        let mut metadata = write_merged(&tree, &slots(3)).unwrap();
        damage(&mut metadata, &changes, true);
        if let Ok((read, geometry)) = read_tree(&metadata) {
            let slots: Vec<_> =
                geometry.devices.iter().map(|device| DeviceSlot { blocks: device.blocks, tag: device.tag }).collect();
            prop_assert_eq!(read_tree(&write_merged(&read, &slots).unwrap()).unwrap().0, read);
        }
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..10_000)) {
        prop_assert!(read_tree(&bytes).is_err());
    }
}
