//! The first pass of the writer: which nodes there are, in which order, where each inode goes and how its content is
//! stored.
//!
//! Inodes follow each other in the order: directory, its entries that are no directories, then each subdirectory in
//! the same way; so what one `ls -l` reads lies together. Small directories and symbolic links are stored right after
//! their inode; large ones in whole blocks after all inodes. Files never are: their bytes would blow up the metadata,
//! which is fetched whole.

use super::format::{DataLayout, Inode, SLOT_BYTES};
use super::{directory, xattr};
use crate::path::name_fault;
use crate::tree::{FileData, FileLayout, Kind, Node, NodeId, Tree};
use crate::{BLOCK_SIZE, Error, ErrorKind, MAX_BLOCKS, Result};

const PART: &str = "file tree";
const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;

/// Deepest directory. No path of more than 4096 bytes (`PATH_MAX`) can name a deeper one.
pub(super) const MAX_DEPTH: usize = 2048;
/// Longest target of a symbolic link (`PATH_MAX` without the final NUL).
pub(super) const MAX_TARGET_BYTES: u64 = 4095;
/// Largest power of two of blocks in a chunk: what the format's 5 bits can say.
pub(super) const MAX_CHUNK_BLOCKS_LOG2: u8 = 31;

/// A node and its place.
#[derive(Debug)]
pub(super) struct Placed<'t> {
    pub(super) id: NodeId,
    pub(super) node: &'t Node,
    /// Where it was found first; for the root, the root itself. Position in [`Plan::nodes`].
    pub(super) parent: usize,
    name: &'t [u8],
    pub(super) nlink: u32,
    pub(super) size_bytes: u64,
    pub(super) layout: DataLayout,
    pub(super) xattr_len_bytes: usize,
    /// Where the inode is, in bytes.
    pub(super) offset_bytes: u64,
    /// First block of the content of a directory or symbolic link, if it has whole blocks.
    pub(super) content_block: u32,
}

/// Where everything goes.
#[derive(Debug)]
pub(super) struct Plan<'t> {
    /// The root first.
    pub(super) nodes: Vec<Placed<'t>>,
    /// Position in `nodes` by node id.
    positions: Vec<Option<u32>>,
    pub(super) metadata_blocks: u32,
}

impl Placed<'_> {
    pub(super) fn nid(&self) -> u64 {
        self.offset_bytes / SLOT_BYTES
    }

    /// Blocks of its own content, outside of the inode area.
    pub(super) fn content_blocks(&self) -> u64 {
        match (&self.node.kind, self.layout) {
            (Kind::Directory(_) | Kind::Symlink(_), DataLayout::FlatInline) => self.size_bytes / BLOCK_BYTES,
            (Kind::Directory(_) | Kind::Symlink(_), _) => self.size_bytes.div_ceil(BLOCK_BYTES),
            _ => 0,
        }
    }
}

/// Number of chunks of a file. `chunk_blocks_log2` is at most 31.
pub(super) fn chunk_count(size_bytes: u64, chunk_blocks_log2: u8) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES << chunk_blocks_log2)
}

impl<'t> Plan<'t> {
    /// Plans the image; the first inode goes to `start_bytes`.
    pub(super) fn new(tree: &'t Tree, start_bytes: u64) -> Result<Self> {
        let mut plan = Self { nodes: Vec::new(), positions: vec![None; tree.len()], metadata_blocks: 0 };
        plan.collect(tree)?;
        plan.place(start_bytes)?;
        Ok(plan)
    }

    pub(super) fn placed(&self, id: NodeId) -> Option<&Placed<'t>> {
        self.nodes.get(self.positions[id.index()]? as usize)
    }

    /// An error about a node, with its path.
    pub(super) fn error(&self, kind: ErrorKind, position: usize, detail: &str) -> Error {
        let mut names = Vec::new();
        let mut at = position;
        while at != 0 {
            names.push(self.nodes[at].name);
            at = self.nodes[at].parent;
        }
        names.reverse();
        Error::new(kind, PART, format!("/{}: {detail}", names.join(&b'/').escape_ascii()))
    }

    fn collect(&mut self, tree: &'t Tree) -> Result<()> {
        let mut directories = vec![(NodeId::ROOT, 0, &b""[..], 0)];
        while let Some((id, parent, name, depth)) = directories.pop() {
            let directory = self.add(tree, id, parent, name)?;
            let Kind::Directory(entries) = &tree.node(id).kind else {
                return Err(self.error(ErrorKind::Invalid, directory, "the root is not a directory"));
            };
            self.nodes[directory].nlink = 2;
            let first = directories.len();
            for (name, child) in entries {
                if let Some(fault) = name_fault(name) {
                    let detail = format!("entry \"{}\" {fault}", name.escape_ascii());
                    return Err(self.error(ErrorKind::Invalid, directory, &detail));
                }
                if child.index() >= tree.len() {
                    return Err(self.error(ErrorKind::Invalid, directory, "an entry refers to no node"));
                }
                let linked = if matches!(tree.node(*child).kind, Kind::Directory(_)) {
                    directories.push((*child, directory, name, depth + 1));
                    directory
                } else {
                    match self.positions[child.index()] {
                        Some(position) => position as usize,
                        None => self.add(tree, *child, directory, name)?,
                    }
                };
                let nlink = self.nodes[linked].nlink.checked_add(1);
                self.nodes[linked].nlink =
                    nlink.ok_or_else(|| self.error(ErrorKind::TooLarge, linked, "more than 2^32 - 1 links"))?;
            }
            if depth >= MAX_DEPTH && directories.len() > first {
                return Err(self.error(ErrorKind::TooLarge, directory, "more than 2048 directories deep"));
            }
            directories[first..].reverse();
        }
        Ok(())
    }

    /// Appends a node that was not there; checks what does not depend on its place.
    fn add(&mut self, tree: &'t Tree, id: NodeId, parent: usize, name: &'t [u8]) -> Result<usize> {
        let position = self.nodes.len();
        let node = tree.node(id);
        self.nodes.push(Placed {
            id,
            node,
            parent,
            name,
            nlink: 0,
            size_bytes: 0,
            layout: DataLayout::FlatPlain,
            xattr_len_bytes: 0,
            offset_bytes: 0,
            content_block: 0,
        });
        if self.positions[id.index()].replace(u32::try_from(position).unwrap_or(u32::MAX)).is_some() {
            return Err(self.error(ErrorKind::Invalid, position, "a directory with two names"));
        }
        let parent_id = self.nodes[parent].id;
        let fault = |(kind, detail): (ErrorKind, String)| self.error(kind, position, &detail);
        let size_bytes = check_node(node, id, parent_id).map_err(fault)?;
        let xattr_len = xattr::len_bytes(&node.meta.xattrs).map_err(fault)?;
        self.nodes[position].size_bytes = size_bytes;
        self.nodes[position].xattr_len_bytes = xattr_len;
        Ok(position)
    }

    fn place(&mut self, start_bytes: u64) -> Result<()> {
        let mut at = start_bytes;
        for placed in &mut self.nodes {
            let base = Inode::BYTES as u64 + placed.xattr_len_bytes as u64;
            let tail = placed.size_bytes % BLOCK_BYTES;
            let (layout, after_base) = match &placed.node.kind {
                // An inline tail must not cross a block, and there is none if only whole blocks are left.
                Kind::Directory(_) | Kind::Symlink(_) if tail > 0 && base + tail <= BLOCK_BYTES => {
                    (DataLayout::FlatInline, tail)
                }
                Kind::File(FileData { size_bytes: 1.., layout: FileLayout::Chunked { blocks, .. } }) => {
                    (DataLayout::ChunkBased, 4 * blocks.len() as u64)
                }
                _ => (DataLayout::FlatPlain, 0),
            };
            let together = if layout == DataLayout::FlatInline { base + after_base } else { base };
            at = at.next_multiple_of(SLOT_BYTES);
            if at % BLOCK_BYTES + together > BLOCK_BYTES && together <= BLOCK_BYTES {
                at = at.next_multiple_of(BLOCK_BYTES);
            }
            placed.layout = layout;
            placed.offset_bytes = at;
            at += base + after_base;
        }
        let mut block = at.div_ceil(BLOCK_BYTES);
        for placed in &mut self.nodes {
            let blocks = placed.content_blocks();
            if blocks > 0 {
                placed.content_block = u32::try_from(block).unwrap_or(u32::MAX);
                block += blocks;
            }
        }
        let metadata_blocks = u32::try_from(block).ok().filter(|blocks| *blocks <= MAX_BLOCKS);
        self.metadata_blocks =
            metadata_blocks.ok_or_else(|| Error::too_large(PART, format!("{block} blocks of metadata")))?;
        Ok(())
    }
}

/// Checks a node by itself; returns the length of its content.
fn check_node(node: &Node, id: NodeId, parent: NodeId) -> Result<u64, (ErrorKind, String)> {
    if node.meta.mode > 0o7777 {
        return Err((ErrorKind::Invalid, format!("mode {:o} has more than permission bits", node.meta.mode)));
    }
    if node.meta.mtime.nanoseconds >= 1_000_000_000 {
        return Err((ErrorKind::Invalid, format!("mtime with {} nanoseconds", node.meta.mtime.nanoseconds)));
    }
    match &node.kind {
        Kind::Directory(entries) => {
            Ok(directory::content_len_bytes(directory::stored_order(entries, id, parent).map(|(name, _)| name)))
        }
        Kind::Symlink(target) => {
            let len = target.len() as u64;
            if len > MAX_TARGET_BYTES {
                return Err((ErrorKind::TooLarge, format!("link target of {len} bytes, at most {MAX_TARGET_BYTES}")));
            }
            if target.is_empty() || target.contains(&0) {
                return Err((ErrorKind::Invalid, "link target is empty or contains NUL".into()));
            }
            Ok(len)
        }
        Kind::File(file) => check_file(file),
        Kind::CharDevice(_) | Kind::BlockDevice(_) | Kind::Fifo | Kind::Socket => Ok(0),
    }
}

fn check_file(file: &FileData) -> Result<u64, (ErrorKind, String)> {
    let size_bytes = file.size_bytes;
    if i64::try_from(size_bytes).is_err() {
        return Err((ErrorKind::TooLarge, format!("file of {size_bytes} bytes")));
    }
    if let (1.., FileLayout::Chunked { chunk_blocks_log2, blocks }) = (size_bytes, &file.layout) {
        if *chunk_blocks_log2 > MAX_CHUNK_BLOCKS_LOG2 {
            return Err((ErrorKind::Invalid, format!("chunks of 2^{chunk_blocks_log2} blocks")));
        }
        let count = chunk_count(size_bytes, *chunk_blocks_log2);
        if blocks.len() as u64 != count {
            return Err((ErrorKind::Invalid, format!("{} chunks where its size needs {count}", blocks.len())));
        }
    }
    Ok(size_bytes)
}
