//! The second pass of the writer: bytes.

use super::address::AddressSpace;
use super::directory::{self, Entry};
use super::format::{
    DEVICE_TABLE_OFFSET, DataLayout, DeviceRecord, FileType, HOLE, Inode, PART, Superblock, encode_device_number, seal,
    xattr_icount,
};
use super::plan::{Placed, Plan};
use super::{DeviceSlot, xattr};
use crate::tree::{DataBlock, FileLayout, Kind, Tree};
use crate::{BLOCK_SIZE, Error, ErrorKind, MAX_BLOCKS, MAX_DEVICES, Result, Sha256};

const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;

/// See [`super::write_layer`].
pub(super) fn write_layer(tree: &Tree, own_data_blocks: u32) -> Result<Vec<u8>> {
    let plan = Plan::new(tree, BLOCK_BYTES)?;
    let space = AddressSpace::own(plan.metadata_blocks, own_data_blocks).ok_or_else(too_many_blocks)?;
    let blocks = space.end(plan.metadata_blocks);
    Writer { plan: &plan, space: &space, out: Vec::new() }.write(blocks, None)
}

/// See [`super::write_merged`].
pub(super) fn write_merged(tree: &Tree, devices: &[DeviceSlot]) -> Result<Vec<u8>> {
    if devices.len() > MAX_DEVICES {
        return Err(Error::too_large(PART, format!("{} devices, at most {MAX_DEVICES}", devices.len())));
    }
    if let Some(number) = devices.iter().position(|device| device.blocks == 0) {
        return Err(Error::invalid(PART, format!("device {number} has no blocks")));
    }
    let table_end = DEVICE_TABLE_OFFSET + devices.len() * DeviceRecord::BYTES;
    let plan = Plan::new(tree, (table_end as u64).next_multiple_of(BLOCK_BYTES))?;
    let lengths = devices.iter().map(|device| device.blocks);
    let space = AddressSpace::devices(plan.metadata_blocks, lengths).ok_or_else(too_many_blocks)?;
    Writer { plan: &plan, space: &space, out: Vec::new() }.write(plan.metadata_blocks, Some(devices))
}

fn too_many_blocks() -> Error {
    Error::too_large(PART, format!("more than {MAX_BLOCKS} blocks"))
}

struct Writer<'t> {
    plan: &'t Plan<'t>,
    space: &'t AddressSpace,
    out: Vec<u8>,
}

impl Writer<'_> {
    fn write(mut self, superblock_blocks: u32, devices: Option<&[DeviceSlot]>) -> Result<Vec<u8>> {
        self.out = vec![0; self.plan.metadata_blocks as usize * BLOCK_SIZE];
        let root_nid = u16::try_from(self.plan.nodes[0].nid()).expect("device table and root lie within 2 MiB");
        let device_count = devices.map(|devices| u16::try_from(devices.len()).unwrap_or(u16::MAX));
        let superblock = Superblock {
            root_nid,
            inodes: self.plan.nodes.len() as u64,
            blocks: superblock_blocks,
            devices: device_count,
        };
        superblock.encode(&mut self.out);
        self.write_devices(devices.unwrap_or_default());
        for (position, placed) in self.plan.nodes.iter().enumerate() {
            self.write_node(position, placed)?;
        }
        let content = Sha256::of(&self.out);
        seal(&mut self.out, content);
        Ok(self.out)
    }

    fn write_devices(&mut self, devices: &[DeviceSlot]) {
        let mut at = DEVICE_TABLE_OFFSET as u64;
        let mut mapped_block = self.plan.metadata_blocks;
        for device in devices {
            let mut tag = [0; 64];
            tag.copy_from_slice(device.tag.hex().as_bytes());
            self.put(at, &DeviceRecord { tag, blocks: device.blocks, mapped_block }.encode());
            at += DeviceRecord::BYTES as u64;
            // Cannot overflow: the address space has been laid out with the same lengths.
            mapped_block += device.blocks;
        }
    }

    fn write_node(&mut self, position: usize, placed: &Placed<'_>) -> Result<()> {
        let meta = &placed.node.meta;
        let inode = Inode {
            layout: placed.layout,
            xattr_icount: xattr_icount(placed.xattr_len_bytes).expect("xattrs have at most 64 KiB"),
            mode: FileType::of(&placed.node.kind).mode_bits() | meta.mode,
            size_bytes: placed.size_bytes,
            union: self.inode_union(position, placed)?,
            ino: u32::try_from(position + 1).unwrap_or(u32::MAX),
            uid: meta.uid,
            gid: meta.gid,
            mtime_seconds: meta.mtime.seconds,
            mtime_nanoseconds: meta.mtime.nanoseconds,
            nlink: placed.nlink,
        };
        let mut record = inode.encode().to_vec();
        xattr::encode(&meta.xattrs, &mut record).map_err(|fault| self.invalid(position, &fault))?;
        match &placed.node.kind {
            Kind::Directory(_) => {
                let content = self.directory_content(position, placed)?;
                self.write_content(placed, &mut record, &content);
            }
            Kind::Symlink(target) => self.write_content(placed, &mut record, target),
            Kind::File(_) => self.append_chunk_map(position, placed, &mut record)?,
            Kind::CharDevice(_) | Kind::BlockDevice(_) | Kind::Fifo | Kind::Socket => {}
        }
        self.put(placed.offset_bytes, &record);
        Ok(())
    }

    fn inode_union(&self, position: usize, placed: &Placed<'_>) -> Result<u32> {
        match &placed.node.kind {
            Kind::Directory(_) | Kind::Symlink(_) => Ok(placed.content_block),
            Kind::File(file) => match &file.layout {
                _ if file.size_bytes == 0 => Ok(0),
                FileLayout::Contiguous(block) => self.address(position, *block, file.size_bytes.div_ceil(BLOCK_BYTES)),
                FileLayout::Chunked { chunk_blocks_log2, .. } => Ok(u32::from(*chunk_blocks_log2)),
            },
            Kind::CharDevice(number) | Kind::BlockDevice(number) => encode_device_number(*number)
                .ok_or_else(|| self.invalid(position, &format!("device number {}:{}", number.major, number.minor))),
            Kind::Fifo | Kind::Socket => Ok(0),
        }
    }

    fn append_chunk_map(&self, position: usize, placed: &Placed<'_>, record: &mut Vec<u8>) -> Result<()> {
        let Kind::File(file) = &placed.node.kind else { return Ok(()) };
        let (DataLayout::ChunkBased, FileLayout::Chunked { chunk_blocks_log2, blocks }) = (placed.layout, &file.layout)
        else {
            return Ok(());
        };
        // Xattrs are a multiple of 4 bytes long, so the map is aligned as it must be.
        let mut blocks_left = file.size_bytes.div_ceil(BLOCK_BYTES);
        for block in blocks {
            let len_blocks = blocks_left.min(1 << chunk_blocks_log2);
            blocks_left -= len_blocks;
            let address = match block {
                Some(block) => self.address(position, *block, len_blocks)?,
                None => HOLE,
            };
            record.extend_from_slice(&address.to_le_bytes());
        }
        Ok(())
    }

    fn directory_content(&self, position: usize, placed: &Placed<'_>) -> Result<Vec<u8>> {
        let Kind::Directory(entries) = &placed.node.kind else { return Ok(Vec::new()) };
        let parent = self.plan.nodes[placed.parent].id;
        let entries = directory::stored_order(entries, placed.id, parent).map(|(name, id)| {
            let child = self.plan.placed(id).ok_or_else(|| self.invalid(position, "an entry refers to no node"))?;
            Ok(Entry { name, nid: child.nid(), file_type: FileType::of(&child.node.kind) })
        });
        Ok(directory::encode(&entries.collect::<Result<Vec<_>>>()?))
    }

    /// Writes the whole blocks of `content` to their place and appends an inline tail to the inode's record.
    fn write_content(&mut self, placed: &Placed<'_>, record: &mut Vec<u8>, content: &[u8]) {
        let in_blocks = match placed.layout {
            DataLayout::FlatInline => content.len() / BLOCK_SIZE * BLOCK_SIZE,
            _ => content.len(),
        };
        self.put(u64::from(placed.content_block) * BLOCK_BYTES, &content[..in_blocks]);
        record.extend_from_slice(&content[in_blocks..]);
    }

    fn address(&self, position: usize, first: DataBlock, len_blocks: u64) -> Result<u32> {
        self.space.address(first, len_blocks).ok_or_else(|| {
            let DataBlock { space, block } = first;
            self.invalid(position, &format!("{len_blocks} blocks of data at {space:?} block {block} do not exist"))
        })
    }

    fn invalid(&self, position: usize, detail: &str) -> Error {
        self.plan.error(ErrorKind::Invalid, position, detail)
    }

    fn put(&mut self, offset_bytes: u64, bytes: &[u8]) {
        let at = usize::try_from(offset_bytes).expect("offsets lie inside of the output, which is in memory");
        self.out[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
