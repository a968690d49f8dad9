//! [`Tree`](crate::Tree)s as EROFS metadata.

use crate::{Error, Result, Sha256, Tree};

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
pub fn write_layer(_tree: &Tree, _own_data_blocks: u32) -> Result<Vec<u8>> {
    Err(Error::unsupported("EROFS", "the writer is not there yet"))
}

/// Writes the metadata of a merged image: whole blocks. Addresses in `tree` are in
/// [`Space::Device`](crate::Space::Device); device `i` starts at the metadata's length plus the lengths of the devices
/// before it.
///
/// # Errors
/// As [`write_layer`].
pub fn write_merged(_tree: &Tree, _devices: &[DeviceSlot]) -> Result<Vec<u8>> {
    Err(Error::unsupported("EROFS", "the writer is not there yet"))
}

/// Reads metadata: all blocks of it and nothing after them. Data addresses of a layer image come back in
/// [`Space::Own`](crate::Space::Own), those of a merged one in [`Space::Device`](crate::Space::Device).
///
/// # Errors
/// `Corrupt` if the bytes break the format, `Unsupported` if they use a feature that the writer does not.
pub fn read_tree(_metadata: &[u8]) -> Result<(Tree, Geometry)> {
    Err(Error::unsupported("EROFS", "the reader is not there yet"))
}

/// Block 0 as a device serves it: without the device table, with the length of the whole flat device, with a new
/// checksum. So one path mounts on every kernel (a flat device with a table fails on 6.1).
///
/// # Errors
/// `Corrupt` if `block0` is not a superblock of ours.
pub fn flat_block0(_block0: &[u8; 4096], _total_blocks: u32) -> Result<[u8; 4096]> {
    Err(Error::unsupported("EROFS", "the writer is not there yet"))
}
