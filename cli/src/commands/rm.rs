//! `ublkimg rm`: unmount, stop, delete, in that order; what `--overlay` and `bundle` made over the image goes first.
//!
//! Mounts in the caller's mount namespace are unmounted, and with them the copies that services with a namespace of their
//! own have. A mount that is in use, one in another mount namespace that would stay, or a file system stacked on top
//! (overlayfs) refuses the removal, unless `--force` is given. What is in use is looked at again for [`BUSY_PATIENCE`]
//! first: a process that was just forked holds its parent's files until it calls exec, udev opens a device for a moment,
//! and a warmer that is sent away ends its turn.

use std::time::{Duration, Instant};

use ublkimg_driver::daemon::protocol::{DeviceStatus, Request};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::verity::{self, Mapped};
use ublkimg_driver::{mounts, propagation};

use super::{daemon, mount_helper, status};
use crate::args::{Global, Rm};
use crate::lease::Leases;
use crate::output;
use crate::overlay::Place;

/// Unmounting flushes nothing on a read-only file system: more time than this means that something hangs.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long something that is in use may take to get out of it.
const BUSY_PATIENCE: Duration = Duration::from_secs(1);

/// How often it is looked at.
const BUSY_POLL: Duration = Duration::from_millis(20);

pub(super) fn run(global: &Global, command: &Rm) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    if command.dry_run {
        return tell(&directories, command);
    }
    start_daemon_for_records(global, &directories)?;
    let device = match status::find(&directories, &command.target) {
        // A server that gave up has deleted what lay below it.
        Err(error) if super::hook::is_not_found(&error) && matches!(verity::find(&command.target), Ok(Some(_))) => {
            return close_mapped(&command.target, command.force);
        }
        found => found?,
    };
    let leases = Leases::of(&directories, &device.name);
    // No container takes one between the look and the removal.
    let _lock = leases.lock()?;
    refuse_if_leased(&leases, &device, command.force)?;
    remove_patiently(&directories, &device, command.force)?;
    leases.forget();
    Ok(())
}

fn refuse_if_leased(leases: &Leases, device: &DeviceStatus, force: bool) -> anyhow::Result<()> {
    match leases.holder() {
        Some(id) if !force => {
            let text = format!("{} is leased by the container {id}: end that first, or use --force", device.name);
            Err(Error::new(ErrorKind::Busy, text).into())
        }
        _ => Ok(()),
    }
}

/// What would be done, one step a line. Whether a mount is in use shows only when it is unmounted.
fn tell(directories: &Directories, command: &Rm) -> anyhow::Result<()> {
    let device = status::find(directories, &command.target)?;
    refuse_if_leased(&Leases::of(directories, &device.name), &device, command.force)?;
    let root = Place::of(directories, &device.name);
    if let Some(number) = root.mounted()? {
        if !command.force {
            refuse_if_mounted_elsewhere(&device.name, number)?;
        }
        let place = root.made()?.map_or_else(String::new, |made| made.root.display().to_string());
        output::line(&format!("unmount the root {place}"))?;
    }
    let mapped = mapped_over(&device)?;
    for number in mapped.iter().map(|mapped| mapped.number).chain(mounts::device_number(&device.device)) {
        if !command.force {
            refuse_if_mounted_elsewhere(&device.name, number)?;
        }
        for mount in mounts::list()?.iter().rev().filter(|mount| mount.device == number) {
            output::line(&format!("unmount {}", mount.mount_point.display()))?;
        }
    }
    if let Some(mapped) = mapped {
        output::line(&format!("remove {}", mapped.path.display()))?;
    }
    output::line(&format!("remove {} ({})", device.name, device.device.display()))
}

/// Removes a device; what is in use is looked at again for a while.
pub(super) fn remove_patiently(directories: &Directories, device: &DeviceStatus, force: bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + BUSY_PATIENCE;
    loop {
        match remove(directories, device, force) {
            Err(error) if is_busy(&error) && Instant::now() < deadline => std::thread::sleep(BUSY_POLL),
            other => return other,
        }
    }
}

pub(super) fn remove(directories: &Directories, device: &DeviceStatus, force: bool) -> anyhow::Result<()> {
    let root = Place::of(directories, &device.name);
    if !force && let Some(number) = root.mounted()? {
        refuse_if_mounted_elsewhere(&device.name, number)?;
    }
    // Nobody may have a file of it open for a moment.
    client::ask(directories, &Request::EndWarming { name: device.name.clone() }, client::ANSWER_MARGIN)?;
    root.unmount(force)?;
    if device.verity.is_some() {
        close_mapped(&device.name, force)?;
    }
    // A device whose node is gone has no mounts that could be undone.
    if let Ok(number) = mounts::device_number(&device.device) {
        unmount(&device.name, number, force)?;
    }
    client::ask(directories, &Request::Remove { name: device.name.clone(), force }, client::ANSWER_MARGIN)?;
    root.forget()
}

fn is_busy(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::Busy)
}

/// Devices of a daemon that died can only be removed by one that took them back.
fn start_daemon_for_records(global: &Global, directories: &Directories) -> anyhow::Result<()> {
    let records = ublkimg_driver::daemon::state::Records::new(directories.devices()).read_all()?;
    if !records.is_empty() {
        let executable = std::env::current_exe()?;
        let daemon = || daemon::background(&executable, global, directories);
        client::ask_or_start(directories, daemon, &Request::Ping, client::ANSWER_MARGIN)?;
    }
    Ok(())
}

/// What dm-verity has made over a device.
fn mapped_over(device: &DeviceStatus) -> anyhow::Result<Option<Mapped>> {
    Ok(if device.verity.is_some() { verity::find(&device.name)? } else { None })
}

/// Unmounts the mapped device over the device with this name, and takes it down.
fn close_mapped(name: &str, force: bool) -> anyhow::Result<()> {
    if let Some(mapped) = verity::find(name)? {
        unmount(name, mapped.number, force)?;
    }
    // With `force` it goes when the last user does.
    Ok(verity::close(name, force)?)
}

fn unmount(name: &str, number: mounts::DeviceNumber, force: bool) -> anyhow::Result<()> {
    let own: Vec<mounts::Mount> = mounts::list()?.into_iter().filter(|mount| mount.device == number).collect();
    if !force {
        refuse_if_mounted_elsewhere(name, number)?;
    }
    // Stacked mounts come off last one first.
    for mount in own.iter().rev() {
        if super::mounted_device(&mount.mount_point)? != Some(number) {
            let place = mount.mount_point.display();
            let text = format!("{name} is mounted at {place}, below another mount there: unmount that first");
            return Err(Error::new(ErrorKind::Busy, text).into());
        }
        mount_helper::unmount(&mount.mount_point, force, UNMOUNT_TIMEOUT)?;
    }
    Ok(())
}

/// Looks for mounts that unmounting here would not reach, before anything is unmounted.
fn refuse_if_mounted_elsewhere(name: &str, number: mounts::DeviceNumber) -> anyhow::Result<()> {
    let Some(other) = propagation::out_of_reach(number)?.into_iter().next() else { return Ok(()) };
    let text = format!(
        "{name} is mounted at {} in the mount namespace of process {}: unmount it there, or use --force",
        other.mount_points.first().map_or_else(String::new, |path| path.display().to_string()),
        other.pid
    );
    Err(Error::new(ErrorKind::Busy, text).into())
}
