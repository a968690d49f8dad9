//! Layers on top of each other, case by case.

use std::collections::HashMap;
use std::num::NonZeroUsize;

use ublkimg_image::{ChunkIndexBuilder, DataBlock, DeviceNumber, FileLayout, Kind, NodeId, Space, read_tree};

use super::Merge;
use crate::blob::write_layer_blob;
use crate::chunk_size::ChunkSize;
use crate::error::Result;
use crate::frames::Compress;
use crate::layer::{OPAQUE_XATTR, for_each_path, read_tar};
use crate::spool::Spool;
use crate::tar::builder::{HeaderBuilder, TarBuilder};
use crate::{Error, ErrorKind};

const HOW: Compress = Compress { level: 1, threads: NonZeroUsize::MIN };

fn tar() -> TarBuilder {
    TarBuilder::default()
}

fn merge(layers: impl IntoIterator<Item = TarBuilder>) -> Result<ublkimg_image::Tree> {
    let mut merge = Merge::new();
    for tar in layers {
        let mut spool = Spool::new(&std::env::temp_dir(), ChunkSize::MAX, HOW)?;
        let layer = read_tar(tar.finish().as_slice(), &mut spool)?;
        merge.apply(&layer.tree, &layer.record, &ChunkIndexBuilder::new(0).finish())?;
    }
    Ok(merge.into_tree())
}

/// Paths with the size of files, `/` for directories, `=` for objects with several names.
fn shape(layers: impl IntoIterator<Item = TarBuilder>) -> String {
    let tree = merge(layers).unwrap();
    let mut words = Vec::new();
    let mut ids: Vec<NodeId> = Vec::new();
    for_each_path(&tree, |_, id, _| ids.push(id));
    for_each_path(&tree, |path, id, node| {
        assert!(!node.meta.xattrs.contains_key(OPAQUE_XATTR));
        let mark = match &node.kind {
            Kind::Directory(_) => "/".to_owned(),
            Kind::File(data) => format!(":{}", data.size_bytes),
            Kind::Symlink(target) => format!("@{}", String::from_utf8_lossy(target)),
            Kind::CharDevice(DeviceNumber { major, minor }) => format!("c{major},{minor}"),
            _ => "?".to_owned(),
        };
        let shared = if ids.iter().filter(|other| **other == id).count() > 1 { "=" } else { "" };
        if !path.is_empty() {
            words.push(format!("{}{mark}{shared}", String::from_utf8_lossy(path)));
        }
    });
    words.join(" ")
}

fn error(layers: impl IntoIterator<Item = TarBuilder>) -> Error {
    merge(layers).unwrap_err()
}

#[test]
fn whiteouts_remove_from_below_only() {
    assert_eq!(shape([tar().file("a/x", b"1").file("a/y", b"1"), tar().file("a/.wh.x", b"")]), "a/ a/y:1");
    assert_eq!(shape([tar().file("a/x", b"1"), tar().file(".wh.a", b"")]), "");
    assert_eq!(shape([tar().file("a", b"1"), tar().file("a", b"22").file(".wh.a", b"")]), "a:2");
    assert_eq!(shape([tar().file("d/x", b"1"), tar().file("d/y", b"1").file(".wh.d", b"")]), "d/ d/y:1");
    assert_eq!(shape([tar().file("f", b""), tar().file(".wh.nothing", b"")]), "f:0");
    // Deleted, and back two layers later.
    assert_eq!(shape([tar().file("f", b""), tar().file(".wh.f", b""), tar().file("f", b"1")]), "f:1");
}

#[test]
fn opaque_directories_hide_what_is_below() {
    for upper in
        [tar().file("d/.wh..wh..opq", b"").file("d/new", b""), tar().file("d/new", b"").file("d/.wh..wh..opq", b"")]
    {
        assert_eq!(shape([tar().file("d/old", b"").file("d/s/old", b""), upper]), "d/ d/new:0");
    }
    assert_eq!(shape([tar().file("old", b""), tar().file(".wh..wh..opq", b"").file("new", b"")]), "new:0");
}

#[test]
fn types_change_across_layers() {
    assert_eq!(shape([tar().file("x/y/z", b""), tar().file("x", b"1")]), "x:1");
    assert_eq!(shape([tar().file("x", b"1"), tar().dir("x", 0o755).file("x/y", b"")]), "x/ x/y:0");
    assert_eq!(shape([tar().file("x", b"1"), tar().file("x/y", b"")]), "x/ x/y:0");
    assert_eq!(
        shape([tar().file("t/f", b"").symlink("x", "t"), tar().dir("x", 0o755).file("x/y", b"")]),
        "t/ t/f:0 x/ x/y:0"
    );
    assert_eq!(shape([tar().file("x", b""), tar().symlink("x", "y")]), "x@y");
    assert_eq!(shape([tar().file("d/x", b""), tar().symlink("d", "y")]), "d@y");
}

#[test]
fn implied_directories_keep_what_is_below() {
    let mode = |layers: [TarBuilder; 2], path: &[u8]| {
        let tree = merge(layers).unwrap();
        tree.node(tree.lookup(path).unwrap()).meta.mode
    };
    assert_eq!(mode([tar().dir("d", 0o700), tar().file("d/f", b"")], b"d"), 0o700);
    assert_eq!(mode([tar().dir("d", 0o700), tar().dir("d", 0o711)], b"d"), 0o711);
    assert_eq!(mode([tar().dir("d", 0o700), tar().file("d/.wh..wh..opq", b"")], b"d"), 0o700);
    assert_eq!(mode([tar().dir("./", 0o700), tar().file("f", b"")], b""), 0o700);
    assert_eq!(mode([tar().file("f", b""), tar().dir("/", 0o711)], b""), 0o711);
    // Deleted and made anew: nothing of the old one is left.
    assert_eq!(mode([tar().dir("d", 0o700), tar().file(".wh.d", b"").file("d/f", b"")], b"d"), 0o755);
    // Through a link of a layer below, as engines resolve parents; a dead link is replaced.
    let usr = || tar().dir("usr/lib", 0o755).symlink("lib", "usr/lib");
    assert_eq!(shape([usr(), tar().file("lib/f", b"")]), "lib@usr/lib usr/ usr/lib/ usr/lib/f:0");
    assert_eq!(shape([usr(), tar().file("lib/.wh..wh..opq", b"")]), "lib@usr/lib usr/ usr/lib/");
    assert_eq!(shape([tar().symlink("lib", "nowhere"), tar().file("lib/f", b"")]), "lib/ lib/f:0");
}

#[test]
fn hard_links_across_layers() {
    assert_eq!(shape([tar().file("a", b"1"), tar().hard_link("b", "a")]), "a:1= b:1=");
    // The link sees what was there before its layer changed it.
    assert_eq!(shape([tar().file("a", b"1"), tar().hard_link("b", "a").file(".wh.a", b"")]), "b:1");
    // Replacing one name leaves the other.
    let linked = || tar().file("a", b"1").hard_link("b", "a");
    assert_eq!(shape([linked(), tar().file("a", b"22")]), "a:2 b:1");
    assert_eq!(shape([linked(), tar().file(".wh.a", b"")]), "b:1");
    assert_eq!(shape([tar().file("d/a", b"1").symlink("l", "d"), tar().hard_link("b", "l/a")]), "b:1= d/ d/a:1= l@d");
    // The layer goes through a link below it, and names that link too.
    let through = tar().hard_link("m", "l").file("l/f", b"1");
    assert_eq!(shape([tar().dir("d", 0o755).symlink("l", "d"), through]), "d/ d/f:1 l@d= m@d=");
    let missing = error([tar().file("a", b""), tar().hard_link("x/b", "nothing")]);
    assert_eq!(missing.kind(), ErrorKind::BadSource);
    assert!(missing.to_string().contains("x/b") && missing.to_string().contains("nothing"), "{missing}");
    assert_eq!(error([tar().dir("d", 0o755), tar().hard_link("b", "d")]).kind(), ErrorKind::BadSource);
    assert_eq!(error([tar().dir("d", 0o755), tar().hard_link("b", "d").file("d/f", b"")]).kind(), ErrorKind::BadSource);
    assert_eq!(error([tar().hard_link("a", "b").hard_link("b", "a")]).kind(), ErrorKind::BadSource);
}

#[test]
fn plain_devices_0_0_are_not_whiteouts() {
    let device = tar().entry(HeaderBuilder::new(b'3', "a").device(0, 0), b"");
    assert_eq!(shape([tar().file("a", b"1"), device]), "ac0,0");
}

/// A file: a letter for each piece of a chunk, a digit for a short one at the end.
fn pieces(text: &str, chunk_size: ChunkSize) -> Vec<u8> {
    let piece = |letter: u8| match letter {
        b'0'..=b'9' => vec![letter; 100 + usize::from(letter)],
        _ => (0..chunk_size.bytes()).map(|at| u8::try_from(at % u64::from(letter)).unwrap()).collect(),
    };
    text.bytes().flat_map(piece).collect()
}

#[test]
fn equal_pieces_have_one_address_in_the_image() {
    ["64K", "256K"].into_iter().for_each(|size| equal_pieces(size.parse().unwrap()));
}

fn equal_pieces(chunk_size: ChunkSize) {
    let layers = [
        &[("a", "xyx1"), ("b", "yx1"), ("run", "pqr"), ("small", "1")][..],
        &[("c", "zyx2"), ("d", "xyx1"), ("part", "qrp"), ("small-too", "1"), ("run", "pqr")],
        &[("e", "z"), ("f", "zz2")],
    ];
    let dir = std::env::temp_dir();
    let mut merge = Merge::new();
    for files in layers {
        let tar = files.iter().fold(tar(), |tar, (name, text)| tar.file(name, &pieces(text, chunk_size)));
        let mut spool = Spool::new(&dir, chunk_size, HOW).unwrap();
        let layer = read_tar(tar.finish().as_slice(), &mut spool).unwrap();
        let blob = write_layer_blob(layer, &spool, &dir, HOW, &|_| Ok(())).unwrap();
        let (tree, _) = read_tree(&blob.metadata).unwrap();
        merge.apply(&tree, &blob.record, &blob.index).unwrap();
    }
    let tree = merge.into_tree();
    let mut addresses: HashMap<(char, bool), DataBlock> = HashMap::new();
    for (name, text) in layers.iter().copied().flatten() {
        let Kind::File(data) = &tree.node(tree.lookup(name.as_bytes()).unwrap()).kind else { panic!("{name}") };
        assert_eq!(data.size_bytes, pieces(text, chunk_size).len() as u64);
        let found: Vec<DataBlock> = match &data.layout {
            FileLayout::Contiguous(first) => (0..)
                .map(|piece| DataBlock { block: first.block + piece * chunk_size.blocks(), ..*first })
                .take(text.len())
                .collect(),
            FileLayout::Chunked { chunk_blocks_log2, blocks } if 1 << chunk_blocks_log2 == chunk_size.blocks() => {
                blocks.iter().map(|block| block.unwrap()).collect()
            }
            FileLayout::Chunked { .. } => panic!("{name}"),
        };
        assert_eq!(found.len(), text.len());
        for (letter, address) in text.chars().zip(found) {
            // What is packed with other small files is not a piece of a large one.
            let address_then = *addresses.entry((letter, text.len() == 1)).or_insert(address);
            assert_eq!(address, address_then, "{letter} of {name}");
        }
    }
    let mut distinct: Vec<DataBlock> = addresses.values().copied().collect();
    distinct.sort();
    distinct.dedup();
    // x y p q r 1 of the lowest layer, whose only small file is a pack, and so a chunk, like the short piece 1; z 2.
    assert_eq!((addresses.len(), distinct.len()), (10, 8));
    assert_eq!(distinct.iter().filter(|address| address.space == Space::Device(0)).count(), 6);
    // Where the pieces of a file still lie in a row, they stay one run.
    let Kind::File(run) = &tree.node(tree.lookup(b"run").unwrap()).kind else { panic!() };
    assert_eq!(run.layout, FileLayout::Contiguous(addresses[&('p', false)]));
}
