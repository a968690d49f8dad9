//! The ublkimg image format, as pure functions of bytes: no I/O, no clock, no randomness.
//!
//! - [`tree`]: a file system tree in memory.
//! - [`erofs`]: that tree as EROFS metadata, and back.
//! - [`chunk_index`], [`merge_record`], [`bundle`]: what travels in the zstd skippable frames ([`zstd_frame`]) of a blob.
//! - [`trace`], [`hot`]: the order in which a start reads blocks, and what vouches for those packed in that order.
//! - [`device_map`]: which blob a block of the assembled device comes from.
//! - [`verity`]: the dm-verity tree over such a device.
//!
//! `FORMAT.md` at the root of the repository has the byte tables. Everything that is decoded here may come from a
//! hostile registry: decoders refuse with a typed [`Error`], they never panic and never allocate more than a small
//! multiple of their input.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod chunk_index;
mod cursor;
pub mod device_map;
pub mod erofs;
mod error;
pub mod hot;
pub mod merge_record;
mod path;
mod sha256;
pub mod trace;
pub mod tree;
pub mod verity;
pub mod zstd_frame;

pub use bundle::{Bundle, BundledLayer};
pub use chunk_index::{Chunk, ChunkId, ChunkIndex, ChunkIndexBuilder};
pub use device_map::{DeviceMap, Segment, TAIL_BLOCKS, Target};
pub use erofs::{
    DeviceGeometry, DeviceSlot, Geometry, flat_block0, read_geometry, read_tree, write_layer, write_merged,
};
pub use error::{Error, ErrorKind, Result};
pub use hot::{HotFrame, HotLayout, HotTable};
pub use merge_record::{LowerLink, MergeRecord};
pub use sha256::{ParseSha256Error, Sha256};
pub use trace::{Trace, TraceEntry, TraceHeader, TraceLog};
pub use tree::{DataBlock, DeviceNumber, FileData, FileLayout, Kind, Meta, Node, NodeId, Space, Time, Tree};
pub use zstd_frame::SkippableKind;

/// Bytes of a block: the unit of the device, of EROFS addresses and of cache presence.
pub const BLOCK_SIZE: usize = 4096;

/// Most blocks of raw data in one chunk: 256 KiB.
pub const CHUNK_BLOCKS: u32 = 64;

/// Most bytes of raw data in one chunk: 256 KiB.
pub const CHUNK_BYTES: u64 = CHUNK_BLOCKS as u64 * BLOCK_SIZE as u64;

/// Most blocks of one device. EROFS block addresses have 32 bits, and `u32::MAX` means "hole".
pub const MAX_BLOCKS: u32 = u32::MAX - 1;

/// Most layer blobs of one image. Their device slots (128 bytes each) lie before the root inode, whose number has 16
/// bits; 1000 of them need 126 KiB of the 2 MiB that this leaves.
pub const MAX_DEVICES: usize = 1000;
