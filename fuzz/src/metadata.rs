//! EROFS metadata, the map of its files, and lists of paths in it.

use std::sync::OnceLock;

use ublkimg_image::trace::{FileMap, from_paths};
use ublkimg_image::tree::Space;
use ublkimg_image::{
    BLOCK_SIZE, Geometry, MAX_BLOCKS, Node, Trace, TraceEntry, TraceHeader, Tree, flat_block0, read_geometry,
    read_tree, write_layer,
};

use crate::sample;

/// The superblock's checksum is where, and what it covers.
const CHECKSUM_AT: usize = 1028;
const COVERED_FROM: usize = 1024;

pub(crate) fn erofs(data: &[u8]) {
    let mut metadata = data.to_vec();
    metadata.truncate(data.len() / BLOCK_SIZE * BLOCK_SIZE);
    if metadata.is_empty() {
        return;
    }
    // Else hardly any changed image would be read.
    metadata[CHECKSUM_AT..CHECKSUM_AT + 4].fill(0);
    let checksum = !crc32c::crc32c(&metadata[COVERED_FROM..BLOCK_SIZE]);
    metadata[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());

    let head = read_geometry(&metadata);
    let Ok((tree, geometry)) = read_tree(&metadata) else {
        return;
    };
    assert_eq!(head.as_ref(), Ok(&geometry));
    assert_eq!(geometry.metadata_blocks as usize * BLOCK_SIZE, metadata.len());
    assert!(geometry.total_blocks <= MAX_BLOCKS);
    // An inode has 64 bytes; a node of a tree has some more.
    assert!(tree.len() <= metadata.len() / 64 + 1);
    assert!(size_of::<Node>() <= 256);
    if let Some(block0) = metadata.first_chunk::<BLOCK_SIZE>() {
        assert!(flat_block0(block0, geometry.total_blocks).is_ok());
    }
    check_file_map(&tree, &geometry);
}

/// A trace over the front of each device: all of its blocks are counted once.
fn check_file_map(tree: &Tree, geometry: &Geometry) {
    let map = FileMap::new(tree, geometry);
    let (blobs, _) = ublkimg_image::trace::distinct_blobs(geometry.devices.iter().map(|device| device.tag));
    let header = TraceHeader { blobs, ..sample::trace(0).header };
    let entry = |(blob, _)| TraceEntry { blob, block: 0, blocks: 256, since_previous_us: 0, confidence: 255 };
    let entries = (0..).zip(&header.blobs).map(entry).collect();
    let trace = Trace { header, entries };
    let usage = map.usage(&trace);
    let of_files: u64 = usage.files.iter().map(|file| file.touched_blocks).sum();
    assert_eq!((of_files + usage.other_blocks, usage.unknown_blocks), (trace.blocks(), 0));
    for file in usage.files.iter().take(8) {
        assert!(tree.lookup(&map.path(file.file)).is_some());
    }
    for blob in trace.header.blobs.iter().take(4) {
        for block in [0, 10, 20, 100, 255] {
            assert!(map.file_of(*blob, block).is_none_or(|(_, offset)| offset < 1 << 44));
        }
    }
}

pub(crate) fn path_list(data: &[u8]) {
    static IMAGE: OnceLock<(Tree, Geometry)> = OnceLock::new();
    let (tree, geometry) = IMAGE.get_or_init(|| read_tree(&sample::merged_metadata()).expect("a good image"));
    let list = String::from_utf8_lossy(data);
    let found = from_paths(&list, tree, geometry, sample::blob(9), Vec::new()).expect("few entries");
    assert!(found.skipped.len() <= list.lines().count());
    assert!(found.trace.blocks() <= 2 * u64::from(sample::DEVICE_BLOCKS));
    assert!(found.trace.encode().is_ok());
}

pub(crate) fn erofs_seeds() -> Vec<Vec<u8>> {
    let layer = write_layer(&sample::tree(|_| Space::Own), sample::DEVICE_BLOCKS).expect("a good tree");
    vec![sample::merged_metadata(), layer]
}

pub(crate) fn path_list_seeds() -> Vec<Vec<u8>> {
    let lists = [
        "# first\n\n/bin/sh\nlib/big:4097-4096\n  lib/odd:0-4096\n",
        "bin/link:0-4096\nbin/link\nbin/loop\nlib/absolute/sh\n/lib/../bin/./same\nlib/hard",
        "bin\nbin/none\nbin/sh/x\nbin/sh:10000-1\nlib/empty:0-0\nlib/pipe\n18446744073709551616:1-18446744073709551615",
    ];
    lists.map(|list| list.as_bytes().to_vec()).into()
}
