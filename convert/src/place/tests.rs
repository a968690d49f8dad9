//! Cuts follow files.

use std::collections::HashSet;
use std::num::NonZeroUsize;

use ublkimg_image::{BLOCK_SIZE, CHUNK_BLOCKS, DataBlock, FileData, FileLayout, Kind, Sha256, Space};

use super::{Plan, place};
use crate::chunk_size::ChunkSize;
use crate::frames::{Chunk, Compress};
use crate::layer::{Layer, read_tar};
use crate::spool::Spool;
use crate::tar::builder::TarBuilder;

fn lay_out(tar: TarBuilder) -> (Layer, Spool, Plan) {
    lay_out_in(tar, ChunkSize::MAX)
}

fn lay_out_in(tar: TarBuilder, chunk_size: ChunkSize) -> (Layer, Spool, Plan) {
    let how = Compress { level: 1, threads: NonZeroUsize::MIN };
    let mut spool = Spool::new(&std::env::temp_dir(), chunk_size, how).unwrap();
    let mut layer = read_tar(tar.finish().as_slice(), &mut spool).unwrap();
    let plan = place(&mut layer, &spool).unwrap();
    (layer, spool, plan)
}

fn file(layer: &Layer, path: &str) -> FileData {
    match &layer.tree.node(layer.tree.lookup(path.as_bytes()).unwrap()).kind {
        Kind::File(data) => data.clone(),
        other => panic!("{path} is {other:?}"),
    }
}

fn chunks(spool: &Spool, plan: &Plan) -> Vec<Vec<u8>> {
    let raw = |chunk| match chunk {
        Chunk::Raw(raw) => raw,
        Chunk::Stored { frame, .. } => zstd::bulk::decompress(&frame, CHUNK_BLOCKS as usize * BLOCK_SIZE).unwrap(),
    };
    (0..plan.chunks()).map(|number| raw(plan.read_chunk(number, spool).unwrap())).collect()
}

fn bytes(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 31 + seed * 17 + at / 251) % 255).unwrap() + 1).collect()
}

#[test]
fn every_file_is_where_its_layout_says() {
    let sizes = [1, 4095, 4096, 4097, 65_535, 65_536, 100_000, 131_073, 262_143, 262_144, 262_145, 600_000];
    for chunk_size in ["64K", "128K", "256K"].map(|size| size.parse::<ChunkSize>().unwrap()) {
        let files = sizes.iter().enumerate();
        let tar = files.fold(TarBuilder::default(), |tar, (n, size)| tar.file(&format!("f{n}"), &bytes(n, *size)));
        let (layer, spool, plan) = lay_out_in(tar, chunk_size);
        let chunks = chunks(&spool, &plan);
        assert_eq!(chunks.iter().map(Vec::len).max(), Some(chunk_size.bytes_usize()));
        let raw = chunks.concat();
        assert_eq!(raw.len(), plan.blocks as usize * BLOCK_SIZE);
        for (number, size) in sizes.iter().enumerate() {
            let data = file(&layer, &format!("f{number}"));
            let FileLayout::Contiguous(DataBlock { space: Space::Own, block }) = data.layout else {
                panic!("{data:?}")
            };
            let start = block as usize * BLOCK_SIZE;
            assert_eq!(raw[start..start + size], bytes(number, *size));
            let end = (start + size).next_multiple_of(BLOCK_SIZE);
            assert!(raw[start + size..end].iter().all(|byte| *byte == 0), "the tail of the last block is zero");
        }
    }
}

#[test]
fn holes_take_no_room() {
    let mut holed = vec![0; 600_000];
    holed[300_000] = 1;
    let (layer, _, plan) =
        lay_out(TarBuilder::default().file("zeros", &[0; 600_000]).file("holed", &holed).file("small", &[0; 9]));
    let blocks = |path| match file(&layer, path).layout {
        FileLayout::Chunked { chunk_blocks_log2: 6, blocks } => blocks,
        other => panic!("{other:?}"),
    };
    let own = Some(DataBlock { space: Space::Own, block: 0 });
    assert_eq!((blocks("zeros"), blocks("holed"), blocks("small")), (vec![None; 3], vec![None, own, None], vec![None]));
    assert_eq!((plan.chunks(), plan.blocks), (1, CHUNK_BLOCKS));
}

/// The data of a sparse file begins at any block, so pieces end in the middle of what is read at once.
#[test]
fn sparse_files_are_whole_wherever_their_data_begins() {
    let content = bytes(3, 1_000_010);
    for hole in [4096, 65_536 + 512, 300_000] {
        let (size, map) = ((hole + content.len()).to_string(), format!("{hole},{}", content.len()));
        let pax = [("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", map.as_bytes())];
        let (layer, spool, plan) = lay_out(TarBuilder::default().pax(&pax).file("sparse", &content));
        let raw = chunks(&spool, &plan).concat();
        let data = file(&layer, "sparse");
        let piece_bytes = CHUNK_BLOCKS as usize * BLOCK_SIZE;
        let starts: Vec<Option<usize>> = match data.layout {
            FileLayout::Contiguous(first) => (0..(hole + content.len()).div_ceil(piece_bytes))
                .map(|piece| Some(first.block as usize * BLOCK_SIZE + piece * piece_bytes))
                .collect(),
            FileLayout::Chunked { blocks, .. } => {
                blocks.iter().map(|block| block.map(|block| block.block as usize * BLOCK_SIZE)).collect()
            }
        };
        let mut left = hole + content.len();
        let mut read = Vec::new();
        for start in starts {
            let len = left.min(piece_bytes);
            left -= len;
            read.extend(start.map_or_else(|| vec![0; len], |start| raw[start..start + len].to_vec()));
        }
        assert_eq!(left, 0);
        assert!(read == [vec![0; hole], content.clone()].concat(), "data after a hole of {hole} bytes");
    }
}

#[test]
fn equal_files_share_their_blocks() {
    let tar = TarBuilder::default().file("a", &bytes(1, 5000)).file("b", &bytes(1, 5000)).file("c", &bytes(2, 9));
    let (layer, _, plan) = lay_out(tar);
    assert_eq!(file(&layer, "a"), file(&layer, "b"));
    assert_eq!(plan.blocks, 3);
}

#[test]
fn a_replaced_file_is_not_stored() {
    let (_, _, plan) = lay_out(TarBuilder::default().file("a", &bytes(1, 5000)).file("a", b"x"));
    assert_eq!(plan.blocks, 1);
}

#[test]
fn one_changed_file_changes_one_pack() {
    let archive = |changed: Option<usize>| {
        let mut tar = TarBuilder::default();
        for number in 0..600 {
            let seed = if changed == Some(number) { 9999 } else { number };
            tar = tar.file(&format!("{number:04}"), &bytes(seed, 3000 + number * 7 % 9000));
        }
        let (_, spool, plan) = lay_out(tar.file("large", &bytes(5, 1_000_000)));
        chunks(&spool, &plan)
    };
    let before = archive(None);
    assert!(before.len() > 20, "{} chunks", before.len());
    assert!(before.iter().all(|chunk| chunk.len() <= CHUNK_BLOCKS as usize * BLOCK_SIZE));
    let known: HashSet<Sha256> = before.iter().map(|chunk| Sha256::of(chunk)).collect();
    for changed in [0, 100, 333, 599] {
        let new = archive(Some(changed)).iter().filter(|chunk| !known.contains(&Sha256::of(chunk))).count();
        assert!(new <= 2, "file {changed} changes {new} packs");
    }
}
