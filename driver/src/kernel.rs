//! What the machine has of what we need, and what to do about each thing missing.

use serde::{Deserialize, Serialize};

use crate::device::Transport;
use crate::error::{Error, ErrorKind, Result};

/// One thing that the host may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Short name: `ublk`, `io_uring`, `erofs`, `fuse`, `loop`, `overlayfs`.
    pub name: String,
    /// Whether it can be used now.
    pub usable: bool,
    /// What was found, one line.
    pub found: String,
    /// What to do when it is not usable, one line.
    pub remedy: Option<String>,
}

/// What `doctor` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Release of the running kernel.
    pub kernel: String,
    /// The transport that `auto` would take; none when neither works.
    pub transport: Option<Transport>,
    /// Names of the ublk driver's features.
    pub ublk_features: Vec<String>,
    /// Thing by thing.
    pub checks: Vec<Check>,
}

/// Looks at the host. Changes nothing: loads no module, creates no device.
#[must_use]
pub fn probe() -> HostReport {
    HostReport { kernel: String::new(), transport: None, ublk_features: Vec::new(), checks: Vec::new() }
}

/// The transport to use: `auto` is ublk where it works, else FUSE. Loads missing modules once, when root.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with one line that says what is missing and what to do.
pub fn choose(wanted: Transport) -> Result<Transport> {
    Err(Error::new(ErrorKind::Unsupported, format!("{wanted}: not written yet")))
}
