//! `ublkimg status`: one device in detail.

use ublkimg_driver::daemon::Directories;
use ublkimg_driver::daemon::protocol::DeviceStatus;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::mounts;

use super::ls;
use crate::args::{Global, Status};
use crate::output;

pub(super) fn run(global: &Global, command: &Status) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let device = find(&directories, &command.target)?;
    if command.json {
        return output::json(&device);
    }
    let counters = &device.counters;
    let mounts: Vec<String> = device.mounts.iter().map(|path| path.display().to_string()).collect();
    for (label, value) in [
        ("name", device.name.clone()),
        ("reference", device.reference.clone()),
        ("manifest", device.manifest.clone()),
        ("device", device.device.display().to_string()),
        ("transport", device.transport.to_string()),
        ("mounts", mounts.join(" ")),
        ("size", output::bytes(device.size_bytes)),
        ("reads", format!("{} ({})", counters.reads, output::bytes(counters.read_bytes))),
        ("hits", counters.hits.to_string()),
        ("late hits", counters.late_hits.to_string()),
        ("misses", counters.misses.to_string()),
        ("errors", counters.errors.to_string()),
        ("fetched", format!("{} chunks ({})", counters.fetched_chunks, output::bytes(counters.fetched_bytes))),
        ("registry requests", counters.registry_requests.to_string()),
        ("stored", output::bytes(device.stored_bytes)),
        ("verification failures", counters.verification_failures.to_string()),
    ] {
        output::line(format!("{label:22}{value}").trim_end())?;
    }
    Ok(())
}

/// The device that `target` names: by its name, its path, or a mount point of it. What is mounted there now, in this mount
/// namespace, counts before what was mounted there once.
pub(super) fn find(directories: &Directories, target: &str) -> anyhow::Result<DeviceStatus> {
    let devices = ls::list(directories)?.unwrap_or_default();
    let path = super::resolved(std::path::Path::new(target))?;
    let by_name = || devices.iter().position(|device| device.name == target);
    let by_path = || devices.iter().position(|device| device.device == path);
    let recorded = || devices.iter().position(|device| device.mounts.contains(&path));
    let mounted = super::mounted_device(&path)?;
    let by_mount = || {
        let number = mounted?;
        devices.iter().position(|device| mounts::device_number(&device.device).is_ok_and(|own| own == number))
    };
    let found = by_name().or_else(by_path).or_else(by_mount).or_else(recorded);
    found.and_then(|index| devices.into_iter().nth(index)).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("no device {target}: `ublkimg ls` lists those there are")).into()
    })
}
