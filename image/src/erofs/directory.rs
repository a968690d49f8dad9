//! The content of directories: blocks of entries, each followed by the names they refer to.
//!
//! Entries are in byte order of their names over the whole directory, `.` and `..` among them without a special place
//! (`!` sorts before them): the kernel looks names up by binary search, first over blocks, then in one.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included, Unbounded};

use super::format::{Dirent, FileType, PART};
use crate::path::MAX_NAME_BYTES;
use crate::tree::NodeId;
use crate::{BLOCK_SIZE, Error, Result};

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: FileType,
}

/// All names of a directory with the nodes they refer to, in the order in which they are stored.
pub(super) fn stored_order(
    entries: &BTreeMap<Vec<u8>, NodeId>,
    this: NodeId,
    parent: NodeId,
) -> impl Iterator<Item = (&[u8], NodeId)> {
    const DOT: &[u8] = b".";
    const DOT_DOT: &[u8] = b"..";
    let range = |from, to| entries.range::<[u8], _>((from, to)).map(|(name, id)| (name.as_slice(), *id));
    range(Unbounded, Excluded(DOT))
        .chain([(DOT, this)])
        .chain(range(Included(DOT), Excluded(DOT_DOT)))
        .chain([(DOT_DOT, parent)])
        .chain(range(Included(DOT_DOT), Unbounded))
}

/// Deals entries out to blocks.
#[derive(Debug, Default)]
struct Packer {
    full_blocks: u64,
    used_bytes: usize,
}

impl Packer {
    /// Makes room for a name of that length. True if it starts a new block.
    fn add(&mut self, name_len: usize) -> bool {
        let len = Dirent::BYTES + name_len;
        let is_full = self.used_bytes + len > BLOCK_SIZE;
        if is_full {
            self.full_blocks += 1;
            self.used_bytes = 0;
        }
        self.used_bytes += len;
        is_full
    }
}

/// Length of the content: whole blocks, and the used part of the last one.
pub(super) fn content_len_bytes<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut packer = Packer::default();
    for name in names {
        packer.add(name.len());
    }
    packer.full_blocks * BLOCK_SIZE as u64 + packer.used_bytes as u64
}

/// The content. `entries` are in stored order and their names have at most 255 bytes.
pub(super) fn encode(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut packer = Packer::default();
    let mut block_start = 0;
    for (number, entry) in entries.iter().enumerate() {
        if packer.add(entry.name.len()) {
            encode_block(&entries[block_start..number], &mut out);
            out.resize(out.len().next_multiple_of(BLOCK_SIZE), 0);
            block_start = number;
        }
    }
    encode_block(&entries[block_start..], &mut out);
    out
}

fn encode_block(entries: &[Entry<'_>], out: &mut Vec<u8>) {
    let mut offset = entries.len() * Dirent::BYTES;
    for entry in entries {
        let name_offset = u16::try_from(offset).expect("the packer closes a block at 4096 bytes");
        out.extend_from_slice(&Dirent { nid: entry.nid, name_offset, file_type: entry.file_type }.encode());
        offset += entry.name.len();
    }
    for entry in entries {
        out.extend_from_slice(entry.name);
    }
}

/// The entries of one directory block; `block` ends where the directory does. Names are not empty, have at most 255
/// bytes and no NUL. Their order, and slashes in them, are up to the caller.
pub(super) fn decode_block(block: &[u8]) -> Result<Vec<Entry<'_>>> {
    let fault = |detail: String| Error::corrupt(PART, format!("directory block: {detail}"));
    let Some((first, _)) = block.split_first_chunk() else {
        return Err(fault(format!("{} bytes", block.len())));
    };
    let names_start = usize::from(Dirent::decode(first)?.name_offset);
    let (Some(table), true) = (block.get(..names_start), names_start > 0) else {
        return Err(fault(format!("names start at byte {names_start}")));
    };
    let (records, []) = table.as_chunks::<{ Dirent::BYTES }>() else {
        return Err(fault(format!("names start at byte {names_start}")));
    };
    let mut entries = Vec::with_capacity(records.len());
    for (number, record) in records.iter().enumerate() {
        let dirent = Dirent::decode(record)?;
        let start = usize::from(dirent.name_offset);
        let is_last = number + 1 == records.len();
        let end = match records.get(number + 1) {
            Some(next) => usize::from(Dirent::decode(next)?.name_offset),
            None => block.len(),
        };
        let bytes = if start >= names_start { block.get(start..end) } else { None };
        let bytes = bytes.ok_or_else(|| fault(format!("name at bytes {start} to {end}")))?;
        // The last name of a block ends at a zero byte or with the block.
        let name = match bytes.iter().position(|byte| *byte == 0) {
            Some(end) if is_last => &bytes[..end],
            Some(_) => return Err(fault("name with a NUL byte".into())),
            None => bytes,
        };
        if !(1..=MAX_NAME_BYTES).contains(&name.len()) {
            return Err(fault(format!("name of {} bytes", name.len())));
        }
        entries.push(Entry { name, nid: dirent.nid, file_type: dirent.file_type });
    }
    Ok(entries)
}
