//! What the writer refuses, what the reader refuses, and that large trees take time in proportion to their size.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ublkimg_image::{
    BLOCK_SIZE, DataBlock, DeviceNumber, DeviceSlot, ErrorKind, FileData, FileLayout, Kind, Meta, Node, NodeId, Sha256,
    Space, Time, Tree, flat_block0, read_tree, write_layer, write_merged,
};

fn empty_directory() -> Kind {
    Kind::Directory(BTreeMap::new())
}

fn node(kind: Kind) -> Node {
    Node { meta: Meta::default(), kind }
}

/// A tree with one entry.
fn tree_of(name: &[u8], kind: Kind) -> Tree {
    let mut tree = Tree::new(Meta::default());
    let id = tree.add(node(kind));
    tree.link(NodeId::ROOT, name, id);
    tree
}

fn own(block: u32) -> DataBlock {
    DataBlock { space: Space::Own, block }
}

fn contiguous(size_bytes: u64, block: DataBlock) -> Kind {
    Kind::File(FileData { size_bytes, layout: FileLayout::Contiguous(block) })
}

fn chunked(size_bytes: u64, chunk_blocks_log2: u8, blocks: Vec<Option<DataBlock>>) -> Kind {
    Kind::File(FileData { size_bytes, layout: FileLayout::Chunked { chunk_blocks_log2, blocks } })
}

/// The error of writing a layer with 10 blocks of data.
fn refusal(tree: &Tree) -> (ErrorKind, String) {
    let error = write_layer(tree, 10).unwrap_err();
    (error.kind(), error.to_string())
}

fn refused(tree: &Tree) -> ErrorKind {
    refusal(tree).0
}

#[test]
fn bad_names_are_refused() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert_eq!(refused(&tree_of(name, Kind::Fifo)), ErrorKind::Invalid, "{}", name.escape_ascii());
    }
    write_layer(&tree_of(&[b'x'; 255], Kind::Fifo), 0).unwrap();
}

#[test]
fn bad_link_targets_are_refused() {
    assert_eq!(refused(&tree_of(b"l", Kind::Symlink(Vec::new()))), ErrorKind::Invalid);
    assert_eq!(refused(&tree_of(b"l", Kind::Symlink(b"a\0".to_vec()))), ErrorKind::Invalid);
    assert_eq!(refused(&tree_of(b"l", Kind::Symlink(vec![b'x'; 4096]))), ErrorKind::TooLarge);
}

#[test]
fn data_that_does_not_exist_is_refused() {
    for kind in [
        contiguous(1, own(10)),
        contiguous(4097, own(9)),
        contiguous(1, DataBlock { space: Space::Device(0), block: 0 }),
        contiguous(i64::MAX.cast_unsigned(), own(0)),
        contiguous(1, own(u32::MAX)),
        chunked(4096, 0, vec![Some(own(10))]),
        chunked(8 * 4096, 2, vec![Some(own(0)), Some(own(7))]),
        // The map does not fit the size.
        chunked(4096, 0, vec![]),
        chunked(4096, 0, vec![None, None]),
        chunked(4097, 0, vec![None]),
        chunked(4096, 32, vec![None]),
    ] {
        assert_eq!(refused(&tree_of(b"f", kind.clone())), ErrorKind::Invalid, "{kind:?}");
    }
    assert_eq!(refused(&tree_of(b"f", contiguous(1 << 63, own(0)))), ErrorKind::TooLarge);
    for kind in [
        contiguous(4096, own(9)),
        chunked(7 * 4096 + 1, 2, vec![Some(own(0)), Some(own(6))]),
        chunked(5 * 4096 + 1, 2, vec![Some(own(0)), Some(own(8))]), // The last chunk is short.
        chunked(i64::MAX.cast_unsigned(), 31, vec![None; 1 << 20]),
        contiguous(0, own(u32::MAX)),
    ] {
        let tree = tree_of(b"f", kind);
        assert_eq!(read_tree(&write_layer(&tree, 10).unwrap()).unwrap().0, tree);
    }
}

#[test]
fn attributes_that_do_not_fit_are_refused() {
    let refused_meta = |change: &dyn Fn(&mut Meta)| {
        let mut tree = tree_of(b"f", Kind::Fifo);
        change(&mut tree.node_mut(NodeId::ROOT).meta);
        refused(&tree)
    };
    assert_eq!(refused_meta(&|meta| meta.mode = 0o10_000), ErrorKind::Invalid);
    assert_eq!(refused_meta(&|meta| meta.mtime = Time { seconds: 0, nanoseconds: 1_000_000_000 }), ErrorKind::Invalid);
    for name in [&b"user."[..], b"user", b"other.x", b"system.posix_acl_accessx", b"", b"system.nfs4_acl", b"user.\0"] {
        let refused = refused_meta(&|meta| drop(meta.xattrs.insert(name.to_vec(), Vec::new())));
        assert_eq!(refused, ErrorKind::Invalid, "{}", name.escape_ascii());
    }
    let long_name = [&b"user."[..], &[b'x'; 251]].concat();
    assert_eq!(refused_meta(&|meta| drop(meta.xattrs.insert(long_name.clone(), Vec::new()))), ErrorKind::Invalid);
    let too_much = |meta: &mut Meta| {
        meta.xattrs = (0..2).map(|number| (format!("user.{number}").into_bytes(), vec![0; 32_760])).collect();
    };
    assert_eq!(refused_meta(&too_much), ErrorKind::TooLarge);
    for number in [DeviceNumber { major: 4096, minor: 0 }, DeviceNumber { major: 0, minor: 1 << 20 }] {
        assert_eq!(refused(&tree_of(b"d", Kind::BlockDevice(number))), ErrorKind::Invalid);
    }
}

#[test]
fn errors_name_the_path() {
    let mut tree = Tree::new(Meta::default());
    let [a, b] = [empty_directory(), empty_directory()].map(|kind| tree.add(node(kind)));
    let link = tree.add(node(Kind::Symlink(Vec::new())));
    tree.link(NodeId::ROOT, "a", a);
    tree.link(a, "b", b);
    tree.link(b, "link", link);
    assert_eq!(refusal(&tree).1, "file tree: /a/b/link: link target is empty or contains NUL");
}

#[test]
fn directories_have_one_name() {
    let mut twice = tree_of(b"a", empty_directory());
    let directory = twice.lookup(b"a").unwrap();
    twice.link(NodeId::ROOT, "b", directory);
    assert_eq!(refused(&twice), ErrorKind::Invalid);
    let mut cycle = tree_of(b"a", empty_directory());
    let directory = cycle.lookup(b"a").unwrap();
    cycle.link(directory, "b", directory);
    assert_eq!(refused(&cycle), ErrorKind::Invalid);
    let mut root = Tree::new(Meta::default());
    root.link(NodeId::ROOT, "a", NodeId::ROOT);
    assert_eq!(refused(&root), ErrorKind::Invalid);
}

fn chain(depth: usize) -> Tree {
    let mut tree = Tree::new(Meta::default());
    let mut parent = NodeId::ROOT;
    for _ in 0..depth {
        let child = tree.add(node(empty_directory()));
        tree.link(parent, "d", child);
        parent = child;
    }
    tree
}

#[test]
fn depth_is_limited() {
    let deepest = chain(2048);
    assert_eq!(read_tree(&write_layer(&deepest, 0).unwrap()).unwrap().0, deepest);
    assert_eq!(refused(&chain(2049)), ErrorKind::TooLarge);
}

#[test]
fn devices_are_limited() {
    let tree = Tree::new(Meta::default());
    let slot = |blocks| DeviceSlot { blocks, tag: Sha256::of(b"") };
    let (read, geometry) = read_tree(&write_merged(&tree, &vec![slot(1); 1000]).unwrap()).unwrap();
    assert_eq!((read, geometry.devices.len()), (tree.clone(), 1000));
    assert_eq!(write_merged(&tree, &vec![slot(1); 1001]).unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(write_merged(&tree, &[slot(0)]).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(write_merged(&tree, &[slot(u32::MAX - 1)]).unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(write_layer(&tree, u32::MAX - 2).unwrap_err().kind(), ErrorKind::TooLarge);
    let full = write_layer(&tree, u32::MAX - 3).unwrap();
    assert_eq!(read_tree(&full).unwrap().1.total_blocks, u32::MAX - 1);
    assert_eq!(write_merged(&tree, &[]).map(|metadata| read_tree(&metadata).unwrap().0), Ok(tree));
}

#[test]
fn block_0_is_checked_before_it_is_flattened() {
    let metadata = write_layer(&Tree::new(Meta::default()), 5).unwrap();
    let block0: &[u8; BLOCK_SIZE] = metadata.first_chunk().unwrap();
    assert_eq!(flat_block0(block0, 6).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(flat_block0(block0, u32::MAX).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(flat_block0(block0, 7).unwrap(), *block0);
    let mut damaged = *block0;
    damaged[2000] = 1;
    assert_eq!(flat_block0(&damaged, 7).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(flat_block0(&[0; BLOCK_SIZE], 7).unwrap_err().kind(), ErrorKind::Corrupt);
}

fn find(metadata: &[u8], needle: &[u8]) -> usize {
    metadata.windows(needle.len()).position(|window| window == needle).unwrap()
}

/// An entry that leads back to the root.
#[test]
fn cycles_are_refused() {
    let mut tree = tree_of(b"a", empty_directory());
    let directory = tree.lookup(b"a").unwrap();
    let inner = tree.add(node(empty_directory()));
    tree.link(directory, "inner", inner);
    let mut metadata = write_layer(&tree, 0).unwrap();
    let root_nid = 128u64.to_le_bytes();
    let names = find(&metadata, b"...inner");
    let entry = names - 12; // The last of three entries.
    metadata[entry..entry + 8].copy_from_slice(&root_nid);
    let error = read_tree(&metadata).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("another name"), "{error}");
}

/// Many links that claim the same block as their target must cost no more than the metadata has bytes.
#[test]
fn overlapping_structures_are_refused() {
    let mut tree = Tree::new(Meta::default());
    for number in 0..100 {
        let len = if number == 0 { 4095 } else { 1 };
        let link = tree.add(node(Kind::Symlink(vec![b'x'; len])));
        tree.link(NodeId::ROOT, format!("{number:02}"), link);
    }
    let mut metadata = write_layer(&tree, 0).unwrap();
    assert_eq!(read_tree(&metadata).unwrap().0, tree);
    let is_link = |metadata: &[u8], at: usize| metadata[at + 4..at + 6] == 0o120_000u16.to_le_bytes();
    let links: Vec<usize> =
        (BLOCK_SIZE..metadata.len() - 64).step_by(32).filter(|at| is_link(&metadata, *at)).collect();
    assert_eq!(links.len(), 100);
    let content: [u8; 12] = metadata[links[0] + 8..links[0] + 20].try_into().unwrap();
    for at in links {
        metadata[at] = 1; // Extended, FLAT_PLAIN.
        metadata[at + 8..at + 20].copy_from_slice(&content);
    }
    let error = read_tree(&metadata).unwrap_err();
    assert!(error.to_string().contains("structures overlap"), "{error}");
}

/// What a busy test machine may need for these trees, many times what they take.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn large_directories_are_quick() {
    let started = Instant::now();
    let mut tree = Tree::new(Meta::default());
    for number in 0..100_000 {
        let id = tree.add(node(Kind::Fifo));
        tree.link(NodeId::ROOT, format!("a-file-with-a-usual-name-{number}"), id);
    }
    let metadata = write_layer(&tree, 0).unwrap();
    assert_eq!(read_tree(&metadata).unwrap().0, tree);
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
}

#[test]
fn large_trees_are_quick() {
    let started = Instant::now();
    let mut tree = Tree::new(Meta::default());
    for number in 0..500 {
        let directory = tree.add(node(empty_directory()));
        tree.link(NodeId::ROOT, format!("directory-{number}"), directory);
        for number in 0..400 {
            let file = tree.add(node(contiguous(1000, own(number))));
            tree.link(directory, format!("file-{number}"), file);
        }
    }
    let metadata = write_layer(&tree, 400).unwrap();
    assert_eq!(read_tree(&metadata).unwrap().0, tree);
    let inode_bytes = metadata.len() / tree.len();
    assert!(inode_bytes < 100, "{inode_bytes} bytes of metadata per inode");
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
}
