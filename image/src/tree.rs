//! A file system tree in memory: what a layer or a merged image contains, and where the bytes of its files are.
//!
//! Nodes live in one arena and are named by [`NodeId`]. Directories map names to ids, so a hard link is simply a
//! second entry with the same id; link counts are derived. Nodes that no directory refers to are allowed and are not
//! part of the file system (a merge leaves such nodes behind).

use std::collections::{BTreeMap, HashMap};

/// Names a node of one [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory of every tree.
    pub const ROOT: Self = Self(0);

    /// Position in the arena: ids count up from 0 (the root) in the order of [`Tree::add`], so they can index a side
    /// table of [`Tree::len`] elements.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A file system tree.
#[derive(Debug, Clone)]
pub struct Tree {
    nodes: Vec<Node>,
}

/// A file system object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Owner, permissions, times, extended attributes.
    pub meta: Meta,
    /// Type and content.
    pub kind: Kind,
}

/// Attributes that every kind of node has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky: at most 0o7777. The file type is in [`Kind`].
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the content.
    pub mtime: Time,
    /// Extended attributes by full name: `user.x`, `security.capability`, `trusted.overlay.opaque`,
    /// `system.posix_acl_access`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A point in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Seconds since 1970, rounded towards the past; may be negative.
    pub seconds: i64,
    /// Nanoseconds after that second: less than 1,000,000,000.
    pub nanoseconds: u32,
}

/// Type and content of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory: its entries by name, without `.` and `..`. In an image, a directory has one parent.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// A regular file.
    File(FileData),
    /// A symbolic link and its target: 1 to 4095 bytes without NUL.
    Symlink(Vec<u8>),
    /// A character device.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

/// The number of a device node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct DeviceNumber {
    /// 12 bits.
    pub major: u32,
    /// 20 bits.
    pub minor: u32,
}

/// Size of a regular file and the place of its bytes.
#[derive(Debug, Clone)]
pub struct FileData {
    /// Length of the file in bytes.
    pub size_bytes: u64,
    /// Where they are. Has no meaning when the size is 0.
    pub layout: FileLayout,
}

impl FileData {
    /// A file without bytes.
    pub const EMPTY: Self =
        Self { size_bytes: 0, layout: FileLayout::Contiguous(DataBlock { space: Space::Own, block: 0 }) };
}

/// The layout of empty files is not compared.
impl PartialEq for FileData {
    fn eq(&self, other: &Self) -> bool {
        self.size_bytes == other.size_bytes && (self.size_bytes == 0 || self.layout == other.layout)
    }
}

impl Eq for FileData {}

/// Where the bytes of a file are. Every piece starts at a block boundary; the rest of its last block is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileLayout {
    /// In one run that starts at this block.
    Contiguous(DataBlock),
    /// In equal pieces, each in a place of its own.
    Chunked {
        /// Blocks of a piece, as a power of two: at most 31.
        chunk_blocks_log2: u8,
        /// First block of each piece, `None` for a hole: size / piece length, rounded up, elements. Pieces may share
        /// their blocks with others.
        blocks: Vec<Option<DataBlock>>,
    },
}

/// A block of file data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataBlock {
    /// Where `block` counts from.
    pub space: Space,
    /// Number of the block in that space, in units of 4 KiB.
    pub block: u32,
}

/// What a block number counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// The image's own data area: block 0 is the first block after the metadata.
    Own,
    /// A device (layer blob) by its place in the device table; block 0 is the first block of that device.
    Device(u16),
}

impl Tree {
    /// A tree with nothing but an empty root directory.
    pub fn new(root: Meta) -> Self {
        Self { nodes: vec![Node { meta: root, kind: Kind::Directory(BTreeMap::new()) }] }
    }

    /// Adds a node that no directory refers to yet.
    ///
    /// # Panics
    /// With 2^32 nodes (some 500 GB of them).
    pub fn add(&mut self, node: Node) -> NodeId {
        let id = u32::try_from(self.nodes.len()).expect("2^32 nodes do not fit in memory");
        self.nodes.push(node);
        NodeId(id)
    }

    /// Makes `name` in the directory `parent` refer to `child`; returns what it referred to before. Does nothing when
    /// `parent` is not a directory.
    ///
    /// # Panics
    /// If `parent` is from another tree.
    pub fn link(&mut self, parent: NodeId, name: impl Into<Vec<u8>>, child: NodeId) -> Option<NodeId> {
        match &mut self.node_mut(parent).kind {
            Kind::Directory(entries) => entries.insert(name.into(), child),
            _ => None,
        }
    }

    /// The node of that name.
    ///
    /// # Panics
    /// If `id` is from another tree.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The node of that name, to change it.
    ///
    /// # Panics
    /// If `id` is from another tree.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// The entries of a directory; `None` for any other kind of node.
    ///
    /// # Panics
    /// If `id` is from another tree.
    pub fn entries(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.node(id).kind {
            Kind::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    /// The node at `path`: names joined by slashes, empty for the root. Symbolic links are not followed.
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        path.split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty())
            .try_fold(NodeId::ROOT, |directory, name| self.entries(directory)?.get(name).copied())
    }

    /// Number of nodes in the arena, also of those that no directory refers to. At least 1.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Always false: there is a root.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All nodes of the arena in the order they were added, the root first.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        (0..).map(NodeId).zip(&self.nodes)
    }
}

/// Two trees are equal when the file systems are: same paths, same nodes, same hard links. The numbering of the nodes
/// and nodes outside of the file system do not matter.
impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        // Pairs of ids that stand for each other, in both directions: a hard link on one side only is a difference.
        let mut left_to_right = HashMap::new();
        let mut right_to_left = HashMap::new();
        let mut todo = vec![(NodeId::ROOT, NodeId::ROOT)];
        while let Some((left, right)) = todo.pop() {
            match (left_to_right.insert(left, right), right_to_left.insert(right, left)) {
                (None, None) => {}
                (Some(seen_right), Some(seen_left)) if seen_right == right && seen_left == left => continue,
                _ => return false,
            }
            let (left, right) = (self.node(left), other.node(right));
            if left.meta != right.meta {
                return false;
            }
            match (&left.kind, &right.kind) {
                (Kind::Directory(left), Kind::Directory(right)) => {
                    if !left.keys().eq(right.keys()) {
                        return false;
                    }
                    todo.extend(left.values().copied().zip(right.values().copied()));
                }
                (left, right) if left == right => {}
                _ => return false,
            }
        }
        true
    }
}

impl Eq for Tree {}
