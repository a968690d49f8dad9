//! One run of an image's command in a container, watched until it is ready, and nothing left of it: what `record` and
//! `compare` have in common.
//!
//! ```text
//! RUN_DIR/NAME/                  a tmpfs
//!   image/                       the device, mounted
//!   upper/, work/                of the overlay
//!   bundle/rootfs                the overlay: what the container sees
//! ```

mod bundle;
mod cleanup;
mod interrupt;
mod ready;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ublkimg_driver::daemon::protocol::{AddRequest, StartOptions};
use ublkimg_driver::device::{QueueOptions, Transport};
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_registry::usual_credential_files;

use super::add;
use crate::args::RegistryOptions;
use crate::overlay;
use bundle::Bundle;
use cleanup::{Container, Directory, Mount};

pub(super) use cleanup::Device;
pub(super) use interrupt::Interrupt;
pub(super) use ready::Readiness;

/// How often readiness is looked at: fine enough for starts of tens of milliseconds.
const POLL: Duration = Duration::from_millis(2);

/// A shell that is started again and again would be a load of its own.
const SHELL_POLL: Duration = Duration::from_millis(50);

/// How long attaching and mounting may take, and a read.
pub(super) const ATTACH_TIMEOUT: Duration = Duration::from_secs(60);
const READ_TIMEOUT: Duration = Duration::from_secs(300);

/// How the image of a run is attached.
pub(super) fn request(
    reference: &str,
    name: &str,
    transport: Transport,
    registry: &RegistryOptions,
    start: StartOptions,
) -> anyhow::Result<AddRequest> {
    Ok(AddRequest {
        reference: super::location(reference)?.to_string(),
        name: Some(name.to_owned()),
        transport,
        queue: QueueOptions::default(),
        plain_http: registry.plain_http,
        auth_file: registry.auth_file.as_deref().map(super::absolute).transpose()?,
        credential_files: usual_credential_files(),
        hosts_dirs: registry.hosts_dirs.clone(),
        attach_timeout_ms: add::milliseconds(ATTACH_TIMEOUT),
        read_timeout_ms: add::milliseconds(READ_TIMEOUT),
        holds_reads: false,
        verity: false,
        start,
    })
}

/// Room for a run, in memory; gone with the value.
pub(super) struct Scratch {
    bundle: Bundle,
    place: PathBuf,
    // Unmounted, then removed.
    _mount: Mount,
    _directory: Directory,
}

impl Scratch {
    pub(super) fn create(place: PathBuf) -> anyhow::Result<Self> {
        let directory = Directory::create(place.clone())?;
        let mount = Mount::new("tmpfs", directory.path(), "mode=0700")?;
        for name in ["image", "upper", "work"] {
            std::fs::create_dir_all(place.join(name))?;
        }
        let bundle = Bundle::new(&place.join("bundle"), &place.join("runc"))?;
        Ok(Self { bundle, place, _mount: mount, _directory: directory })
    }

    /// Where an image can be mounted.
    pub(super) fn image(&self) -> PathBuf {
        self.place.join("image")
    }

    pub(super) fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Mounts a writable root over the tree `lower` in the bundle.
    pub(super) fn overlay(&self, lower: &Path) -> anyhow::Result<Mount> {
        let options = overlay::options(lower, &self.place.join("upper"), &self.place.join("work"))?;
        Mount::new("overlay", &self.bundle.rootfs(), &options)
    }
}

/// Waits until the container is ready; it runs on.
pub(super) fn until_ready(
    mut container: Container,
    readiness: &Readiness,
    timeout: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<Container> {
    let began = Instant::now();
    let poll = if matches!(readiness, Readiness::Command(_)) { SHELL_POLL } else { POLL };
    loop {
        let ended = container.child().try_wait()?;
        if readiness.is_reached(ended, began.elapsed())? {
            return Ok(container);
        }
        interrupt.check()?;
        if began.elapsed() > timeout {
            let text = format!("the command was not ready within {} s", timeout.as_secs());
            return Err(Error::new(ErrorKind::TimedOut, text).into());
        }
        std::thread::sleep(poll);
    }
}
