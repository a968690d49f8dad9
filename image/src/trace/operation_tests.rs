//! Operations on traces, against plain lists of blocks.
#![allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "small numbers of test code")]

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::tests::{blob, entries, header, trace};
use super::*;
use crate::tree::{DataBlock, FileData, FileLayout, Kind, Meta, Node, NodeId, Space};
use crate::{DeviceSlot, Geometry, Tree, read_tree, write_merged};

/// All blocks of a trace, by blob digest.
fn blocks(trace: &Trace) -> Vec<(Sha256, u32)> {
    trace.traced_blocks().map(|block| (trace.header.blobs[usize::from(block.blob)], block.block)).collect()
}

/// Several runs of the same command.
fn runs() -> impl Strategy<Value = Vec<Trace>> {
    let several = prop::collection::vec((entries(3), 1..4u32), 1..5);
    (header(3), several).prop_map(|(header, several)| {
        let trace = |(entries, runs): (Vec<TraceEntry>, u32)| Trace {
            header: TraceHeader { runs, ..header.clone() },
            entries: coalesce(entries),
        };
        several.into_iter().map(trace).collect()
    })
}

proptest! {
    #[test]
    fn merging_keeps_every_block_with_its_share_of_runs(runs in runs()) {
        let merged = merge(&runs, false).unwrap();
        prop_assert_eq!(Trace::decode(&merged.encode().unwrap()), Ok(merged.clone()));
        let all: u64 = runs.iter().map(|run| u64::from(run.header.runs)).sum();
        prop_assert_eq!(u64::from(merged.header.runs), all);
        let mut votes: HashMap<_, u64> = HashMap::new();
        for run in &runs {
            for block in run.traced_blocks() {
                *votes.entry((block.blob, block.block)).or_default() +=
                    u64::from(block.confidence) * u64::from(run.header.runs);
            }
        }
        prop_assert_eq!(merged.blocks(), votes.len() as u64);
        for block in merged.traced_blocks() {
            let expected = ((2 * votes[&(block.blob, block.block)] + all) / (2 * all)).max(1);
            prop_assert_eq!(u64::from(block.confidence), expected);
        }
    }

    #[test]
    fn the_order_of_runs_does_not_matter(runs in runs(), places in any::<u64>()) {
        let mut shuffled = runs.clone();
        for at in 1..shuffled.len() {
            shuffled.swap(at, (places >> (8 * at)) as usize % (at + 1));
        }
        prop_assert_eq!(merge(&runs, false).unwrap(), merge(&shuffled, false).unwrap());
    }

    #[test]
    fn merging_one_run_many_times_keeps_its_order(run in trace(), times in 1..4usize) {
        let run = Trace { header: TraceHeader { runs: 1, ..run.header }, ..run };
        let merged = merge(&vec![run.clone(); times], false).unwrap();
        prop_assert_eq!(blocks(&merged), blocks(&run));
        prop_assert_eq!(merged.header.ready_us, run.header.ready_us);
        let times_of = |trace: &Trace| trace.traced_blocks().map(|block| block.due_us).collect::<Vec<_>>();
        for (merged, run) in times_of(&merged).into_iter().zip(times_of(&run)) {
            prop_assert!(merged <= run && run - merged <= COALESCE_GAP_US);
        }
    }

    /// Against all pairs of blocks.
    #[test]
    fn diff_counts_blocks_and_pairs(a in trace(), b in trace()) {
        let of_a: Vec<_> = blocks(&a).into_iter().filter(|(_, block)| block % 3 == 0 || *block < 40).collect();
        prop_assume!(of_a.len() < 400);
        let a = of_blocks(&a, &of_a);
        let (in_a, in_b) = (blocks(&a), blocks(&b));
        let rank_b: HashMap<_, _> = in_b.iter().enumerate().map(|(rank, block)| (*block, rank)).collect();
        let common: Vec<_> = in_a.iter().filter_map(|block| rank_b.get(block)).collect();
        let result = diff(&a, &b).unwrap();
        prop_assert_eq!(result.common_blocks, common.len() as u64);
        prop_assert_eq!(result.only_a_blocks, (in_a.len() - common.len()) as u64);
        prop_assert_eq!(result.only_b_blocks, (in_b.len() - common.len()) as u64);
        let total = |side| result.runs.iter().filter(|run| run.side == side).map(|run| u64::from(run.blocks)).sum::<u64>();
        prop_assert_eq!(total(DiffSide::Both), result.common_blocks);
        prop_assert_eq!(total(DiffSide::OnlyA), result.only_a_blocks);
        prop_assert_eq!(total(DiffSide::OnlyB), result.only_b_blocks);
        let mut discordant = 0i64;
        for (at, first) in common.iter().enumerate() {
            discordant += common[at + 1..].iter().filter(|second| second < &first).count() as i64;
        }
        let pairs_twice = (common.len() * common.len().saturating_sub(1)) as i64;
        let expected = (pairs_twice > 0).then(|| 1_000_000 - (4_000_000 * discordant + pairs_twice / 2) / pairs_twice);
        prop_assert_eq!(result.order_ppm.map(i64::from), expected);
    }

    #[test]
    fn a_trace_is_like_itself_and_unlike_its_reverse(trace in trace()) {
        prop_assume!(trace.blocks() > 1);
        let same = diff(&trace, &trace).unwrap();
        prop_assert_eq!((same.jaccard_ppm, same.order_ppm), (1_000_000, Some(1_000_000)));
        let mut reverse = blocks(&trace);
        reverse.reverse();
        let reverse = diff(&trace, &of_blocks(&trace, &reverse)).unwrap();
        prop_assert_eq!((reverse.jaccard_ppm, reverse.order_ppm), (1_000_000, Some(-1_000_000)));
    }
}

/// These blocks as single entries, with the header of `like`.
fn of_blocks(like: &Trace, blocks: &[(Sha256, u32)]) -> Trace {
    let number = |digest| like.header.blobs.iter().position(|blob| *blob == digest).unwrap() as u16;
    let entry = |(digest, block): &(Sha256, u32)| TraceEntry {
        blob: number(*digest),
        block: *block,
        blocks: 1,
        since_previous_us: 1,
        confidence: 255,
    };
    Trace { header: like.header.clone(), entries: blocks.iter().map(entry).collect() }
}

fn one_block_each(blocks: &[u32]) -> Trace {
    let header = TraceHeader {
        manifest: Sha256::of(b"image"),
        command: vec!["run".to_owned()],
        read_ahead_kb: 0,
        runs: 1,
        ready_us: Some(1000),
        lost: 0,
        blobs: vec![blob(0)],
    };
    let blocks: Vec<_> = blocks.iter().map(|block| (blob(0), *block)).collect();
    let like = Trace { header, entries: Vec::new() };
    of_blocks(&like, &blocks)
}

#[test]
fn a_block_goes_where_most_runs_have_it() {
    let runs = [&[1, 3, 5, 7, 9][..], &[1, 3, 5, 7, 9], &[9, 1, 3, 5, 7]].map(one_block_each);
    let merged = merge(&runs, false).unwrap();
    assert_eq!(merged.traced_blocks().map(|block| block.block).collect::<Vec<_>>(), [1, 3, 5, 7, 9]);
    assert_eq!((merged.header.runs, merged.header.ready_us), (3, Some(1000)));
    assert!(merged.entries.iter().all(|entry| entry.confidence == 255));
}

#[test]
fn what_differs_is_not_merged_unless_forced() {
    let first = one_block_each(&[1, 3]);
    let mut other = one_block_each(&[3, 5]);
    other.header.command = vec!["walk".to_owned()];
    assert!(matches!(merge(&[first.clone(), other.clone()], false), Err(MergeError::Commands { .. })));
    let mut image = one_block_each(&[3, 5]);
    image.header.manifest = Sha256::of(b"another image");
    assert!(matches!(merge(&[first.clone(), image], false), Err(MergeError::Images { .. })));
    let mut read_ahead = one_block_each(&[3, 5]);
    read_ahead.header.read_ahead_kb = 128;
    assert!(matches!(merge(&[first.clone(), read_ahead], false), Err(MergeError::ReadAhead { first: 0, other: 128 })));
    assert_eq!(merge(&[], true), Err(MergeError::Empty));

    // An image that shares a layer: its blobs are in other places.
    other.header.manifest = Sha256::of(b"another image");
    other.header.blobs = vec![blob(7), blob(0)];
    other.entries[0].blob = 1;
    let merged = merge(&[first.clone(), other], true).unwrap();
    assert_eq!((&merged.header.command, merged.header.manifest), (&first.header.command, first.header.manifest));
    assert_eq!(merged.header.blobs, [blob(0), blob(7)]);
    let confidence: HashMap<_, _> =
        merged.traced_blocks().map(|block| ((block.blob, block.block), block.confidence)).collect();
    assert_eq!(confidence, HashMap::from([((0, 1), 128), ((0, 3), 255), ((1, 5), 128)]));
}

/// A merged image of two layers, `big` in pieces over both, and a layer that is in it twice.
fn image() -> (Tree, Geometry) {
    let mut tree = Tree::new(Meta::default());
    let mut add = |parent, name: &str, kind| {
        let id = tree.add(Node { meta: Meta::default(), kind });
        tree.link(parent, name, id);
        id
    };
    let at = |device, block| DataBlock { space: Space::Device(device), block };
    let file = |size_bytes, device, block| {
        Kind::File(FileData { size_bytes, layout: FileLayout::Contiguous(at(device, block)) })
    };
    let bin = add(NodeId::ROOT, "bin", Kind::Directory(BTreeMap::new()));
    let lib = add(NodeId::ROOT, "lib", Kind::Directory(BTreeMap::new()));
    add(bin, "sh", file(10_000, 0, 10));
    add(bin, "zz-same", file(10_000, 0, 10));
    add(bin, "link", Kind::Symlink(b"../lib/./big".to_vec()));
    add(bin, "loop", Kind::Symlink(b"loop".to_vec()));
    add(NodeId::ROOT, "abs", Kind::Symlink(b"/bin/../lib".to_vec()));
    let layout = FileLayout::Chunked { chunk_blocks_log2: 9, blocks: vec![Some(at(1, 100)), None, Some(at(0, 20))] };
    add(lib, "big", Kind::File(FileData { size_bytes: 4096 * 1030 + 1, layout }));
    add(lib, "odd:0-4096", file(4096, 2, 30));
    add(lib, "empty", Kind::File(FileData::EMPTY));
    let slots = [blob(0), blob(1), blob(0)].map(|tag| DeviceSlot { blocks: 1000, tag });
    read_tree(&write_merged(&tree, &slots).unwrap()).unwrap()
}

fn listed(list: &str) -> PathTrace {
    let (tree, geometry) = image();
    from_paths(list, &tree, &geometry, Sha256::of(b"image"), vec!["run".to_owned()]).unwrap()
}

#[test]
fn a_list_of_paths_becomes_a_trace() {
    let PathTrace { trace, skipped } = listed("# first\n\n/bin/sh\nabs/big:4097-4096\n  lib/odd:0-4096\n");
    assert!(skipped.is_empty(), "{skipped:?}");
    assert_eq!(trace.header.blobs, [blob(0), blob(1)]);
    let runs: Vec<_> = trace.entries.iter().map(|entry| (entry.blob, entry.block, entry.blocks)).collect();
    assert_eq!(runs, [(0, 10, 3), (1, 101, 2), (0, 30, 1)]);
    assert!(trace.encode().is_ok());

    // The hole is left out, and so is what was listed before.
    let runs: Vec<_> = listed("bin/link:0-4096\nbin/link")
        .trace
        .entries
        .iter()
        .map(|entry| (entry.blob, entry.block, entry.blocks))
        .collect();
    assert_eq!(runs, [(1, 100, 256), (1, 356, 256), (0, 20, 7)]);
}

#[test]
fn lines_that_name_nothing_are_reported() {
    let list = "bin/none\nbin\nbin/loop\nbin/sh/x\nbin/sh:10000-1\nbin/sh:0-0\nbin/sh:1\nlib/empty";
    let PathTrace { trace, skipped } = listed(list);
    assert_eq!(trace.blocks(), 0);
    let reasons: Vec<_> = skipped.iter().map(|skipped| (skipped.line, skipped.reason)).collect();
    use SkipReason::{NotAFile, NotFound, OutOfRange};
    assert_eq!(
        reasons,
        [(1, NotFound), (2, NotAFile), (3, NotFound), (4, NotFound), (5, OutOfRange), (6, OutOfRange), (7, NotFound)]
    );
}

#[test]
fn blocks_belong_to_files() {
    let (tree, geometry) = image();
    let map = FileMap::new(&tree, &geometry);
    let path_of =
        |blob, block| map.file_of(blob, block).map(|(file, at)| (String::from_utf8(map.path(file)).unwrap(), at));
    assert_eq!(path_of(blob(0), 9), None);
    assert_eq!(path_of(blob(0), 12), Some(("bin/sh".to_owned(), 8192)));
    assert_eq!(path_of(blob(0), 13), None);
    assert_eq!(path_of(blob(1), 611), Some(("lib/big".to_owned(), 511 * 4096)));
    assert_eq!(path_of(blob(0), 21), Some(("lib/big".to_owned(), 1025 * 4096)));
    assert_eq!(path_of(blob(0), 30), Some(("lib/odd:0-4096".to_owned(), 0)));
    assert_eq!(path_of(blob(5), 30), None);

    let mut trace = listed("lib/big:4096-8192\nbin/sh").trace;
    trace.header.blobs.push(blob(9));
    trace.entries.push(TraceEntry { blob: 2, block: 0, blocks: 5, since_previous_us: 7, confidence: 255 });
    trace.entries.push(TraceEntry { blob: 0, block: 8, blocks: 2, since_previous_us: 7, confidence: 255 });
    trace.entries.push(TraceEntry { blob: 0, block: 13, blocks: 14, since_previous_us: 7, confidence: 255 });
    let usage = map.usage(&trace);
    let files: Vec<_> = usage
        .files
        .iter()
        .map(|file| (map.path(file.file), file.blocks(), file.touched_blocks, file.first_rank, file.first_us))
        .collect();
    assert_eq!(files, [(b"lib/big".to_vec(), 1031, 9, 0, 0), (b"bin/sh".to_vec(), 3, 3, 2, 0)]);
    assert_eq!((usage.other_blocks, usage.unknown_blocks), (9, 5));
}

proptest! {
    /// Extents of any kind, also those that overlap: each block of a file is found, in a file that has it.
    #[test]
    fn every_block_of_every_file_is_found(files in prop::collection::vec((0..200u32, 1..40u32), 1..12)) {
        let mut tree = Tree::new(Meta::default());
        for (number, (block, blocks)) in files.iter().enumerate() {
            let layout = FileLayout::Contiguous(DataBlock { space: Space::Device(0), block: *block });
            let data = FileData { size_bytes: u64::from(*blocks) * 4096, layout };
            let id = tree.add(Node { meta: Meta::default(), kind: Kind::File(data) });
            tree.link(NodeId::ROOT, format!("{number:02}"), id);
        }
        let slots = [DeviceSlot { blocks: 240, tag: blob(0) }];
        let (tree, geometry) = read_tree(&write_merged(&tree, &slots).unwrap()).unwrap();
        let map = FileMap::new(&tree, &geometry);
        let mut of_files = HashSet::new();
        for block in 0..240 {
            let owners: Vec<_> = files
                .iter()
                .map(|(first, blocks)| (*first..first + blocks).contains(&block).then(|| u64::from(block - first) * 4096))
                .collect();
            match map.file_of(blob(0), block) {
                Some((file, at)) => {
                    let number: usize = String::from_utf8(map.path(file)).unwrap().parse().unwrap();
                    prop_assert_eq!(owners[number], Some(at));
                    of_files.insert(block);
                }
                None => prop_assert!(owners.iter().all(Option::is_none)),
            }
        }
        let entry = TraceEntry { blob: 0, block: 0, blocks: 240, since_previous_us: 0, confidence: 255 };
        let like = one_block_each(&[]);
        let usage = map.usage(&Trace { entries: vec![entry], ..like });
        prop_assert_eq!(usage.files.iter().map(|file| file.touched_blocks).sum::<u64>(), of_files.len() as u64);
        prop_assert_eq!(usage.other_blocks, 240 - of_files.len() as u64);
    }
}
