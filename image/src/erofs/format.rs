//! The EROFS structures on disk, as far as this crate uses them. All numbers are little endian.
//!
//! Names and offsets are those of `fs/erofs/erofs_fs.h` in Linux. Writer and reader go through these types only.

use crate::tree::{DeviceNumber, Kind};
use crate::{BLOCK_SIZE, Error, Result, Sha256};

pub(super) const PART: &str = "EROFS metadata";

/// Byte offset of the superblock in block 0.
pub(super) const SUPERBLOCK_OFFSET: usize = 1024;
/// Where the device table starts, in units of its slots: right after the superblock.
const DEVICE_TABLE_SLOT: u16 = 9;
/// The same in bytes.
pub(super) const DEVICE_TABLE_OFFSET: usize = DEVICE_TABLE_SLOT as usize * DeviceRecord::BYTES;
/// Inodes lie at multiples of this many bytes; the nid of an inode is its byte offset divided by it.
pub(super) const SLOT_BYTES: u64 = 32;
/// Address of a chunk that is a hole.
pub(super) const HOLE: u32 = u32::MAX;

const MAGIC: u32 = 0xE0F5_E1E2;
const BLOCK_SIZE_LOG2: u8 = 12;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
const INCOMPAT_DEVICE_TABLE: u32 = 0x8;

// Offsets in block 0 of the fields that `flat_block0` and the checksum change.
const CHECKSUM_AT: usize = SUPERBLOCK_OFFSET + 4;
const BLOCKS_AT: usize = SUPERBLOCK_OFFSET + 36;
const UUID_AT: usize = SUPERBLOCK_OFFSET + 48;
const INCOMPAT_AT: usize = SUPERBLOCK_OFFSET + 80;
const EXTRA_DEVICES_AT: usize = SUPERBLOCK_OFFSET + 86;
const DEVICE_TABLE_SLOT_AT: usize = SUPERBLOCK_OFFSET + 88;

/// `struct erofs_super_block`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    /// Blocks of the primary device, this block included.
    pub(super) blocks: u32,
    /// Length of the device table, if there is one. It starts at [`DEVICE_TABLE_OFFSET`].
    pub(super) devices: Option<u16>,
}

impl Superblock {
    /// Writes into a block 0 that is zero so far; uuid and checksum stay zero.
    pub(super) fn encode(&self, block0: &mut [u8]) {
        put(block0, SUPERBLOCK_OFFSET, &MAGIC.to_le_bytes());
        put(block0, SUPERBLOCK_OFFSET + 8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        block0[SUPERBLOCK_OFFSET + 12] = BLOCK_SIZE_LOG2;
        put(block0, SUPERBLOCK_OFFSET + 14, &self.root_nid.to_le_bytes());
        put(block0, SUPERBLOCK_OFFSET + 16, &self.inodes.to_le_bytes());
        put(block0, BLOCKS_AT, &self.blocks.to_le_bytes());
        let table = if self.devices.is_some() { INCOMPAT_DEVICE_TABLE } else { 0 };
        put(block0, INCOMPAT_AT, &(INCOMPAT_CHUNKED_FILE | table).to_le_bytes());
        if let Some(devices) = self.devices {
            put(block0, EXTRA_DEVICES_AT, &devices.to_le_bytes());
            put(block0, DEVICE_TABLE_SLOT_AT, &DEVICE_TABLE_SLOT.to_le_bytes());
        }
    }

    /// Reads and checks the superblock: magic, checksum, block size and features.
    pub(super) fn decode(block0: &[u8]) -> Result<Self> {
        let Some(superblock) = block0.get(SUPERBLOCK_OFFSET..BLOCK_SIZE) else {
            return Err(Error::corrupt(PART, format!("{} bytes, less than a block", block0.len())));
        };
        let field = |detail: String| Error::unsupported(PART, detail).at(SUPERBLOCK_OFFSET as u64);
        if u32_at(superblock, 0) != MAGIC {
            return Err(Error::corrupt(PART, "no EROFS superblock").at(SUPERBLOCK_OFFSET as u64));
        }
        if superblock[12] != BLOCK_SIZE_LOG2 {
            return Err(field(format!("blocks of 2^{} bytes", superblock[12])));
        }
        if u32_at(superblock, 8) & COMPAT_CHECKSUM == 0 {
            return Err(field("no checksum".into()));
        }
        let (stored, computed) = (u32_at(superblock, 4), checksum(block0));
        if stored != computed {
            let detail = format!("superblock checksum is {computed:08x}, should be {stored:08x}");
            return Err(Error::corrupt(PART, detail).at(CHECKSUM_AT as u64));
        }
        let incompat = u32_at(superblock, 80);
        let unknown = incompat & !(INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE);
        if unknown != 0 {
            return Err(field(format!("incompatible features {unknown:#x}")));
        }
        // Superblock extensions, meta_blkaddr, dirblkbits.
        if superblock[13] != 0 || u32_at(superblock, 40) != 0 || superblock[90] != 0 {
            return Err(field("metadata that does not start at block 0, or large directory blocks".into()));
        }
        let has_table = incompat & INCOMPAT_DEVICE_TABLE != 0;
        let table_slot = u16_at(superblock, 88);
        if has_table && table_slot != DEVICE_TABLE_SLOT {
            return Err(field(format!("device table at slot {table_slot}")));
        }
        Ok(Self {
            root_nid: u16_at(superblock, 14),
            inodes: u64::from(u32_at(superblock, 16)) | u64::from(u32_at(superblock, 20)) << 32,
            blocks: u32_at(superblock, 36),
            devices: has_table.then(|| u16_at(superblock, 86)),
        })
    }
}

/// Sets the uuid to what `content` hashes to, in the form of RFC 9562 version 8, then the checksum.
pub(super) fn seal(block0: &mut [u8], content: Sha256) {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&content.0[..16]);
    uuid[6] = uuid[6] & 0x0F | 0x80;
    uuid[8] = uuid[8] & 0x3F | 0x80;
    put(block0, UUID_AT, &uuid);
    let sum = checksum(block0);
    put(block0, CHECKSUM_AT, &sum.to_le_bytes());
}

/// Turns a block 0 with or without a device table into one without, of a file system of that many blocks.
pub(super) fn flatten(block0: &mut [u8; BLOCK_SIZE], total_blocks: u32) {
    let incompat = u32_at(block0, INCOMPAT_AT) & !INCOMPAT_DEVICE_TABLE;
    put(block0, INCOMPAT_AT, &incompat.to_le_bytes());
    put(block0, EXTRA_DEVICES_AT, &[0; 4]);
    put(block0, BLOCKS_AT, &total_blocks.to_le_bytes());
    let sum = checksum(block0);
    put(block0, CHECKSUM_AT, &sum.to_le_bytes());
}

/// CRC-32C from the superblock to the end of block 0, the checksum field taken as zero. It starts with all ones and,
/// unlike elsewhere, is not inverted at the end.
fn checksum(block0: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&block0[SUPERBLOCK_OFFSET..CHECKSUM_AT]);
    let sum = crc32c::crc32c_append(sum, &[0; 4]);
    !crc32c::crc32c_append(sum, &block0[CHECKSUM_AT + 4..BLOCK_SIZE])
}

/// `struct erofs_deviceslot`: a device that holds file data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeviceRecord {
    /// 64 characters.
    pub(super) tag: [u8; 64],
    pub(super) blocks: u32,
    pub(super) mapped_block: u32,
}

impl DeviceRecord {
    pub(super) const BYTES: usize = 128;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &self.tag);
        put(&mut bytes, 64, &self.blocks.to_le_bytes());
        put(&mut bytes, 68, &self.mapped_block.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        if bytes[72..].iter().any(|byte| *byte != 0) {
            return Err(Error::unsupported(PART, "reserved bytes of a device slot are not zero"));
        }
        let mut tag = [0; 64];
        tag.copy_from_slice(&bytes[..64]);
        Ok(Self { tag, blocks: u32_at(bytes, 64), mapped_block: u32_at(bytes, 68) })
    }
}

/// How the content of an inode is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// One run of blocks.
    FlatPlain,
    /// A run of whole blocks and the rest right after the inode and its xattrs.
    FlatInline,
    /// A map of chunk addresses right after the inode and its xattrs.
    ChunkBased,
}

/// `struct erofs_inode_extended`. Compact inodes are not used: they hold 16 bits of uid, gid and nlink, and kernels up
/// to 6.12 ignore their time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inode {
    pub(super) layout: DataLayout,
    /// See [`xattr_icount`].
    pub(super) xattr_icount: u16,
    /// Type and permissions.
    pub(super) mode: u16,
    pub(super) size_bytes: u64,
    /// First block of the content, chunk format, or device number.
    pub(super) union: u32,
    /// Number for `stat` on 32-bit systems; others show the nid.
    pub(super) ino: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime_seconds: i64,
    pub(super) mtime_nanoseconds: u32,
    pub(super) nlink: u32,
}

impl Inode {
    pub(super) const BYTES: usize = 64;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        const EXTENDED: u16 = 1;
        let layout: u16 = match self.layout {
            DataLayout::FlatPlain => 0,
            DataLayout::FlatInline => 2,
            DataLayout::ChunkBased => 4,
        };
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &(EXTENDED | layout << 1).to_le_bytes());
        put(&mut bytes, 2, &self.xattr_icount.to_le_bytes());
        put(&mut bytes, 4, &self.mode.to_le_bytes());
        put(&mut bytes, 8, &self.size_bytes.to_le_bytes());
        put(&mut bytes, 16, &self.union.to_le_bytes());
        put(&mut bytes, 20, &self.ino.to_le_bytes());
        put(&mut bytes, 24, &self.uid.to_le_bytes());
        put(&mut bytes, 28, &self.gid.to_le_bytes());
        put(&mut bytes, 32, &self.mtime_seconds.to_le_bytes());
        put(&mut bytes, 40, &self.mtime_nanoseconds.to_le_bytes());
        put(&mut bytes, 44, &self.nlink.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let format = u16_at(bytes, 0);
        if format & 1 == 0 {
            return Err(Error::unsupported(PART, "compact inode"));
        }
        let layout = match format >> 1 {
            0 => DataLayout::FlatPlain,
            2 => DataLayout::FlatInline,
            4 => DataLayout::ChunkBased,
            _ => return Err(Error::unsupported(PART, format!("inode format {format:#x}"))),
        };
        // i_nb: high bits of addresses and link counts on images with 48-bit addresses.
        if u16_at(bytes, 6) != 0 {
            return Err(Error::unsupported(PART, "inode with more than 32 bits of block address"));
        }
        Ok(Self {
            layout,
            xattr_icount: u16_at(bytes, 2),
            mode: u16_at(bytes, 4),
            size_bytes: u64_at(bytes, 8),
            union: u32_at(bytes, 16),
            ino: u32_at(bytes, 20),
            uid: u32_at(bytes, 24),
            gid: u32_at(bytes, 28),
            mtime_seconds: u64_at(bytes, 32).cast_signed(),
            mtime_nanoseconds: u32_at(bytes, 40),
            nlink: u32_at(bytes, 44),
        })
    }

    /// Bytes of xattrs after the inode.
    pub(super) fn xattr_len_bytes(&self) -> usize {
        match usize::from(self.xattr_icount) {
            0 => 0,
            count => XATTR_HEADER_BYTES + (count - 1) * XATTR_ALIGN,
        }
    }
}

/// `struct erofs_xattr_ibody_header`, all zero: no shared xattrs, no name filter.
pub(super) const XATTR_HEADER_BYTES: usize = 12;
/// `struct erofs_xattr_entry`: length of the name after the prefix u8, prefix u8, length of the value u16.
pub(super) const XATTR_ENTRY_BYTES: usize = 4;
/// Entries start at multiples of this many bytes.
pub(super) const XATTR_ALIGN: usize = 4;

/// The inode's count field for that many bytes of xattrs (0, or header and entries), if it fits.
pub(super) fn xattr_icount(len_bytes: usize) -> Option<u16> {
    match len_bytes.checked_sub(XATTR_HEADER_BYTES) {
        None => Some(0),
        Some(entries) => u16::try_from(entries / XATTR_ALIGN + 1).ok(),
    }
}

/// `struct erofs_dirent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dirent {
    pub(super) nid: u64,
    /// Offset of the name in the directory block, in bytes.
    pub(super) name_offset: u16,
    pub(super) file_type: FileType,
}

impl Dirent {
    pub(super) const BYTES: usize = 12;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &self.nid.to_le_bytes());
        put(&mut bytes, 8, &self.name_offset.to_le_bytes());
        bytes[10] = self.file_type as u8;
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self> {
        let file_type = FileType::from_dirent(bytes[10])
            .ok_or_else(|| Error::corrupt(PART, format!("directory entry of type {}", bytes[10])))?;
        Ok(Self { nid: u64_at(bytes, 0), name_offset: u16_at(bytes, 8), file_type })
    }
}

/// File types as directory entries store them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum FileType {
    Regular = 1,
    Directory = 2,
    CharDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Socket = 6,
    Symlink = 7,
}

impl FileType {
    const ALL: [Self; 7] =
        [Self::Regular, Self::Directory, Self::CharDevice, Self::BlockDevice, Self::Fifo, Self::Socket, Self::Symlink];

    pub(super) fn of(kind: &Kind) -> Self {
        match kind {
            Kind::Directory(_) => Self::Directory,
            Kind::File(_) => Self::Regular,
            Kind::Symlink(_) => Self::Symlink,
            Kind::CharDevice(_) => Self::CharDevice,
            Kind::BlockDevice(_) => Self::BlockDevice,
            Kind::Fifo => Self::Fifo,
            Kind::Socket => Self::Socket,
        }
    }

    fn from_dirent(value: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|file_type| *file_type as u8 == value)
    }

    /// The type in the mode of an inode (`S_IFMT`).
    pub(super) fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::Socket => 0o140_000,
        }
    }

    pub(super) fn from_mode(mode: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|file_type| file_type.mode_bits() == mode & 0o170_000)
    }
}

/// The kernel's `new_encode_dev`, if the number fits.
pub(super) fn encode_device_number(number: DeviceNumber) -> Option<u32> {
    let DeviceNumber { major, minor } = number;
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xFF) | major << 8 | (minor & !0xFF) << 12)
}

pub(super) fn decode_device_number(value: u32) -> DeviceNumber {
    DeviceNumber { major: (value >> 8) & 0xFFF, minor: (value & 0xFF) | (value >> 12) & 0xF_FF00 }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

// These take offsets inside of a structure whose length the caller knows.

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
