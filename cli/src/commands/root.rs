//! A writable root over an attached image: the part of `add --overlay` and `bundle` that comes after attaching.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ublkimg_driver::daemon::protocol::{DeviceStatus, Request};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::{Error, ErrorKind};

use super::add;
use crate::overlay::{Made, Place};

/// What is wanted.
pub(super) struct Root<'a> {
    /// Where; it is made if it is missing.
    pub(super) directory: &'a Path,
    /// It belongs to a bundle, whose configuration is written beside it.
    pub(super) config: Option<PathBuf>,
    /// Where the changes are kept; in memory if it is not given.
    pub(super) upper: Option<PathBuf>,
}

/// Mounts the image out of the way and the root over it; gives where the root is. What this made is taken back when a step
/// fails. A root that is there already is found.
pub(super) fn mount(
    directories: &Directories,
    device: &DeviceStatus,
    wanted: &Root<'_>,
    timeout: Duration,
) -> anyhow::Result<PathBuf> {
    let place = Place::of(directories, &device.name);
    let made_root = add::make_directory(wanted.directory)?;
    let root = super::resolved(wanted.directory)?;
    let made = Made { root, made_root, config: wanted.config.clone(), upper: wanted.upper.clone() };
    let earlier = place.made()?;
    let is_new = earlier.is_none();
    match earlier {
        // That the directory was made by an earlier run stays known.
        Some(earlier) if earlier.root == made.root => {}
        Some(earlier) => {
            if made_root {
                let _ = std::fs::remove_dir(&made.root);
            }
            return Err(other_root(device, &earlier));
        }
        None => place.announce(&made)?,
    }
    let mounted = add::mount_at(directories, device, &place.image(), timeout)
        .and_then(|_image| place.mount(&made))
        .and_then(|()| {
            let request = Request::Mounted { name: device.name.clone(), directory: made.root.clone() };
            Ok(client::ask(directories, &request, client::ANSWER_MARGIN).map(drop)?)
        });
    // A root that was there before may be in use.
    if mounted.is_err() && is_new {
        let _ = place.unmount(true).and_then(|()| {
            let _ = super::mount_helper::unmount(&place.image(), true, timeout);
            place.forget()
        });
    }
    mounted.map(|()| made.root)
}

fn other_root(device: &DeviceStatus, earlier: &Made) -> anyhow::Error {
    let (name, root) = (&device.name, earlier.root.display());
    let text = format!("{name} has a root at {root} already: remove that, or give another --name");
    Error::new(ErrorKind::Busy, text).into()
}
