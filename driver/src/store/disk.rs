//! Everything that the store does to change its disk goes through these few functions.
//!
//! What is written stays in the page cache until it is synced, and a power cut loses any part of it: a file's content is
//! on the disk after [`sync`], its name after [`sync_directory`], and until then the disk may have any mixture of old and
//! new sectors, lengths and names. In tests each step is written down, so that `power_cut_tests` can make every disk that
//! a cut may leave, and a step can be made to fail as a disk does that is full or broken.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind as IoErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

#[cfg(test)]
use super::journal::{self, Step};

/// Opens a file for reading and writing; it is made if it is missing.
pub(super) fn open(path: &Path) -> io::Result<File> {
    #[cfg(test)]
    let is_new = !path.exists();
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    #[cfg(test)]
    if is_new {
        journal::note(path, Step::Create)?;
    }
    Ok(file)
}

/// Makes an empty file, in place of one that is there.
pub(super) fn create(path: &Path) -> io::Result<File> {
    let file = File::create(path)?;
    #[cfg(test)]
    journal::note(path, Step::Create)?;
    Ok(file)
}

/// Writes into the page cache.
pub(super) fn write_all_at(path: &Path, file: &File, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
    #[cfg(test)]
    journal::may_fail(path)?;
    let _ = path;
    file.write_all_at(bytes, offset_bytes)?;
    #[cfg(test)]
    journal::note(path, Step::Write { offset_bytes, bytes: bytes.to_vec() })?;
    Ok(())
}

/// Cuts a file, or makes it longer by a hole.
pub(super) fn set_len(path: &Path, file: &File, len_bytes: u64) -> io::Result<()> {
    file.set_len(len_bytes)?;
    #[cfg(test)]
    journal::note(path, Step::SetLen(len_bytes))?;
    let _ = path;
    Ok(())
}

/// Gives the space of a range back; it reads as zeros. Both ends are multiples of the block size.
pub(super) fn punch_hole(path: &Path, file: &File, range: Range<u64>) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, range.start, range.end - range.start)?;
    #[cfg(test)]
    journal::note(path, Step::Punch(range))?;
    let _ = path;
    Ok(())
}

/// Returns when what was written to the file before is on the disk, its length included.
pub(super) fn sync(path: &Path, file: &File) -> io::Result<()> {
    #[cfg(test)]
    let began = journal::len(path);
    #[cfg(test)]
    journal::may_fail(path)?;
    file.sync_data()?;
    #[cfg(test)]
    journal::note(path, Step::Sync { began })?;
    let _ = path;
    Ok(())
}

/// Returns when the names in the directory, as they were before, are on the disk.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    #[cfg(test)]
    let began = journal::len(directory);
    File::open(directory)?.sync_all()?;
    #[cfg(test)]
    journal::note(directory, Step::SyncDirectory { began })?;
    Ok(())
}

/// Gives a file the name of another, which it replaces.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    #[cfg(test)]
    journal::note(from, Step::Rename { to: to.to_owned() })?;
    Ok(())
}

/// Removes a file, which may be gone already.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == IoErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    #[cfg(test)]
    journal::note(path, Step::Remove)?;
    Ok(())
}
