//! Trees for the tests.
#![allow(dead_code, reason = "each test binary uses some of it")]

pub(crate) mod compare;
pub(crate) mod fixture;
pub(crate) mod host;

use std::collections::BTreeMap;

use proptest::prelude::*;
use ublkimg_image::{
    DataBlock, DeviceNumber, DeviceSlot, FileData, FileLayout, Kind, Meta, Node, NodeId, Sha256, Space, Time, Tree,
};

/// Blocks that a space of a random tree has.
pub(crate) const SPACE_BLOCKS: u32 = 1000;

/// Where random files may have their data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spaces {
    Own,
    /// Devices 0 to n - 1, [`SPACE_BLOCKS`] each.
    Devices(u16),
}

pub(crate) fn slots(count: u16) -> Vec<DeviceSlot> {
    (0..count).map(|number| DeviceSlot { blocks: SPACE_BLOCKS, tag: Sha256::of(&number.to_le_bytes()) }).collect()
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![Just(b'.'), Just(b'!'), Just(0xff), b'a'..=b'f'];
    prop_oneof![
        8 => prop::collection::vec(byte, 1..6),
        1 => prop::collection::vec(prop_oneof![Just(b'x'), Just(1u8)], 200..=255),
    ]
    .prop_filter("reserved", |name| name != b"." && name != b"..")
}

fn xattrs() -> impl Strategy<Value = BTreeMap<Vec<u8>, Vec<u8>>> {
    let key = prop_oneof![
        "user\\.[a-c]{1,4}".prop_map(String::into_bytes),
        "trusted\\.[a-c]{1,4}".prop_map(String::into_bytes),
        Just(b"security.x".to_vec()),
        Just(b"system.posix_acl_access".to_vec()),
        Just(b"system.posix_acl_default".to_vec()),
    ];
    let value = prop_oneof![8 => 0usize..30, 1 => 0usize..6000].prop_map(|len| vec![0xA5; len]);
    prop_oneof![3 => Just(BTreeMap::new()), 1 => prop::collection::btree_map(key, value, 1..4)]
}

fn meta() -> impl Strategy<Value = Meta> {
    let time = (any::<i64>(), 0u32..1_000_000_000).prop_map(|(seconds, nanoseconds)| Time { seconds, nanoseconds });
    (0u16..=0o7777, any::<u32>(), any::<u32>(), time, xattrs()).prop_map(|(mode, uid, gid, mtime, xattrs)| Meta {
        mode,
        uid,
        gid,
        mtime,
        xattrs,
    })
}

fn space(spaces: Spaces) -> BoxedStrategy<Space> {
    match spaces {
        Spaces::Own => Just(Space::Own).boxed(),
        Spaces::Devices(count) => (0..count).prop_map(Space::Device).boxed(),
    }
}

fn file(spaces: Spaces) -> impl Strategy<Value = FileData> {
    let contiguous = (space(spaces), 1u64..400_000, any::<u32>()).prop_map(|(space, size_bytes, at)| {
        let blocks = u32::try_from(size_bytes.div_ceil(4096)).unwrap();
        let block = at % (SPACE_BLOCKS - blocks + 1);
        FileData { size_bytes, layout: FileLayout::Contiguous(DataBlock { space, block }) }
    });
    let chunks = prop::collection::vec(prop::option::of((space(spaces), any::<u32>())), 1..40);
    let chunked = (0u8..8, chunks, any::<u64>()).prop_map(|(chunk_blocks_log2, chunks, cut)| {
        let chunk_blocks = 1 << chunk_blocks_log2;
        let chunk_bytes = u64::from(chunk_blocks) * 4096;
        let place = |(space, at)| DataBlock { space, block: at % (SPACE_BLOCKS - chunk_blocks + 1) };
        let size_bytes = chunks.len() as u64 * chunk_bytes - cut % chunk_bytes;
        let blocks = chunks.into_iter().map(|chunk| chunk.map(place)).collect();
        FileData { size_bytes, layout: FileLayout::Chunked { chunk_blocks_log2, blocks } }
    });
    prop_oneof![1 => Just(FileData::EMPTY), 3 => contiguous, 3 => chunked]
}

fn leaf(spaces: Spaces) -> impl Strategy<Value = Kind> {
    let device = (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| DeviceNumber { major, minor });
    let target = prop_oneof![4 => 1usize..60, 1 => 1usize..=4095].prop_map(|len| vec![b't'; len]);
    prop_oneof![
        5 => file(spaces).prop_map(Kind::File),
        2 => target.prop_map(Kind::Symlink),
        1 => device.clone().prop_map(Kind::CharDevice),
        1 => device.prop_map(Kind::BlockDevice),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
    ]
}

/// A tree with up to `max_nodes` random nodes. Some nodes get no name, some several.
pub(crate) fn tree(spaces: Spaces, max_nodes: usize) -> impl Strategy<Value = Tree> {
    let kind = prop_oneof![1 => Just(None), 3 => leaf(spaces).prop_map(Some)];
    let node = (any::<prop::sample::Index>(), name(), meta(), kind);
    let link = (any::<prop::sample::Index>(), name(), any::<prop::sample::Index>());
    (meta(), prop::collection::vec(node, 0..max_nodes), prop::collection::vec(link, 0..6)).prop_map(
        |(root, nodes, links)| {
            let mut tree = Tree::new(root);
            let mut directories = vec![NodeId::ROOT];
            let mut others = Vec::new();
            for (parent, name, meta, kind) in nodes {
                let is_directory = kind.is_none();
                let kind = kind.unwrap_or_else(|| Kind::Directory(BTreeMap::new()));
                let id = tree.add(Node { meta, kind });
                tree.link(*parent.get(&directories), name, id);
                if is_directory { directories.push(id) } else { others.push(id) }
            }
            for (parent, name, target) in links.into_iter().filter(|_| !others.is_empty()) {
                tree.link(*parent.get(&directories), name, *target.get(&others));
            }
            tree
        },
    )
}
