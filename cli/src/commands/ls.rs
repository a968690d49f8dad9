//! `ublkimg ls`: the devices.

use ublkimg_driver::daemon::Directories;
use ublkimg_driver::daemon::client;
use ublkimg_driver::daemon::protocol::{Answer, DeviceStatus, Request};
use ublkimg_driver::daemon::state::Records;

use crate::args::{Global, Ls};
use crate::output;

pub(super) fn run(global: &Global, command: &Ls) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let devices = list(&directories)?;
    if devices.is_none() {
        let left = Records::new(directories.devices()).read_all()?;
        if !left.is_empty() {
            eprintln!("ublkimg: the daemon does not run; {} devices wait for `ublkimg daemon`", left.len());
        }
    }
    let devices = devices.unwrap_or_default();
    if command.json {
        return output::json(&devices);
    }
    let rows: Vec<[String; 5]> = devices.iter().map(row).collect();
    output::table(["NAME", "DEVICE", "TRANSPORT", "MOUNT", "REFERENCE"], &rows)
}

fn row(device: &DeviceStatus) -> [String; 5] {
    let mounts: Vec<String> = device.mounts.iter().map(|path| path.display().to_string()).collect();
    [
        device.name.clone(),
        device.device.display().to_string(),
        device.transport.to_string(),
        if mounts.is_empty() { "-".to_owned() } else { mounts.join(",") },
        device.reference.clone(),
    ]
}

/// All devices of the daemon; none without a daemon.
pub(super) fn list(directories: &Directories) -> anyhow::Result<Option<Vec<DeviceStatus>>> {
    match client::ask(directories, &Request::List, client::ANSWER_MARGIN)? {
        None => Ok(None),
        Some(Answer::Devices(devices)) => Ok(Some(devices)),
        Some(answer) => Err(super::unexpected(&answer)),
    }
}
