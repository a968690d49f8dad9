//! One device that the server holds.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::protocol::DeviceStatus;
use super::start::Starting;
use super::state::DeviceRecord;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{BLOCK_SIZE_BYTES, ServedImage};
use crate::verity::VerityTable;

/// A device, what it serves, and what is written down of it.
pub(super) struct Attached {
    pub(super) record: DeviceRecord,
    pub(super) device: Device,
    pub(super) image: Arc<ServedImage>,
    pub(super) start: Starting,
    pub(super) verity: Option<VerityTable>,
}

impl Attached {
    /// As `ls` and `status` show it.
    pub(super) fn status(&self) -> DeviceStatus {
        let (stored_bytes, layer_bytes) = self.image.stored_bytes();
        DeviceStatus {
            name: self.record.name.clone(),
            reference: self.record.reference.clone(),
            manifest: self.record.manifest.clone(),
            device: self.device.path().to_path_buf(),
            transport: self.record.transport,
            data_path: self.device.data_path(),
            warms: self.start.warms(),
            mounts: self.record.mounts.clone(),
            size_bytes: u64::from(self.image.total_blocks()) * u64::from(BLOCK_SIZE_BYTES),
            counters: self.image.statistics(),
            stored_bytes,
            layer_bytes,
            metadata_bytes: self.image.metadata_bytes(),
            waiting: self.image.waiting(),
            verity: self.verity.clone(),
        }
    }
}

/// Whether nobody holds the device: a mounted file system opens its device exclusively, also when its mount points are
/// gone and only an overlay on top of it keeps it alive. Opening may wait for the device.
///
/// # Errors
/// [`ErrorKind::Busy`].
pub(super) fn check_unused(name: &str, device: &Path) -> Result<()> {
    match rustix::fs::open(device, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::BUSY) => {
            let text = "is still in use, perhaps by an overlay on top of it: unmount that, or use --force";
            Err(Error::new(ErrorKind::Busy, format!("{name} ({}) {text}", device.display())))
        }
        _ => Ok(()),
    }
}
