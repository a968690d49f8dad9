//! `ublkimg add`: attach, and mount in the caller's mount namespace.
//!
//! Can be repeated: a device of that name that serves that reference is found and printed again. What this run made is
//! taken back if a later step fails, so nothing is left half-made.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use ublkimg_driver::daemon::protocol::{AddRequest, Answer, DeviceStatus, Request};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::device::Transport;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::mounts;

use super::{daemon, mount_helper};
use crate::args::{Add, Global, TransportArgument};
use crate::output;

/// A mount reads the superblock and the root, which are in the store: more time than this means that something hangs.
const MOUNT_MIN_TIMEOUT: Duration = Duration::from_secs(5);

/// What `add --json` prints.
#[derive(Serialize)]
struct Added<'a> {
    name: &'a str,
    device: &'a Path,
    mount: Option<&'a Path>,
    transport: Transport,
    manifest: &'a str,
    size_bytes: u64,
}

pub(super) fn run(global: &Global, command: &Add) -> anyhow::Result<()> {
    let deadline = Instant::now() + command.timeout;
    let directories = super::directories(global)?;
    let request = Request::Add(add_request(command)?);
    let executable = std::env::current_exe()?;
    let daemon = || daemon::background(&executable, global, &directories);
    let answer = client::ask_or_start(&directories, daemon, &request, command.timeout + client::ANSWER_MARGIN)?;
    let Answer::Added { device, created } = answer else { return Err(super::unexpected(&answer)) };
    if matches!(command.transport, TransportArgument::Auto) && device.transport == Transport::Fuse {
        eprintln!(
            "ublkimg: no ublk here (see `ublkimg doctor`): served by a FUSE file, which does not survive a crash of the daemon"
        );
    }
    let remaining = deadline.saturating_duration_since(Instant::now()).max(MOUNT_MIN_TIMEOUT);
    let mount = command.mount.as_deref().map(|directory| mount_at(&directories, &device, directory, remaining));
    match mount.transpose() {
        Ok(mount) => print(command.json, &device, mount.as_deref()),
        Err(error) => {
            if created {
                let remove = Request::Remove { name: device.name, force: true };
                let _ = client::ask(&directories, &remove, client::ANSWER_MARGIN);
            }
            Err(error)
        }
    }
}

fn add_request(command: &Add) -> anyhow::Result<AddRequest> {
    Ok(AddRequest {
        reference: super::location(&command.reference)?.to_string(),
        name: command.name.clone(),
        transport: match command.transport {
            TransportArgument::Auto => Transport::Auto,
            TransportArgument::Ublk => Transport::Ublk,
            TransportArgument::Fuse => Transport::Fuse,
        },
        plain_http: command.registry.plain_http,
        auth_file: command.registry.auth_file.as_deref().map(super::absolute).transpose()?,
        attach_timeout_ms: milliseconds(command.timeout),
        read_timeout_ms: milliseconds(command.read_timeout),
    })
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Mounts the device, unless it is mounted there already; gives the mount point as the mount table has it.
fn mount_at(
    directories: &Directories,
    device: &DeviceStatus,
    directory: &Path,
    timeout: Duration,
) -> anyhow::Result<PathBuf> {
    let made = make_directory(directory)?;
    let directory = super::resolved(directory)?;
    let mounted = mount_once(directories, device, &directory, timeout);
    if mounted.is_err() && made {
        let _ = std::fs::remove_dir(&directory);
    }
    mounted.map(|()| directory)
}

fn mount_once(
    directories: &Directories,
    device: &DeviceStatus,
    directory: &Path,
    timeout: Duration,
) -> anyhow::Result<()> {
    match super::mounted_device(directory)? {
        Some(mounted) if mounted == mounts::device_number(&device.device)? => return Ok(()),
        Some(_) => {
            let text = format!("{} is a mount point already: unmount it or choose another", directory.display());
            return Err(Error::new(ErrorKind::Busy, text).into());
        }
        None => mount_helper::mount(&device.device, directory, timeout)?,
    }
    let request = Request::Mounted { name: device.name.clone(), directory: PathBuf::from(directory) };
    if let Err(error) = client::ask(directories, &request, client::ANSWER_MARGIN) {
        let _ = mount_helper::unmount(directory, true, timeout);
        return Err(error.into());
    }
    Ok(())
}

/// Makes the mount point if it is missing; tells whether it did.
fn make_directory(directory: &Path) -> anyhow::Result<bool> {
    if directory.is_dir() {
        return Ok(false);
    }
    std::fs::create_dir_all(directory)
        .map_err(|error| Error::io(format!("cannot create the mount point {}", directory.display()), error))?;
    Ok(true)
}

fn print(json: bool, device: &DeviceStatus, mount: Option<&Path>) -> anyhow::Result<()> {
    if json {
        return output::json(&Added {
            name: &device.name,
            device: &device.device,
            mount,
            transport: device.transport,
            manifest: &device.manifest,
            size_bytes: device.size_bytes,
        });
    }
    match mount {
        Some(directory) => output::line(&format!("{} {}", device.device.display(), directory.display())),
        None => output::line(&device.device.display().to_string()),
    }
}
