//! `ublkimg add`: attach, and mount in the caller's mount namespace.
//!
//! Can be repeated: a device of that name that serves that reference is found and printed again. What this run made is
//! taken back if a later step fails, so nothing is left half-made.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use ublkimg_driver::daemon::protocol::{
    AddRequest, Answer, DeviceStatus, FillMode, ProfileRequest, Request, StartOptions,
};
use ublkimg_driver::daemon::{Directories, client, device_name};
use ublkimg_driver::device::{DataPath, QueueOptions, Transport};
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::{mounts, verity};
use ublkimg_registry::usual_credential_files;

use super::root::{self, Root};
use super::{daemon, fill, local, mount_helper};
use crate::args::{Add, AttachArguments, DataPathArgument, FillArgument, Global, OnTimeout, TransportArgument};
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
    let directories = super::directories(global)?;
    let mut request = add_request(command)?;
    if command.convert {
        let reference = super::location(&command.reference)?;
        request.name.get_or_insert_with(|| device_name(&request.reference));
        let registry = &command.attach.registry;
        request.reference = local::convert_here(&directories, &reference, registry, command.verity)?.to_string();
    }
    let target = match (&command.mount, &command.overlay) {
        (None, _) => Target::None,
        (Some(directory), None) => Target::Directory(directory),
        (Some(directory), Some(upper)) => {
            let upper = upper.as_deref().map(super::absolute).transpose()?;
            Target::Root(Root { directory, config: None, upper })
        }
    };
    let attached = attach(global, &directories, request, &target, command.attach.timeout);
    let (device, mount) = attached.map_err(|error| with_way_out(error, command))?;
    if command.wait.is_some() {
        fill::wait(&directories, &device.name)?;
    }
    print(command.json, &device, mount.as_deref())
}

/// An image that nobody converted can be converted here.
fn with_way_out(error: anyhow::Error, command: &Add) -> anyhow::Error {
    match error.downcast_ref::<Error>() {
        Some(cause) if cause.kind() == ErrorKind::NotOurs && !command.convert && !command.verity => {
            let reference = &command.reference;
            let text = format!("{cause}, or `ublkimg add --convert {reference}` to convert it on this host");
            Error::new(ErrorKind::NotOurs, text).into()
        }
        _ => error,
    }
}

/// Where an image is mounted.
pub(super) enum Target<'a> {
    None,
    Directory(&'a Path),
    /// Under a writable root.
    Root(Root<'a>),
}

/// Attaches an image, starting the daemon if there is none, and mounts it. A device that this made is taken back when it
/// cannot be mounted.
pub(super) fn attach(
    global: &Global,
    directories: &Directories,
    request: AddRequest,
    target: &Target<'_>,
    timeout: Duration,
) -> anyhow::Result<(DeviceStatus, Option<PathBuf>)> {
    let deadline = Instant::now() + timeout;
    let is_auto = request.transport == Transport::Auto;
    let with_verity = request.verity;
    let executable = std::env::current_exe()?;
    let daemon = || daemon::background(&executable, global, directories);
    let answer = client::ask_or_start(directories, daemon, &Request::Add(request), timeout + client::ANSWER_MARGIN)?;
    let Answer::Added { mut device, created } = answer else { return Err(super::unexpected(&answer)) };
    if is_auto && device.transport == Transport::Fuse {
        eprintln!(
            "ublkimg: no ublk here (see `ublkimg doctor`): served by a FUSE file, which does not survive a crash of the daemon"
        );
    }
    let remaining = deadline.saturating_duration_since(Instant::now()).max(MOUNT_MIN_TIMEOUT);
    let mounted = set_up(directories, &mut device, with_verity, target, remaining);
    match mounted {
        Ok(mount) => Ok((*device, mount)),
        Err(error) => {
            if created {
                if with_verity {
                    let _ = verity::close(&device.name, false);
                }
                let remove = Request::Remove { name: device.name, force: true };
                let _ = client::ask(directories, &remove, client::ANSWER_MARGIN);
            }
            Err(error)
        }
    }
}

/// What a new device gets over it: the verity target, of which `device` then names the device, and the mount.
fn set_up(
    directories: &Directories,
    device: &mut DeviceStatus,
    with_verity: bool,
    target: &Target<'_>,
    timeout: Duration,
) -> anyhow::Result<Option<PathBuf>> {
    if let Some(table) = device.verity.as_ref().filter(|_| with_verity) {
        device.device = verity::open(&device.name, &device.device, table)?.path;
    }
    let mount = match target {
        Target::None => return Ok(None),
        Target::Directory(directory) => mount_at(directories, device, directory, timeout)?,
        Target::Root(wanted) => root::mount(directories, device, wanted, timeout)?,
    };
    if with_verity {
        // It goes when it is unmounted, whoever does that.
        verity::close(&device.name, true)?;
    }
    Ok(Some(mount))
}

fn add_request(command: &Add) -> anyhow::Result<AddRequest> {
    let start = StartOptions {
        profile: profile(&command.start.profile)?,
        command: command.start.command.clone(),
        record: !command.attach.no_record,
        read_ahead_kb: command.start.read_ahead_kb,
        fill: if command.wait.is_some() { FillMode::Full } else { fill_mode(command.attach.fill) },
        warm: command.attach.warm.is_on(),
    };
    let request = request(&command.reference, command.name.as_deref(), &command.attach, start)?;
    Ok(AddRequest { verity: command.verity, ..request })
}

pub(super) fn request(
    reference: &str,
    name: Option<&str>,
    attach: &AttachArguments,
    start: StartOptions,
) -> anyhow::Result<AddRequest> {
    Ok(AddRequest {
        reference: super::location(reference)?.to_string(),
        name: name.map(str::to_owned),
        transport: transport(attach.transport),
        queue: queue(attach),
        plain_http: attach.registry.plain_http,
        auth_file: attach.registry.auth_file.as_deref().map(super::absolute).transpose()?,
        credential_files: usual_credential_files(),
        hosts_dirs: attach.registry.hosts_dirs.clone(),
        attach_timeout_ms: milliseconds(attach.timeout),
        read_timeout_ms: milliseconds(attach.io_timeout),
        holds_reads: attach.on_timeout == OnTimeout::Hold,
        verity: false,
        start,
    })
}

fn queue(attach: &AttachArguments) -> QueueOptions {
    let data_path = match attach.data_path {
        DataPathArgument::Auto => None,
        DataPathArgument::ZeroCopy => Some(DataPath::ZeroCopy),
        DataPathArgument::Copy => Some(DataPath::Copy),
    };
    QueueOptions { data_path, depth: attach.queue_depth }
}

pub(super) fn transport(argument: TransportArgument) -> Transport {
    match argument {
        TransportArgument::Auto => Transport::Auto,
        TransportArgument::Ublk => Transport::Ublk,
        TransportArgument::Fuse => Transport::Fuse,
    }
}

pub(super) fn fill_mode(argument: FillArgument) -> FillMode {
    match argument {
        FillArgument::Off => FillMode::Off,
        FillArgument::Idle => FillMode::Idle,
        FillArgument::Full => FillMode::Full,
    }
}

/// Names of profiles have no slash, so what has one is a file.
pub(super) fn profile(text: &str) -> anyhow::Result<ProfileRequest> {
    Ok(match text {
        "auto" => ProfileRequest::Auto,
        "none" => ProfileRequest::None,
        _ if text.contains('/') => {
            let path = Path::new(text);
            // Here and not in the daemon, so that it is said at once.
            std::fs::metadata(path).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Error::caused(ErrorKind::NotFound, format!("no trace {text}"), error),
                _ => Error::io(format!("cannot read {text}"), error),
            })?;
            ProfileRequest::File(super::absolute(path)?)
        }
        _ => ProfileRequest::Named(text.to_owned()),
    })
}

pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Mounts the device, unless it is mounted there already; gives the mount point as the mount table has it.
pub(super) fn mount_at(
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
        None => mount_helper::mount(directories, device, directory, timeout)?,
    }
    let request = Request::Mounted { name: device.name.clone(), directory: PathBuf::from(directory) };
    if let Err(error) = client::ask(directories, &request, client::ANSWER_MARGIN) {
        let _ = mount_helper::unmount(directory, true, timeout);
        return Err(error.into());
    }
    Ok(())
}

/// Makes the mount point if it is missing; tells whether it did.
pub(super) fn make_directory(directory: &Path) -> anyhow::Result<bool> {
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
