//! A directory for one test: everything it makes lies below, so that what it leaves behind can be found.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

use crate::leaks;

/// Removed when dropped; mounts below it are detached first.
pub struct TempRoot {
    dir: tempfile::TempDir,
}

impl TempRoot {
    /// A new, empty directory with mode 0755.
    ///
    /// # Errors
    ///
    /// The directory for temporary files cannot be written.
    pub fn new() -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ublkimg-test-").tempdir()?;
        // Daemons and containers of other users pass through it.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(Self { dir })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path below it; not created.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(path)
    }

    /// A new directory below it, parents included.
    ///
    /// # Errors
    ///
    /// As [`std::fs::create_dir_all`].
    pub fn dir(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        let dir = self.join(path);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// A new file below it.
    ///
    /// # Errors
    ///
    /// As [`std::fs::write`].
    pub fn file(&self, path: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> io::Result<PathBuf> {
        let file = self.join(path);
        std::fs::write(&file, contents)?;
        Ok(file)
    }

    /// A file system of `size_bytes` in memory, mounted on a new directory below; needs root.
    ///
    /// # Errors
    ///
    /// Not root.
    pub fn tmpfs(&self, path: impl AsRef<Path>, size_bytes: u64) -> io::Result<PathBuf> {
        let dir = self.dir(path)?;
        let options = std::ffi::CString::new(format!("size={size_bytes},mode=0755")).map_err(io::Error::other)?;
        rustix::mount::mount("tmpfs", &dir, "tmpfs", rustix::mount::MountFlags::empty(), Some(options.as_c_str()))?;
        Ok(dir)
    }
}

impl Drop for TempRoot {
    fn drop(&mut self) {
        // The last mount first: it may lie below an earlier one. What cannot be detached is a leak that the test reports.
        for mount in leaks::mounts_below(self.path()).into_iter().rev() {
            let _ = unmount(mount, UnmountFlags::DETACH);
        }
    }
}
