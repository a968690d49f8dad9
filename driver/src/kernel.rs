//! What the machine has of what we need, and what to do about each thing missing.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::device::fuse::FUSE_PATH;
use crate::device::ublk_control::CONTROL_PATH as UBLK_PATH;
use crate::device::{Transport, loop_device, ublk};
use crate::error::{Error, ErrorKind, Result};

/// Names of the `UBLK_F_*` bits, from bit 0 (`include/uapi/linux/ublk_cmd.h`, Linux 7.2).
const UBLK_FEATURES: [&str; 20] = [
    "SUPPORT_ZERO_COPY",
    "URING_CMD_COMP_IN_TASK",
    "NEED_GET_DATA",
    "USER_RECOVERY",
    "USER_RECOVERY_REISSUE",
    "UNPRIVILEGED_DEV",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "ZONED",
    "USER_RECOVERY_FAIL_IO",
    "UPDATE_SIZE",
    "AUTO_BUF_REG",
    "QUIESCE",
    "PER_IO_DAEMON",
    "BUF_REG_OFF_DAEMON",
    "BATCH_IO",
    "INTEGRITY",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
    "SHMEM_ZC",
];
/// What the ublk transport needs of them: USER_RECOVERY and USER_RECOVERY_REISSUE.
const UBLK_FEATURES_NEEDED: u64 = 1 << 3 | 1 << 4;

/// One thing that the host may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Short name: `root`, `ublk`, `io_uring`, `erofs`, `fuse`, `loop`, `overlayfs`.
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

impl HostReport {
    /// Whether the thing of that name was found usable.
    #[must_use]
    pub fn usable(&self, name: &str) -> bool {
        self.checks.iter().any(|check| check.name == name && check.usable)
    }

    /// What is missing of `names`, with remedies, on one line; none when nothing is.
    fn missing(&self, names: &[&str]) -> Option<String> {
        let missing: Vec<_> = self
            .checks
            .iter()
            .filter(|check| !check.usable && names.contains(&check.name.as_str()))
            .map(|check| match &check.remedy {
                Some(remedy) => format!("{}: {} ({remedy})", check.name, check.found),
                None => format!("{}: {}", check.name, check.found),
            })
            .collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    }
}

/// Looks at the host. Changes nothing: loads no module, creates no device.
#[must_use]
pub fn probe() -> HostReport {
    let features = ublk::features();
    let ublk_features = match &features {
        Ok(bits) => feature_names(*bits),
        Err(_) => Vec::new(),
    };
    let checks = vec![
        check_root(),
        check_ublk(features),
        check_io_uring(),
        check_file_system("erofs", "erofs", "EROFS_FS"),
        check_node("fuse", FUSE_PATH, "fuse", "FUSE_FS"),
        check_node("loop", loop_device::CONTROL_PATH, "loop", "BLK_DEV_LOOP"),
        check_file_system("overlayfs", "overlay", "OVERLAY_FS"),
    ];
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut report = HostReport { kernel, transport: None, ublk_features, checks };
    report.transport =
        [Transport::Ublk, Transport::Fuse].into_iter().find(|transport| report.missing(needs(*transport)).is_none());
    report
}

/// The transport to use: `auto` is ublk where it works, else FUSE. Loads missing modules once, when root.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with one line that says what is missing and what to do.
pub fn choose(wanted: Transport) -> Result<Transport> {
    let candidates = match wanted {
        Transport::Auto => &[Transport::Ublk, Transport::Fuse][..],
        Transport::Ublk => &[Transport::Ublk],
        Transport::Fuse => &[Transport::Fuse],
    };
    let mut report = probe();
    let mut reasons = Vec::new();
    for transport in candidates {
        if report.missing(needs(*transport)).is_some() && load_modules(&report, needs(*transport)) {
            report = probe();
        }
        match report.missing(needs(*transport)) {
            None => return Ok(*transport),
            Some(missing) => reasons.push(format!("{transport}: {missing}")),
        }
    }
    Err(Error::new(ErrorKind::Unsupported, format!("no transport works; {}", reasons.join("; "))))
}

fn needs(transport: Transport) -> &'static [&'static str] {
    match transport {
        Transport::Ublk | Transport::Auto => &["root", "ublk", "io_uring", "erofs"],
        Transport::Fuse => &["root", "fuse", "loop", "erofs"],
    }
}

/// Tries each module that there is once; true when any was loaded.
fn load_modules(report: &HostReport, names: &[&str]) -> bool {
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    let module = |name: &str| match name {
        "ublk" => Some("ublk_drv"),
        "erofs" => Some("erofs"),
        "fuse" => Some("fuse"),
        "loop" => Some("loop"),
        _ => None,
    };
    let mut loaded = false;
    for name in names.iter().filter(|name| !report.usable(name)) {
        let Some(module) = module(name).filter(|module| matches!(module_state(module), ModuleState::Available)) else {
            continue;
        };
        let mut command = Command::new("modprobe");
        command.args(["-q", "--", module]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match command.status() {
            Ok(status) if status.success() => loaded = true,
            Ok(status) => tracing::debug!(module, %status, "modprobe failed"),
            Err(error) => tracing::debug!(module, %error, "modprobe could not be run"),
        }
    }
    loaded
}

fn feature_names(bits: u64) -> Vec<String> {
    (0..u64::BITS)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| match UBLK_FEATURES.get(bit as usize) {
            Some(name) => (*name).to_owned(),
            None => format!("BIT_{bit}"),
        })
        .collect()
}

fn good(name: &str, found: impl Into<String>) -> Check {
    Check { name: name.into(), usable: true, found: found.into(), remedy: None }
}

fn bad(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check { name: name.into(), usable: false, found: found.into(), remedy: Some(remedy.into()) }
}

fn check_root() -> Check {
    let user = rustix::process::geteuid();
    if user.is_root() {
        good("root", "effective user 0")
    } else {
        bad("root", format!("effective user {}", user.as_raw()), "run it with sudo")
    }
}

fn check_ublk(features: Result<u64>) -> Check {
    let name = "ublk";
    if !Path::new(UBLK_PATH).exists() {
        let missing = format!("{UBLK_PATH} is missing");
        return match module_state("ublk_drv") {
            ModuleState::Loaded => bad(name, missing, "the driver is loaded: give this container the device"),
            ModuleState::Available => bad(name, missing, "modprobe ublk_drv"),
            ModuleState::Unknown => {
                bad(name, missing, "this kernel has no module ublk_drv (BLK_DEV_UBLK): take one that has, or use fuse")
            }
        };
    }
    if let Some(check) = check_open(name, UBLK_PATH) {
        return check;
    }
    match features {
        Ok(bits) if bits & UBLK_FEATURES_NEEDED == UBLK_FEATURES_NEEDED => good(name, format!("features {bits:#x}")),
        Ok(bits) => bad(name, format!("features {bits:#x} without user recovery"), "Linux 6.5 or later"),
        Err(error) => bad(name, format!("the driver does not tell its features: {error}"), "Linux 6.5 or later, root"),
    }
}

fn check_io_uring() -> Check {
    let name = "io_uring";
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    match io_uring::IoUring::new(2) {
        Ok(_) => good(name, "a ring can be set up"),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => bad(
            name,
            "the kernel has none, or it is filtered",
            "kernel option IO_URING; a seccomp profile that allows it",
        ),
        Err(error) if disabled.trim() == "2" || disabled.trim() == "1" => {
            bad(name, format!("switched off ({error})"), "sysctl kernel.io_uring_disabled=0")
        }
        Err(error) => {
            bad(name, format!("refused: {error}"), "a seccomp profile that allows io_uring_setup; `ulimit -l`")
        }
    }
}

fn check_node(name: &str, path: &str, module: &str, option: &str) -> Check {
    if Path::new(path).exists() {
        return check_open(name, path).unwrap_or_else(|| good(name, format!("{path} opens")));
    }
    let missing = format!("{path} is missing");
    match module_state(module) {
        ModuleState::Loaded => bad(name, missing, "the driver is loaded: give this container the device"),
        ModuleState::Available => bad(name, missing, format!("modprobe {module}")),
        ModuleState::Unknown => bad(name, missing, format!("a kernel with {option}")),
    }
}

/// None when it opens.
fn check_open(name: &str, path: &str) -> Option<Check> {
    let error = OpenOptions::new().read(true).write(true).open(path).err()?;
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => "run as root; a container also needs the device in its device cgroup",
        _ => "see `dmesg`",
    };
    Some(bad(name, format!("open {path}: {error}"), remedy))
}

fn check_file_system(name: &str, file_system: &str, option: &str) -> Check {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().next_back() == Some(file_system)) {
        return good(name, "in /proc/filesystems");
    }
    match module_state(file_system) {
        ModuleState::Available => bad(name, "not loaded", format!("modprobe {file_system}")),
        _ => bad(name, "not in /proc/filesystems", format!("a kernel with {option}")),
    }
}

enum ModuleState {
    /// In the kernel, or loaded.
    Loaded,
    /// A module of the running kernel.
    Available,
    /// Neither, as far as the module lists tell.
    Unknown,
}

fn module_state(module: &str) -> ModuleState {
    if Path::new("/sys/module").join(module).exists() {
        return ModuleState::Loaded;
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let directory = Path::new("/lib/modules").join(release);
    let listed = |file: &str| {
        let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
        // `kernel/drivers/block/ublk_drv.ko.xz: ...`; a dash in a file's name is an underscore in the module's.
        text.lines().any(|line| {
            let path = line.split(':').next().unwrap_or_default();
            let name = path.rsplit('/').next().unwrap_or_default().split('.').next().unwrap_or_default();
            name.replace('-', "_") == module
        })
    };
    if listed("modules.builtin") {
        ModuleState::Loaded
    } else if listed("modules.dep") {
        ModuleState::Available
    } else {
        ModuleState::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_names() {
        assert_eq!(feature_names(0b11000), ["USER_RECOVERY", "USER_RECOVERY_REISSUE"]);
        assert_eq!(feature_names(1 << 40), ["BIT_40"]);
        assert_eq!(feature_names(0xf_ffff).len(), UBLK_FEATURES.len());
    }

    #[test]
    fn everything_missing_has_a_remedy() {
        let report = probe();
        assert!(!report.kernel.is_empty());
        for check in &report.checks {
            assert_eq!(check.usable, check.remedy.is_none(), "{check:?}");
            assert!(!check.found.contains('\n'), "{check:?}");
        }
    }

    #[test]
    fn a_refusal_says_what_is_missing() {
        let checks = vec![good("root", ""), bad("fuse", "no /dev/fuse", "modprobe fuse"), good("loop", "")];
        let report = HostReport { kernel: String::new(), transport: None, ublk_features: Vec::new(), checks };
        assert_eq!(report.missing(needs(Transport::Fuse)).unwrap(), "fuse: no /dev/fuse (modprobe fuse)");
        assert_eq!(report.missing(&["root"]), None);
    }

    #[test]
    fn choosing_agrees_with_probing() {
        match choose(Transport::Auto) {
            Ok(transport) => assert_eq!(probe().transport, Some(transport)),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
}
