//! Small good values that seeds are made of.

use ublkimg_image::tree::{DataBlock, FileData, FileLayout, Kind, Meta, Node, NodeId, Space, Time};
use ublkimg_image::{DeviceSlot, HotFrame, HotTable, Sha256, Trace, TraceEntry, TraceHeader, Tree};

/// Length of each device of [`merged_metadata`], in blocks.
pub(crate) const DEVICE_BLOCKS: u32 = 5000;

/// The digest of a made-up blob.
pub(crate) fn blob(number: u8) -> Sha256 {
    Sha256([number; 32])
}

/// A trace of two blobs: `entries` runs of blocks, some apart, some one after another.
pub(crate) fn trace(entries: u32) -> Trace {
    let header = TraceHeader {
        manifest: blob(9),
        command: vec!["/usr/sbin/nginx".to_owned(), "-g".to_owned(), "daemon off;".to_owned()],
        read_ahead_kb: 128,
        runs: 3,
        ready_us: Some(1_500_000),
        lost: 2,
        blobs: vec![blob(1), blob(2)],
    };
    let entry = |number: u32| TraceEntry {
        blob: u16::from(number % 5 == 4),
        block: number * 17 % 4096,
        blocks: [1, 1, 8, 32, 256, 1][number as usize % 6].min(17),
        since_previous_us: [0, 3, 150, 20_000][number as usize % 4],
        confidence: if number % 7 == 6 { 170 } else { 255 },
    };
    Trace { header, entries: ublkimg_image::trace::coalesce((0..entries).map(entry)) }
}

/// A tree with every kind of node.
pub(crate) fn tree(space: impl Fn(u16) -> Space) -> Tree {
    let mut tree = Tree::new(Meta { mode: 0o755, ..Meta::default() });
    let mut add = |parent, name: &str, kind| {
        let xattrs = [(b"user.note".to_vec(), name.as_bytes().to_vec())].into();
        let mtime = Time { seconds: 1_700_000_000, nanoseconds: 5 };
        let id = tree.add(Node { meta: Meta { mode: 0o644, uid: 1, gid: 2, mtime, xattrs }, kind });
        tree.link(parent, name, id);
        id
    };
    let at = |device, block| DataBlock { space: space(device), block };
    let file = |size_bytes, device, block| {
        Kind::File(FileData { size_bytes, layout: FileLayout::Contiguous(at(device, block)) })
    };
    let bin = add(NodeId::ROOT, "bin", Kind::Directory([].into()));
    let lib = add(NodeId::ROOT, "lib", Kind::Directory([].into()));
    let shell = add(bin, "sh", file(10_000, 0, 10));
    add(bin, "same", file(10_000, 0, 10));
    add(bin, "link", Kind::Symlink(b"../lib/./big".to_vec()));
    add(bin, "loop", Kind::Symlink(b"loop".to_vec()));
    add(lib, "absolute", Kind::Symlink(b"/bin/../bin".to_vec()));
    let blocks = vec![Some(at(1, 100)), None, Some(at(0, 20))];
    let layout = FileLayout::Chunked { chunk_blocks_log2: 9, blocks };
    add(lib, "big", Kind::File(FileData { size_bytes: 4096 * 1030 + 1, layout }));
    add(lib, "odd:0-4096", file(4096, 1, 30));
    add(lib, "empty", Kind::File(FileData::EMPTY));
    add(lib, "pipe", Kind::Fifo);
    tree.link(lib, "hard", shell);
    tree
}

/// The metadata of a merged image of that tree with two devices.
pub(crate) fn merged_metadata() -> Vec<u8> {
    let slots = [1, 2].map(|number| DeviceSlot { blocks: DEVICE_BLOCKS, tag: blob(number) });
    ublkimg_image::write_merged(&tree(Space::Device), &slots).expect("a good tree")
}

/// A table of frames of different lengths.
pub(crate) fn hot_table(frames: u8) -> HotTable {
    let frame = |number: u8| HotFrame {
        stored_len_bytes: 1000 + u32::from(number),
        blocks: 1 + u16::from(number),
        digest: Sha256([number; 32]),
    };
    HotTable { frames: (0..frames).map(frame).collect() }
}
