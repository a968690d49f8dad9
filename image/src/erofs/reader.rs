//! The reader: metadata back into a tree. It takes what the writer makes and trusts none of it.
//!
//! Bounds: every inode is read once, whatever number of entries lead to it; and each byte of inode, xattr, chunk map,
//! directory or link target that is read is paid for from a budget of as many bytes as the metadata has. An image that
//! is written honestly uses every byte once at most; one whose structures overlap runs out of budget instead of
//! costing time or memory out of proportion to its size.

use std::collections::{BTreeMap, HashMap};

use super::address::AddressSpace;
use super::directory::{self, Entry};
use super::format::{
    DEVICE_TABLE_OFFSET, DataLayout, DeviceRecord, FileType, HOLE, Inode, PART, SLOT_BYTES, Superblock,
    decode_device_number,
};
use super::plan::{MAX_CHUNK_BLOCKS_LOG2, MAX_DEPTH, MAX_TARGET_BYTES, chunk_count};
use super::{DeviceGeometry, Geometry, xattr};
use crate::path::name_fault;
use crate::tree::{DataBlock, FileData, FileLayout, Kind, Meta, Node, NodeId, Space, Time, Tree};
use crate::{BLOCK_SIZE, Error, MAX_BLOCKS, MAX_DEVICES, Result, Sha256};

const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;

/// See [`super::read_tree`].
pub(super) fn read_tree(metadata: &[u8]) -> Result<(Tree, Geometry)> {
    let (geometry, space, root_nid) = read_head(metadata)?;
    Ok((Reader::read(metadata, space, root_nid)?, geometry))
}

/// See [`super::read_geometry`].
pub(super) fn read_geometry(metadata: &[u8]) -> Result<Geometry> {
    read_head(metadata).map(|(geometry, ..)| geometry)
}

/// Superblock and device table: the sizes, the address space, and where the root is.
fn read_head(metadata: &[u8]) -> Result<(Geometry, AddressSpace, u64)> {
    let metadata_blocks = u32::try_from(metadata.len() / BLOCK_SIZE).ok().filter(|blocks| *blocks <= MAX_BLOCKS);
    let Some(metadata_blocks) = metadata_blocks.filter(|_| metadata.len().is_multiple_of(BLOCK_SIZE)) else {
        return Err(Error::corrupt(PART, format!("{} bytes are not whole blocks", metadata.len())));
    };
    let superblock = Superblock::decode(metadata)?;
    let (devices, space) = read_space(metadata, metadata_blocks, &superblock)?;
    let total_blocks = space.end(metadata_blocks);
    Ok((Geometry { metadata_blocks, devices, total_blocks }, space, u64::from(superblock.root_nid)))
}

/// The device table and the address space that it or the superblock describes.
fn read_space(
    metadata: &[u8],
    metadata_blocks: u32,
    superblock: &Superblock,
) -> Result<(Vec<DeviceGeometry>, AddressSpace)> {
    let blocks = superblock.blocks;
    let Some(count) = superblock.devices else {
        let data_blocks = blocks.checked_sub(metadata_blocks);
        let space = data_blocks.and_then(|data_blocks| AddressSpace::own(metadata_blocks, data_blocks));
        let fault = || Error::corrupt(PART, format!("{blocks} blocks with {metadata_blocks} of metadata"));
        return Ok((Vec::new(), space.ok_or_else(fault)?));
    };
    if blocks != metadata_blocks {
        let detail = format!("{blocks} blocks on the primary device, {metadata_blocks} of metadata");
        return Err(Error::corrupt(PART, detail));
    }
    let table_len = usize::from(count) * DeviceRecord::BYTES;
    let table = metadata.get(DEVICE_TABLE_OFFSET..DEVICE_TABLE_OFFSET + table_len);
    let Some(table) = table.filter(|_| usize::from(count) <= MAX_DEVICES) else {
        return Err(Error::corrupt(PART, format!("device table with {count} slots")));
    };
    let mut devices = Vec::with_capacity(usize::from(count));
    for record in table.as_chunks().0 {
        let DeviceRecord { tag, blocks, mapped_block } = DeviceRecord::decode(record)?;
        let tag = Sha256::from_hex(&tag).map_err(|_| Error::unsupported(PART, "device tag is not a SHA-256 digest"))?;
        devices.push(DeviceGeometry { blocks, mapped_block, tag });
    }
    let space = AddressSpace::devices(metadata_blocks, devices.iter().map(|device| device.blocks));
    let space = space.ok_or_else(|| Error::corrupt(PART, format!("devices have more than {MAX_BLOCKS} blocks")))?;
    for (number, device) in (0..).zip(&devices) {
        let DeviceGeometry { blocks, mapped_block, .. } = *device;
        let start = space.address(DataBlock { space: Space::Device(number), block: 0 }, u64::from(blocks));
        if start != Some(mapped_block) || blocks == 0 {
            let detail = format!("device {number}: {blocks} blocks mapped at {mapped_block} are out of place");
            return Err(Error::corrupt(PART, detail));
        }
    }
    Ok((devices, space))
}

struct Reader<'a> {
    metadata: &'a [u8],
    space: AddressSpace,
    budget_bytes: u64,
    tree: Tree,
    ids: HashMap<u64, NodeId>,
    /// Directories whose entries are still to be read.
    pending: Vec<Directory<'a>>,
}

/// The content of a directory or symbolic link: bytes in blocks, then bytes after the inode.
struct Content<'a> {
    in_blocks: &'a [u8],
    tail: &'a [u8],
}

/// A directory of the tree and its content.
struct Directory<'a> {
    id: NodeId,
    nid: u64,
    parent_nid: u64,
    depth: usize,
    content: Content<'a>,
}

impl Directory<'_> {
    fn fault(&self, detail: &str) -> Error {
        Error::corrupt(PART, format!("directory: {detail}")).at(inode_offset(self.nid))
    }
}

impl<'a> Reader<'a> {
    fn read(metadata: &'a [u8], space: AddressSpace, root_nid: u64) -> Result<Tree> {
        let ids = HashMap::from([(root_nid, NodeId::ROOT)]);
        let tree = Tree::new(Meta::default());
        let budget_bytes = metadata.len() as u64;
        let mut reader = Self { metadata, space, budget_bytes, tree, ids, pending: Vec::new() };
        let (root, content) = reader.read_node(root_nid)?;
        let Some(content) = content else {
            return Err(Error::corrupt(PART, "the root is not a directory").at(inode_offset(root_nid)));
        };
        *reader.tree.node_mut(NodeId::ROOT) = root;
        reader.pending.push(Directory { id: NodeId::ROOT, nid: root_nid, parent_nid: root_nid, depth: 0, content });
        while let Some(directory) = reader.pending.pop() {
            let first = reader.pending.len();
            reader.read_directory(&directory)?;
            reader.pending[first..].reverse();
        }
        Ok(reader.tree)
    }

    fn read_directory(&mut self, directory: &Directory<'a>) -> Result<()> {
        let mut dots = 0;
        let mut last_name: &[u8] = b"";
        let tail = Some(directory.content.tail).filter(|tail| !tail.is_empty());
        for block in directory.content.in_blocks.chunks(BLOCK_SIZE).chain(tail) {
            for entry in directory::decode_block(block).map_err(|error| error.at(inode_offset(directory.nid)))? {
                if entry.name <= last_name {
                    return Err(directory.fault("names are not in order"));
                }
                last_name = entry.name;
                match entry.name {
                    b"." | b".." => {
                        let nid = if entry.name == b"." { directory.nid } else { directory.parent_nid };
                        if (entry.nid, entry.file_type) != (nid, FileType::Directory) {
                            return Err(directory.fault("\".\" or \"..\" leads elsewhere"));
                        }
                        dots += 1;
                    }
                    _ => self.read_entry(directory, entry)?,
                }
            }
        }
        match dots {
            2 => Ok(()),
            _ => Err(directory.fault("no \".\" or no \"..\"")),
        }
    }

    fn read_entry(&mut self, directory: &Directory<'a>, entry: Entry<'a>) -> Result<()> {
        if let Some(fault) = name_fault(entry.name) {
            return Err(directory.fault(&format!("name \"{}\" {fault}", entry.name.escape_ascii())));
        }
        let child = match self.ids.get(&entry.nid) {
            // A second parent could also close a cycle.
            Some(child) if self.tree.entries(*child).is_some() => {
                return Err(directory.fault("an entry leads to a directory that has another name"));
            }
            Some(child) => *child,
            None => self.read_child(directory, entry.nid)?,
        };
        if FileType::of(&self.tree.node(child).kind) != entry.file_type {
            return Err(directory.fault("the type in an entry is not that of its inode"));
        }
        self.tree.link(directory.id, entry.name, child);
        Ok(())
    }

    fn read_child(&mut self, directory: &Directory<'a>, nid: u64) -> Result<NodeId> {
        let (node, content) = self.read_node(nid)?;
        let id = self.tree.add(node);
        self.ids.insert(nid, id);
        if let Some(content) = content {
            let depth = directory.depth + 1;
            if depth > MAX_DEPTH {
                return Err(Error::unsupported(PART, format!("more than {MAX_DEPTH} directories deep")));
            }
            self.pending.push(Directory { id, nid, parent_nid: directory.nid, depth, content });
        }
        Ok(id)
    }

    /// Reads an inode; with the content if it is a directory, whose entries are left out of the node.
    fn read_node(&mut self, nid: u64) -> Result<(Node, Option<Content<'a>>)> {
        self.read_node_at(inode_offset(nid)).map_err(|error| error.at(inode_offset(nid)))
    }

    fn read_node_at(&mut self, offset: u64) -> Result<(Node, Option<Content<'a>>)> {
        let mut bytes = [0; Inode::BYTES];
        bytes.copy_from_slice(self.take(offset, Inode::BYTES as u64)?);
        let inode = Inode::decode(&bytes)?;
        let xattrs_at = offset + Inode::BYTES as u64;
        let xattr_len = inode.xattr_len_bytes() as u64;
        let xattrs = xattr::decode(self.take(xattrs_at, xattr_len)?)?;
        let after_xattrs = xattrs_at + xattr_len;

        if inode.mtime_nanoseconds >= 1_000_000_000 {
            return Err(Error::corrupt(PART, format!("mtime with {} nanoseconds", inode.mtime_nanoseconds)));
        }
        let mtime = Time { seconds: inode.mtime_seconds, nanoseconds: inode.mtime_nanoseconds };
        let meta = Meta { mode: inode.mode & 0o7777, uid: inode.uid, gid: inode.gid, mtime, xattrs };
        let file_type = FileType::from_mode(inode.mode)
            .ok_or_else(|| Error::corrupt(PART, format!("inode of mode {:o}", inode.mode)))?;
        let mut directory = None;
        let kind = match file_type {
            FileType::Directory => {
                directory = Some(self.read_content(&inode, after_xattrs)?);
                Kind::Directory(BTreeMap::new())
            }
            FileType::Symlink => Kind::Symlink(self.read_target(&inode, after_xattrs)?),
            FileType::Regular => Kind::File(self.read_file(&inode, after_xattrs)?),
            FileType::CharDevice => Kind::CharDevice(decode_device_number(inode.union)),
            FileType::BlockDevice => Kind::BlockDevice(decode_device_number(inode.union)),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
        };
        Ok((Node { meta, kind }, directory))
    }

    fn read_target(&mut self, inode: &Inode, after_xattrs: u64) -> Result<Vec<u8>> {
        if !(1..=MAX_TARGET_BYTES).contains(&inode.size_bytes) {
            return Err(Error::corrupt(PART, format!("link target of {} bytes", inode.size_bytes)));
        }
        let content = self.read_content(inode, after_xattrs)?;
        let target = [content.in_blocks, content.tail].concat();
        if target.contains(&0) {
            return Err(Error::corrupt(PART, "link target with a NUL byte"));
        }
        Ok(target)
    }

    fn read_file(&mut self, inode: &Inode, after_xattrs: u64) -> Result<FileData> {
        let size_bytes = inode.size_bytes;
        if i64::try_from(size_bytes).is_err() {
            return Err(Error::corrupt(PART, format!("file of {size_bytes} bytes")));
        }
        let layout = match inode.layout {
            _ if size_bytes == 0 => return Ok(FileData::EMPTY),
            DataLayout::FlatPlain => {
                FileLayout::Contiguous(self.data_block(inode.union, size_bytes.div_ceil(BLOCK_BYTES))?)
            }
            DataLayout::FlatInline => return Err(Error::unsupported(PART, "file data among the metadata")),
            DataLayout::ChunkBased => self.read_chunk_map(inode, after_xattrs)?,
        };
        Ok(FileData { size_bytes, layout })
    }

    fn read_chunk_map(&mut self, inode: &Inode, after_xattrs: u64) -> Result<FileLayout> {
        // Flags: 8-byte entries with device numbers, 48-bit addresses.
        let chunk_blocks_log2 = u8::try_from(inode.union).ok().filter(|log2| *log2 <= MAX_CHUNK_BLOCKS_LOG2);
        let chunk_blocks_log2 =
            chunk_blocks_log2.ok_or_else(|| Error::unsupported(PART, format!("chunk format {:#x}", inode.union)))?;
        let map_len = chunk_count(inode.size_bytes, chunk_blocks_log2)
            .checked_mul(4)
            .ok_or_else(|| Error::corrupt(PART, "chunk map longer than the metadata"))?;
        // Inodes and xattrs have lengths divisible by 4, so the map is aligned as it must be.
        let map = self.take(after_xattrs, map_len)?;
        let mut blocks = Vec::with_capacity(map.len() / 4);
        let mut blocks_left = inode.size_bytes.div_ceil(BLOCK_BYTES);
        for entry in map.as_chunks().0 {
            let len_blocks = blocks_left.min(1 << chunk_blocks_log2);
            blocks_left -= len_blocks;
            blocks.push(match u32::from_le_bytes(*entry) {
                HOLE => None,
                address => Some(self.data_block(address, len_blocks)?),
            });
        }
        Ok(FileLayout::Chunked { chunk_blocks_log2, blocks })
    }

    fn read_content(&mut self, inode: &Inode, after_xattrs: u64) -> Result<Content<'a>> {
        let tail_len = match inode.layout {
            DataLayout::FlatPlain => 0,
            DataLayout::FlatInline => inode.size_bytes % BLOCK_BYTES,
            DataLayout::ChunkBased => return Err(Error::unsupported(PART, "directory or link in chunks")),
        };
        let blocks_len = inode.size_bytes - tail_len;
        if inode.layout == DataLayout::FlatInline
            && (tail_len == 0 || after_xattrs % BLOCK_BYTES + tail_len > BLOCK_BYTES)
        {
            return Err(Error::corrupt(PART, "inline tail is empty or crosses a block"));
        }
        let in_blocks = match blocks_len {
            0 => &[][..], // The address of nothing does not matter.
            _ => self.take(u64::from(inode.union) * BLOCK_BYTES, blocks_len)?,
        };
        Ok(Content { in_blocks, tail: self.take(after_xattrs, tail_len)? })
    }

    fn data_block(&self, address: u32, len_blocks: u64) -> Result<DataBlock> {
        self.space.data_block(address, len_blocks).ok_or_else(|| {
            Error::corrupt(PART, format!("{len_blocks} blocks of file data at block {address} are not all data"))
        })
    }

    /// Bytes of the metadata, paid for from the budget.
    fn take(&mut self, offset: u64, len: u64) -> Result<&'a [u8]> {
        let range = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
        let bytes = range.and_then(|(offset, len)| self.metadata.get(offset..offset.checked_add(len)?));
        let bytes = bytes.ok_or_else(|| Error::corrupt(PART, format!("{len} bytes at {offset} are out of bounds")))?;
        self.budget_bytes = self
            .budget_bytes
            .checked_sub(len)
            .ok_or_else(|| Error::corrupt(PART, "structures overlap: they use more bytes than there are"))?;
        Ok(bytes)
    }
}

/// Byte offset of an inode. A nid that is too large gives an offset that is out of bounds everywhere.
fn inode_offset(nid: u64) -> u64 {
    nid.saturating_mul(SLOT_BYTES).min(i64::MAX.cast_unsigned())
}
