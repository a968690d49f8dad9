//! An image as `/dev/ublkbN`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::ServedImage;

/// State of a ublk device as the kernel tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Added but not started, or stopped: there is no block device.
    Dead,
    /// Served.
    Live,
    /// Its server died: reads wait for a new one.
    Quiesced,
    /// Its server died: reads fail until there is a new one.
    Failing,
    /// A state that this program does not know.
    Other(u16),
}

/// A ublk device of this kernel, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelDevice {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// What it does.
    pub state: DeviceState,
    /// The process that serves it, or served it last; -1 before the first start.
    pub server_pid: i32,
}

/// Every ublk device of this kernel.
///
/// # Errors
/// [`ErrorKind::Unsupported`] without ublk; [`ErrorKind::TimedOut`] when the driver does not answer.
pub fn devices() -> Result<Vec<KernelDevice>> {
    Err(Error::new(ErrorKind::Unsupported, "ublk: not written yet"))
}

/// Stops and deletes a device that no process serves any more. Bounded: about 30 s.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] when somebody still holds it (it goes when they let go).
pub fn delete(id: u32) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, format!("ublk device {id}: not written yet")))
}

/// Feature bits of the driver (`UBLK_F_*`).
///
/// # Errors
/// [`ErrorKind::Unsupported`] without the driver, or when it is older than 6.5.
pub fn features() -> Result<u64> {
    Err(Error::new(ErrorKind::Unsupported, "ublk: not written yet"))
}

/// A device that was added, or is being recovered, and not started.
#[derive(Debug)]
pub struct PreparedUblk {
    id: u32,
}

impl PreparedUblk {
    /// Adds a device; the kernel chooses the id.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], [`ErrorKind::TimedOut`], or what the kernel refused.
    pub fn add(_image: Arc<ServedImage>) -> Result<Self> {
        Err(Error::new(ErrorKind::Unsupported, "ublk: not written yet"))
    }

    /// Begins to take over a device whose server died.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::Busy`] when its server still lives.
    pub fn recover(_image: Arc<ServedImage>, id: u32) -> Result<Self> {
        Err(Error::new(ErrorKind::Unsupported, format!("ublk device {id}: not written yet")))
    }

    /// N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Serves it.
    ///
    /// # Errors
    /// See [`super::Prepared::start`].
    pub fn start(self) -> Result<UblkDevice> {
        Err(Error::new(ErrorKind::Unsupported, "ublk: not written yet"))
    }
}

/// A device that answers reads.
#[derive(Debug)]
pub struct UblkDevice {
    id: u32,
    path: PathBuf,
}

impl UblkDevice {
    /// `/dev/ublkbN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
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
