//! A file without a name, which may get one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};

/// A new file in `dir` to write and read; gone with the last descriptor, however the program ends, unless it is linked
/// ([`path_of`]). The usual file without a name may not be linked (`O_EXCL`); it is what there is on file systems that do
/// not know `O_TMPFILE`.
///
/// # Errors
/// Those of the file system.
pub(crate) fn unnamed_file(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(dir, flags, Mode::from_raw_mode(0o666)) {
        Ok(file) => Ok(file.into()),
        Err(_) => tempfile::tempfile_in(dir),
    }
}

/// A path under which this process can open a file without a name while it is open.
pub(crate) fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
