//! A checksum of every raw block that is here.
//!
//! The digests that vouch for an image are of *stored* frames, which are not kept. So when a frame has been checked and
//! decoded, the CRC-32C of each of its blocks is written beside the blocks: not against forgers, who could write here as
//! well, but against a disk that changes what it holds. A file of 32-bit little-endian numbers, one a block; zero says that
//! none is known, as in stores of version 0.1.0.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use ublkimg_image::BLOCK_SIZE;

use super::disk;

const SUM_BYTES: u64 = 4;

/// Opens the sums of so many blocks, and says whether they are new: then none is known, and a power cut may lose the file
/// until its directory is synced.
pub(super) fn open(path: &Path, blocks: u32) -> std::io::Result<(File, bool)> {
    let file = disk::open(path)?;
    let len_bytes = u64::from(blocks) * SUM_BYTES;
    let are_new = file.metadata()?.len() != len_bytes;
    if are_new {
        disk::set_len(path, &file, 0)?;
        disk::set_len(path, &file, len_bytes)?;
    }
    Ok((file, are_new))
}

/// Writes the sums of the blocks in `data`, the first of which is `block`.
pub(super) fn write(path: &Path, file: &File, block: u32, data: &[u8]) -> std::io::Result<()> {
    let sums: Vec<u8> = data.chunks_exact(BLOCK_SIZE).flat_map(|block| sum(block).to_le_bytes()).collect();
    disk::write_all_at(path, file, &sums, u64::from(block) * SUM_BYTES)
}

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Right,
    Wrong,
    Unknown,
}

/// Compares the blocks in `data`, the first of which is `block`, with their sums.
pub(super) fn check(file: &File, block: u32, data: &[u8]) -> std::io::Result<Vec<Verdict>> {
    let mut sums = vec![0; data.len() / BLOCK_SIZE * 4];
    file.read_exact_at(&mut sums, u64::from(block) * SUM_BYTES)?;
    let sums = sums.as_chunks().0.iter().map(|sum| u32::from_le_bytes(*sum));
    let verdict = |(block, kept): (&[u8], u32)| match kept {
        0 => Verdict::Unknown,
        kept if kept == sum(block) => Verdict::Right,
        _ => Verdict::Wrong,
    };
    Ok(data.chunks_exact(BLOCK_SIZE).zip(sums).map(verdict).collect())
}

/// Never zero.
fn sum(block: &[u8]) -> u32 {
    crc32c::crc32c(block).max(1)
}
