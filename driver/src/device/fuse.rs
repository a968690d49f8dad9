//! An image as a FUSE file on a loop device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::ServedImage;

/// A FUSE file system that is about to be mounted.
#[derive(Debug)]
pub struct PreparedFuse {
    _directory: PathBuf,
}

impl PreparedFuse {
    /// Checks what is needed. `directory` is created when missing.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without FUSE or loop devices.
    pub fn new(_image: Arc<ServedImage>, directory: &Path) -> Result<Self> {
        Err(Error::new(ErrorKind::Unsupported, format!("{}: not written yet", directory.display())))
    }

    /// Serves it.
    ///
    /// # Errors
    /// See [`super::Prepared::start`].
    pub fn start(self) -> Result<FuseDevice> {
        Err(Error::new(ErrorKind::Unsupported, "fuse: not written yet"))
    }
}

/// A device that answers reads.
#[derive(Debug)]
pub struct FuseDevice {
    path: PathBuf,
}

impl FuseDevice {
    /// `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// See [`super::Device::stop`].
    ///
    /// # Errors
    /// See [`super::Device::stop`].
    pub fn stop(self) -> Result<()> {
        Ok(())
    }

    /// See [`super::Device::abandon`].
    pub fn abandon(self) {}
}
