//! [`Tree`]s as EROFS metadata, and back.
//!
//! EROFS is the read-only file system of Linux. An image here is its plainest form: no compression, only features that
//! Linux 5.15 has (the device table: 5.16), so that any kernel since then mounts it. All metadata lies in one run at
//! the front, the data after it:
//!
//! ```text
//! block 0: zero | superblock | device table (merged images) ... | inodes | directory blocks | data
//!          0     1024         1152                       ^ root, at a block boundary
//! ```
//!
//! The metadata is fetched whole before anything is mounted, so it must be small: bytes of regular files are never
//! among it. Where data lies is up to the caller; the writer only checks that it exists. The same tree gives the same
//! bytes: no clock, no random numbers, the uuid is a hash of the rest.
//!
//! `format` has the structures, `directory` and `xattr` the variable parts, `address` the block addresses, `plan` the
//! layout; `writer` and `reader` are mirror images on top of them. The reader takes only what the writer makes; other
//! producers' images are refused where they use more (compact inodes, inline file data, shared xattrs, compression).

mod address;
mod directory;
mod format;
mod plan;
mod reader;
mod writer;
mod xattr;

use crate::{BLOCK_SIZE, Error, MAX_BLOCKS, Result, Sha256, Tree};

/// An entry of the device table, for [`write_merged`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Length of the device: the whole raw stream of the layer blob, its metadata included. At least 1.
    pub blocks: u32,
    /// Identity of the layer blob: its digest. Stored as 64 hexadecimal digits.
    pub tag: Sha256,
}

/// The sizes that a superblock and its device table state, in blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Length of the metadata.
    pub metadata_blocks: u32,
    /// The device table; empty for a layer image.
    pub devices: Vec<DeviceGeometry>,
    /// Metadata and data together: the image's own data of a layer image, all devices of a merged one.
    pub total_blocks: u32,
}

/// A device of a merged image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceGeometry {
    /// Length of the device.
    pub blocks: u32,
    /// Where the device starts in the unified address space, in blocks (`mapped_blkaddr`).
    pub mapped_block: u32,
    /// Identity of the layer blob: its digest.
    pub tag: Sha256,
}

/// Writes the metadata of a self-contained image: whole blocks. `own_data_blocks` blocks of data are to follow it
/// directly; addresses in `tree` are in [`Space::Own`](crate::Space::Own) and count from there.
///
/// # Errors
/// `Invalid` for names, targets, xattrs or addresses that cannot be; `TooLarge` for what does not fit the format.
pub fn write_layer(tree: &Tree, own_data_blocks: u32) -> Result<Vec<u8>> {
    writer::write_layer(tree, own_data_blocks)
}

/// Writes the metadata of a merged image: whole blocks. Addresses in `tree` are in
/// [`Space::Device`](crate::Space::Device); device `i` starts at the metadata's length plus the lengths of the devices
/// before it.
///
/// # Errors
/// As [`write_layer`].
pub fn write_merged(tree: &Tree, devices: &[DeviceSlot]) -> Result<Vec<u8>> {
    writer::write_merged(tree, devices)
}

/// Reads metadata: all blocks of it and nothing after them. Data addresses of a layer image come back in
/// [`Space::Own`](crate::Space::Own), those of a merged one in [`Space::Device`](crate::Space::Device).
///
/// # Errors
/// `Corrupt` if the bytes break the format, `Unsupported` if they use a feature that the writer does not.
pub fn read_tree(metadata: &[u8]) -> Result<(Tree, Geometry)> {
    reader::read_tree(metadata)
}

/// Reads the superblock and the device table only: what [`read_tree`] says of the sizes, at a cost that does not depend
/// on the number of files.
///
/// # Errors
/// As [`read_tree`].
pub fn read_geometry(metadata: &[u8]) -> Result<Geometry> {
    reader::read_geometry(metadata)
}

/// Block 0 as a device serves it: without the device table, with the length of the whole flat device, with a new
/// checksum. So one path mounts on every kernel (a flat device with a table fails on 6.1).
///
/// # Errors
/// `Corrupt` or `Unsupported` if `block0` has no superblock of ours; `Invalid` if `total_blocks` is less than that
/// superblock has, or more than [`MAX_BLOCKS`].
pub fn flat_block0(block0: &[u8; BLOCK_SIZE], total_blocks: u32) -> Result<[u8; BLOCK_SIZE]> {
    let superblock = format::Superblock::decode(block0)?;
    if !(superblock.blocks..=MAX_BLOCKS).contains(&total_blocks) {
        let detail = format!("a device of {total_blocks} blocks for an image of {}", superblock.blocks);
        return Err(Error::invalid(format::PART, detail));
    }
    let mut block0 = *block0;
    format::flatten(&mut block0, total_blocks);
    Ok(block0)
}
