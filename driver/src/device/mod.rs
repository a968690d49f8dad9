//! An attached image as a block device of this kernel: over ublk, or over a FUSE file on a loop device.
//!
//! Both transports are made in two steps, so that the caller can write down what it is about to do before anybody can
//! see the device. [`Prepared`] owns whatever a name is needed for (a ublk device id); dropping it takes that back.
//! [`Prepared::start`] returns when `/dev/...` exists and answers reads.
//!
//! Neither transport ever waits for the network on a thread that other requests need: a read that misses is parked with
//! [`ServedImage::demand`] and planned again when its waiter ran.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::image::ServedImage;

pub(crate) mod completion;
pub mod fuse;
mod fuse_file;
pub(crate) mod loop_device;
mod read_ahead;
pub mod ublk;
pub(crate) mod ublk_control;
mod ublk_queue;
mod ublk_ring;

pub use fuse::{FuseDevice, PreparedFuse};
pub use read_ahead::{READ_AHEAD_DEFAULT_KB, READ_AHEAD_MAX_KB, set_read_ahead};
pub use ublk::{PreparedUblk, QueueOptions, UblkDevice};
pub use ublk_ring::DataPath;

/// How the bytes of an image get into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// ublk where the kernel has it, else FUSE: see [`crate::kernel::choose`].
    Auto,
    /// `/dev/ublkbN`. Survives a crash of the server: reads wait until it is back.
    Ublk,
    /// A FUSE file on a loop device. Reads fail with EIO when the server dies.
    Fuse,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ublk => "ublk",
            Self::Fuse => "fuse",
        })
    }
}

impl FromStr for Transport {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "ublk" => Ok(Self::Ublk),
            "fuse" => Ok(Self::Fuse),
            _ => Err(Error::new(ErrorKind::Invalid, format!("transport {text:?}: not one of auto, ublk, fuse"))),
        }
    }
}

/// A device that has its name but that nobody can open yet.
///
/// Dropping it undoes what was done, save that a device under recovery stays as it was found.
#[derive(Debug)]
pub enum Prepared {
    /// Over ublk.
    Ublk(PreparedUblk),
    /// Over FUSE and a loop device.
    Fuse(PreparedFuse),
}

impl Prepared {
    /// A new device. `queue` is for ublk; `directory`, private to this device (below the run directory, created when
    /// missing), for FUSE.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for [`Transport::Auto`], which [`crate::kernel::choose`] resolves; [`ErrorKind::Unsupported`]
    /// when the kernel lacks the transport; [`ErrorKind::TimedOut`] when the kernel does not answer.
    pub fn new(transport: Transport, image: Arc<ServedImage>, queue: QueueOptions, directory: &Path) -> Result<Self> {
        match transport {
            Transport::Auto => Err(Error::new(ErrorKind::Invalid, "transport auto: choose one first")),
            Transport::Ublk => PreparedUblk::add(image, queue).map(Self::Ublk),
            Transport::Fuse => PreparedFuse::new(image, directory).map(Self::Fuse),
        }
    }

    /// Takes over the ublk device `id`, whose server died. The image must have the same content and length.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such device, [`ErrorKind::Busy`] when its server still lives.
    pub fn recover(image: Arc<ServedImage>, id: u32) -> Result<Self> {
        PreparedUblk::recover(image, id).map(Self::Ublk)
    }

    /// The ublk device id, to be written down before [`Prepared::start`].
    #[must_use]
    pub fn ublk_id(&self) -> Option<u32> {
        match self {
            Self::Ublk(prepared) => Some(prepared.id()),
            Self::Fuse(_) => None,
        }
    }

    /// Makes it readable. Returns when the device node exists and requests are served.
    ///
    /// # Errors
    /// What the kernel refused, or [`ErrorKind::TimedOut`]; the device is gone then (one under recovery is left as found).
    pub fn start(self) -> Result<Device> {
        match self {
            Self::Ublk(prepared) => prepared.start().map(Device::Ublk),
            Self::Fuse(prepared) => prepared.start().map(Device::Fuse),
        }
    }
}

/// A device that answers reads.
#[derive(Debug)]
pub enum Device {
    /// Over ublk.
    Ublk(UblkDevice),
    /// Over FUSE and a loop device.
    Fuse(FuseDevice),
}

impl Device {
    /// `/dev/ublkbN` or `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Ublk(device) => device.path(),
            Self::Fuse(device) => device.path(),
        }
    }

    /// How it is served; never [`Transport::Auto`].
    #[must_use]
    pub fn transport(&self) -> Transport {
        match self {
            Self::Ublk(_) => Transport::Ublk,
            Self::Fuse(_) => Transport::Fuse,
        }
    }

    /// The ublk device id.
    #[must_use]
    pub fn ublk_id(&self) -> Option<u32> {
        match self {
            Self::Ublk(device) => Some(device.id()),
            Self::Fuse(_) => None,
        }
    }

    /// How data gets into requests of a ublk device.
    #[must_use]
    pub fn data_path(&self) -> Option<DataPath> {
        match self {
            Self::Ublk(device) => Some(device.data_path()),
            Self::Fuse(_) => None,
        }
    }

    /// Takes the device away: pending reads fail with EIO, nothing stays behind. Unmount first: a device that is still
    /// mounted or open disappears when the last user lets go of it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when it is still held (it is deleted when the holder closes it), [`ErrorKind::TimedOut`] when
    /// the kernel does not answer.
    pub fn stop(self) -> Result<()> {
        match self {
            Self::Ublk(device) => device.stop(),
            Self::Fuse(device) => device.stop(),
        }
    }

    /// Lets go of the device without taking it away: the caller is about to end the process. A ublk device then waits
    /// for [`Prepared::recover`]; a FUSE one fails every read.
    pub fn abandon(self) {
        match self {
            Self::Ublk(device) => device.abandon(),
            Self::Fuse(device) => device.abandon(),
        }
    }
}
