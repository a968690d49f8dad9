//! Loop devices, mounts and tools of the host, and whether they are there. Everything made here is undone on drop, so
//! also when a test panics.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why EROFS cannot be mounted here, if so.
pub(crate) fn no_mount() -> Option<&'static str> {
    if fs::metadata("/proc/self").map(|process| process.uid()).unwrap_or(1) != 0 {
        return Some("mounting needs root");
    }
    let knows_erofs = || fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("\terofs\n"));
    if !knows_erofs() {
        // Fails where there are no modules; the list tells.
        let _ = Command::new("modprobe").arg("erofs").output();
    }
    if !knows_erofs() {
        return Some("the kernel has no EROFS");
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("there are no loop devices");
    }
    ["losetup", "mount", "umount"].into_iter().find(|tool| no_tool(tool)).map(|_| "losetup or mount is missing")
}

pub(crate) fn no_tool(name: &str) -> bool {
    Command::new(name).arg("--version").output().is_err()
}

/// Runs a command; panics with its output if it fails. Returns what it printed.
pub(crate) fn run<A: AsRef<OsStr>>(program: &str, args: &[A]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

/// A read-only loop device.
pub(crate) struct Loop {
    pub(crate) device: PathBuf,
}

impl Loop {
    pub(crate) fn new(file: &Path) -> Self {
        // Finding a free device and taking it are two steps; somebody else may be faster.
        const ATTEMPTS: usize = 20;
        for _ in 0..ATTEMPTS {
            let args = [OsStr::new("--find"), OsStr::new("--show"), OsStr::new("--read-only"), file.as_os_str()];
            let output = Command::new("losetup").args(args).output().unwrap();
            if output.status.success() {
                return Self { device: PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()) };
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("no free loop device for {}", file.display());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// A mounted EROFS.
pub(crate) struct Mount {
    pub(crate) path: PathBuf,
    _loops: Vec<Loop>,
}

impl Mount {
    /// Mounts an image on `path`, with further files as the devices of its device table.
    pub(crate) fn new(path: &Path, image: &Path, devices: &[PathBuf]) -> Self {
        fs::create_dir_all(path).unwrap();
        let primary = Loop::new(image);
        let mut loops: Vec<_> = devices.iter().map(|file| Loop::new(file)).collect();
        let mut options = String::from("ro");
        for device in &loops {
            options.push_str(&format!(",device={}", device.device.display()));
        }
        let args = ["-t", "erofs", "-o", &options, primary.device.to_str().unwrap(), path.to_str().unwrap()];
        run("mount", &args);
        loops.push(primary);
        Self { path: path.to_owned(), _loops: loops }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Before the loops go, which are dropped after this. A thread of another test that starts a program holds copies
        // of our open files from its fork to its exec, so "busy" is normal, and passes.
        const ATTEMPTS: usize = 100;
        for _ in 0..ATTEMPTS {
            if Command::new("umount").arg(&self.path).output().is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        // Detached it goes when its last user does. Nobody should be one: say so, unless a panic is under way.
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
        assert!(std::thread::panicking(), "{} stayed busy", self.path.display());
    }
}
