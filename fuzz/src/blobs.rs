//! What travels in the skippable frames of blobs.

use ublkimg_image::chunk_index::MAX_STORED_CHUNK_BYTES;
use ublkimg_image::merge_record::LowerLink;
use ublkimg_image::{
    Bundle, BundledLayer, CHUNK_BYTES, ChunkId, ChunkIndex, ChunkIndexBuilder, MAX_BLOCKS, MAX_DEVICES, MergeRecord,
};

use crate::sample;

/// An index, where it starts in its blob (u64) before it.
pub(crate) fn chunk_index(data: &[u8]) {
    let Some((offset, payload)) = data.split_first_chunk::<8>() else {
        return;
    };
    let Ok(index) = ChunkIndex::decode(payload, u64::from_le_bytes(*offset)) else {
        return;
    };
    check_index(&index);
    assert_eq!(index.encode(), payload);
}

fn check_index(index: &ChunkIndex) {
    assert!(index.raw_len_blocks() <= MAX_BLOCKS);
    for chunk in index.iter() {
        assert!((1..=MAX_STORED_CHUNK_BYTES).contains(&(chunk.stored.end - chunk.stored.start)));
        assert!((1..=CHUNK_BYTES).contains(&(chunk.raw.end - chunk.raw.start)));
        assert_eq!((index.find(chunk.raw.start), index.find(chunk.raw.end - 1)), (chunk.index, chunk.index));
    }
}

pub(crate) fn bundle(data: &[u8]) {
    let Ok(bundle) = Bundle::decode(data) else {
        return;
    };
    assert!(bundle.layers.len() <= MAX_DEVICES);
    for layer in &bundle.layers {
        check_index(&layer.index);
        assert!(layer.index.section_offset_bytes() < layer.blob_len_bytes);
    }
    assert_eq!(bundle.encode().expect("what was decoded"), data);
}

pub(crate) fn merge_record(data: &[u8]) {
    let Ok(record) = MergeRecord::decode(data) else {
        return;
    };
    assert!((1..=MAX_BLOCKS).contains(&record.metadata_blocks));
    assert_eq!(record.encode().expect("what was decoded"), data);
}

fn index(chunks: u8) -> ChunkIndex {
    let mut builder = ChunkIndexBuilder::new(24);
    for number in 0..chunks {
        let raw_len = (1 + u64::from(number) % 64) * 4096;
        builder.push(100 + u64::from(number), raw_len, ChunkId(sample::blob(number))).expect("a good chunk");
    }
    builder.finish()
}

pub(crate) fn chunk_index_seeds() -> Vec<Vec<u8>> {
    let seed = |chunks| {
        let index = index(chunks);
        [&index.section_offset_bytes().to_le_bytes()[..], &index.encode()].concat()
    };
    [0, 1, 2, 20].map(seed).into()
}

pub(crate) fn bundle_seeds() -> Vec<Vec<u8>> {
    let layer = |chunks: u8| {
        let index = index(chunks);
        let blob_len_bytes = index.section_offset_bytes() + 8 + index.encode().len() as u64;
        BundledLayer { digest: sample::blob(chunks), blob_len_bytes, index }
    };
    let bundle = |layers: u8| Bundle { layers: (0..layers).map(layer).collect() };
    [0, 1, 4].map(|layers| bundle(layers).encode().expect("good")).into()
}

pub(crate) fn merge_record_seeds() -> Vec<Vec<u8>> {
    let plain = MergeRecord { metadata_blocks: 3, ..MergeRecord::default() };
    let link = LowerLink { path: b"usr/bin/new".to_vec(), target: b"usr/bin/old".to_vec() };
    let full = MergeRecord {
        implied_directories: vec![Vec::new(), b"usr".to_vec(), b"usr/bin".to_vec()],
        lower_links: vec![link],
        plain_devices: vec![b"dev/zero".to_vec()],
        ..plain.clone()
    };
    [plain.clone(), full].map(|record| record.encode().expect("good")).into()
}
