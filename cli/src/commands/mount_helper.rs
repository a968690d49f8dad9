//! `ublkimg mount-helper`: mounts or unmounts in a process of its own, because both may block in the kernel until a
//! server answers, and a process can be killed where a thread cannot.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ublkimg_driver::daemon::Directories;
use ublkimg_driver::daemon::protocol::DeviceStatus;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::mounts;
use ublkimg_driver::warm::{self, Warmer};

use crate::args::{Global, MountHelper};

/// How often a helper is asked whether it has ended.
const POLL: Duration = Duration::from_millis(2);

pub(super) fn run(global: &Global, command: MountHelper) -> anyhow::Result<()> {
    match command.device {
        Some(device) => {
            mounts::mount_erofs(&device, &command.directory)?;
            // The mount works without it.
            if let Err(error) = mounts::warm(&device, command.warm_bytes) {
                tracing::warn!("the metadata is not read ahead: {}", error.chain());
            }
            if let Some(name) = command.warm {
                let directories = super::directories(global)?;
                if warm::go_on_alone()? {
                    let metadata_bytes = command.warm_bytes;
                    let warmer = Warmer { directories, name, device, metadata_bytes, mount: command.directory };
                    warmer.run()?;
                }
            }
        }
        None if command.detach => mounts::detach(&command.directory)?,
        None => mounts::unmount(&command.directory)?,
    }
    Ok(())
}

/// Mounts `device` at `directory` in this process's mount namespace, within `timeout`.
/// The first `metadata_bytes` of the device are then in the page cache.
pub(super) fn mount(
    directories: &Directories,
    device: &DeviceStatus,
    directory: &Path,
    timeout: Duration,
) -> anyhow::Result<()> {
    let what = format!("mounting {} at {}", device.device.display(), directory.display());
    let warm_bytes = device.metadata_bytes.to_string();
    let mut options: Vec<&OsStr> =
        vec!["--device".as_ref(), device.device.as_os_str(), "--warm-bytes".as_ref(), OsStr::new(&warm_bytes)];
    if device.warms {
        let run_dir = ["--run-dir".as_ref(), directories.run.as_os_str()];
        options.extend(run_dir.into_iter().chain(["--warm".as_ref(), OsStr::new(&device.name)]));
    }
    help(options.into_iter().chain([directory.as_os_str()]), &what, timeout)
}

/// Unmounts `directory`, within `timeout`; with `detach` also when it is in use.
pub(super) fn unmount(directory: &Path, detach: bool, timeout: Duration) -> anyhow::Result<()> {
    let what = format!("unmounting {}", directory.display());
    let flag = if detach { Some(OsStr::new("--detach")) } else { None };
    help(flag.into_iter().chain([directory.as_os_str()]), &what, timeout)
}

fn help<'a>(arguments: impl IntoIterator<Item = &'a OsStr>, what: &str, timeout: Duration) -> anyhow::Result<()> {
    run_own(std::iter::once("mount-helper".as_ref()).chain(arguments), what, timeout)
}

/// Runs a command of this program, within `timeout`; an error says what it was about, or what the command said.
pub(super) fn run_own<S: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = S>,
    what: &str,
    timeout: Duration,
) -> anyhow::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        // The program may be a copy that has the runtime's name, which would be a runtime again.
        .arg0("ublkimg")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + timeout;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            return Err(
                Error::new(ErrorKind::TimedOut, format!("{what} took more than {} s", timeout.as_secs())).into()
            );
        }
        std::thread::sleep(POLL);
    }
    let ended = child.wait_with_output()?;
    if ended.status.success() {
        return Ok(());
    }
    let kind = ended.status.code().and_then(ErrorKind::from_exit_code).unwrap_or(ErrorKind::Internal);
    let text = String::from_utf8_lossy(&ended.stderr);
    let text = text.trim().strip_prefix("ublkimg: ").unwrap_or(text.trim()).to_owned();
    Err(Error::new(kind, if text.is_empty() { format!("{what} failed ({})", ended.status) } else { text }).into())
}
