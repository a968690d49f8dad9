//! A host under test: a registry with images, a daemon's directories, and the command line.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Outcome, isolated, ublkimg, ublkimg_path};
use crate::leaks;
use crate::oci_layout::{Compression, Layer, OciLayout};
use crate::registry::{Auth, Config, TestRegistry};
use crate::sample_image::{SampleImage, noise};
use crate::skip;
use crate::tar::{Entry, LongNames, archive};
use crate::temp_root::TempRoot;

/// Why devices cannot be tested here.
pub fn lacking() -> Option<&'static str> {
    let has_erofs = std::fs::read_to_string("/proc/filesystems").is_ok_and(|types| types.contains("\terofs\n"));
    let has_ublk = Path::new("/dev/ublk-control").exists();
    let has_fuse = Path::new("/dev/fuse").exists() && Path::new("/dev/loop-control").exists();
    match () {
        () if !skip::is_root() => Some("devices need root"),
        () if !has_erofs => Some("this kernel has no EROFS"),
        () if !has_ublk && !has_fuse => Some("this kernel has neither ublk nor FUSE and loop devices"),
        () => None,
    }
}

/// Returns when that is so.
///
/// # Panics
///
/// It is not within a minute.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// See the module. Methods panic when something does not work that should.
pub struct Host {
    /// All that the test makes lies below.
    pub root: TempRoot,
    /// Where its images come from.
    pub registry: TestRegistry,
    /// Those of others.
    ublk_devices: Vec<String>,
    _alone: MutexGuard<'static, ()>,
}

/// One daemon at a time: a server that starts holds, for a moment, the mounts of all others, and removing a device in that
/// moment is refused.
static ALONE: Mutex<()> = Mutex::new(());

impl Host {
    /// With an empty registry.
    pub fn new(auth: Auth) -> Self {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let root = TempRoot::new().unwrap();
        let registry = TestRegistry::start(Config { auth, ..Config::default() }).unwrap();
        Self { root, registry, ublk_devices: leaks::ublk_devices(), _alone }
    }

    /// With the sample image converted, as `sample:v1`.
    pub fn with_sample() -> Self {
        let host = Self::new(Auth::Anonymous);
        SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
        host.convert("source", "sample");
        host
    }

    /// With an image that runc can run, as `shell:v1`: busybox and a file `data` of 1 MiB.
    ///
    /// # Errors
    /// Why there is none here.
    pub fn with_shell() -> Result<Self, &'static str> {
        if let Some(reason) = lacking() {
            return Err(reason);
        }
        if !std::fs::read_to_string("/proc/filesystems").is_ok_and(|types| types.contains("\toverlay\n")) {
            return Err("this kernel has no overlayfs");
        }
        if Command::new("runc").arg("--version").stdout(Stdio::null()).status().is_err() {
            return Err("there is no runc");
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find_map(|path| std::fs::read(path).ok());
        let Some(busybox) = busybox else { return Err("there is no busybox") };
        let host = Self::new(Auth::Anonymous);
        let links = ["sh", "cat", "sleep"].map(|name| Entry::symlink(&format!("bin/{name}"), "busybox"));
        let mut entries = vec![
            Entry::file("bin/busybox", busybox).mode(0o755),
            Entry::file("data", noise(3, 1 << 20)),
            Entry::file("etc/passwd", "root:x:0:0::/:/bin/sh\n"),
        ];
        entries.extend(links);
        let layers = [Layer { tar: archive(&entries, LongNames::Pax), compression: Compression::None }];
        OciLayout::create(&host.root.join("source")).unwrap().add_image("v1", &layers).unwrap();
        host.convert("source", "shell");
        Ok(host)
    }

    /// Converts the image of the layout `layout` below the root, and serves it as `repository:v1`.
    pub fn convert(&self, layout: &str, repository: &str) {
        let source = format!("oci:{}:v1", self.root.join(layout).display());
        let destination = self.root.join("converted").join(repository);
        self.ublkimg(&["convert", &source, &format!("oci:{}:v1", destination.display())]).success();
        self.registry.load_layout(&destination, Some("v1"), repository, "v1").unwrap();
    }

    /// Runs a command with this host's directories.
    pub fn ublkimg(&self, arguments: &[&str]) -> Outcome {
        ublkimg(self.root.path()).args(arguments).run()
    }

    /// Starts the daemon by a command that runs the words after its own, as `strace`, `unshare` and `prlimit` do, and waits
    /// until it listens.
    pub fn daemon_under(&self, wrapper: &[&str]) -> Child {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(ublkimg_path()).arg("daemon");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut daemon = isolated(command, self.root.path()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.root.join("run/daemon.sock").exists() {
            assert_eq!(daemon.try_wait().unwrap(), None, "the daemon under {wrapper:?} ended");
            assert!(Instant::now() < deadline, "the daemon under {wrapper:?} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    /// `ublkimg add` of `repository:v1` with more arguments.
    pub fn add(&self, repository: &str, arguments: &[&str]) -> Outcome {
        let reference = self.registry.reference(repository, "v1");
        ublkimg(self.root.path()).args(["add", &reference]).args(arguments).run()
    }

    /// Adds and mounts an image; returns the mount point.
    pub fn mounted(&self, repository: &str) -> PathBuf {
        let dir = self.root.join(format!("mnt-{repository}"));
        self.add(repository, &["--mount", dir.to_str().unwrap(), "--read-timeout", "5s"]).success();
        dir
    }

    /// What `ls` lists.
    pub fn devices(&self) -> Vec<Value> {
        let list = self.ublkimg(&["ls", "--json"]).success();
        serde_json::from_str::<Value>(&list.stdout).unwrap().as_array().unwrap().clone()
    }

    /// `kill -9` of the server of all devices.
    pub fn kill_server(&self) {
        let processes = leaks::processes_of(self.root.path());
        let server = processes.iter().find(|process| process.contains("--server")).unwrap();
        let (id, _command) = server.split_once(' ').unwrap();
        assert!(Command::new("kill").args(["-9", id]).status().unwrap().success());
    }

    /// The log of the daemon.
    pub fn log(&self) -> String {
        let files = std::fs::read_dir(self.root.join("run")).unwrap().map(|entry| entry.unwrap().path());
        let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.map(|path| std::fs::read_to_string(path).unwrap()).collect()
    }

    /// Removes all devices, ends the daemon, and looks for what is left.
    pub fn end(self) {
        for device in self.devices() {
            self.ublkimg(&["rm", device["name"].as_str().unwrap()]).success();
        }
        self.ublkimg(&["daemon", "--stop"]).success();
        assert_eq!(leaks::left_behind(self.root.path()), Vec::<String>::new());
        assert_eq!(leaks::ublk_devices(), self.ublk_devices, "ublk devices");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // No daemon may outlive its test, whatever went wrong.
        if std::thread::panicking() && self.root.join("run").exists() {
            let log = self.log();
            let start = log.len().saturating_sub(4000);
            eprintln!("the end of the daemon's log:\n{}", log.get(start..).unwrap_or(&log));
            for device in self.devices() {
                self.ublkimg(&["rm", "--force", device["name"].as_str().unwrap_or_default()]);
            }
            self.ublkimg(&["daemon", "--stop"]);
        }
    }
}
