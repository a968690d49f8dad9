//! Reading tar archives as container layers use them: ustar, PAX and GNU, in one forward pass.
//!
//! Header structures, checksums and type flags come from `tar-core`; the state machine over them is ours, because its
//! parser rounds times to whole seconds and refuses those before 1970, stops silently at a malformed PAX record, and
//! lets a PAX `size` override the length left after a sparse map. Readers that disagree about where an entry ends
//! read different archives from the same bytes (CVE-2025-62518, RUSTSEC-2026-0068), so the rule here is: what is not
//! clear is an error. Where readers differ legitimately we do as Go's `archive/tar`, which every container engine uses:
//!
//! - links, directories, devices and fifos have no data, whatever their size field says; a hard link that is not followed
//!   by a header does have some, which is that of its target and skipped;
//! - PAX `path`, `linkpath`, `size`, `uid`, `gid` and `mtime` beat GNU long names, which beat the header;
//! - the archive ends at two zero blocks or at the end of the input; what follows is ignored.

#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(dead_code, reason = "the tests use all of it"))]
pub(crate) mod builder;
mod number;
mod pax;
mod reader;
mod sparse;

use std::collections::BTreeMap;

use ublkimg_image::{DeviceNumber, Time};

pub(crate) use reader::{Piece, TarReader};

/// Bytes of a header and the unit that data is padded to.
const BLOCK: usize = 512;

/// Most bytes of extended headers (PAX, long names) before one entry. Holds sixteen xattrs of the largest size that
/// Linux allows; global headers together have the same bound.
const EXTENSION_BYTES_MAX: usize = 1 << 20;

/// Most data regions of one sparse file. 16 bytes each; GNU tar's own test files have a few thousand.
const SPARSE_REGIONS_MAX: usize = 1 << 20;

/// What is wrong with some part of the archive: its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Malformed(&'static str);

/// An entry of an archive, extensions applied.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The name as written, not normalised. Has no NUL.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Permission bits, at most 0o7777.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Extended attributes by full name.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Type of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// A regular file of that many bytes, holes included. Its content comes from [`TarReader::read_content`].
    File {
        size_bytes: u64,
    },
    /// Another name of the file with this name (as written).
    HardLink(Vec<u8>),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    CharDevice(DeviceNumber),
    BlockDevice(DeviceNumber),
    Directory,
    Fifo,
}

#[cfg(test)]
mod tests;
