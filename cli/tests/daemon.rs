//! The daemon's commands on a machine without ublk: what is left behind, what can be repeated, what the exit codes are.
//! Needs root, `/dev/fuse`, loop devices and EROFS; prints why when it is skipped.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A converted image and a daemon's directories; ends the daemon when dropped.
struct Host {
    dir: TempDir,
}

/// What the tests need and the machine lacks.
fn missing() -> Option<&'static str> {
    let _ = Command::new("modprobe").args(["-q", "erofs"]).status();
    let file_systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    [
        ("root", rustix::process::geteuid().is_root()),
        ("/dev/fuse", Path::new("/dev/fuse").exists()),
        ("/dev/loop-control", Path::new("/dev/loop-control").exists()),
        ("a kernel with EROFS", file_systems.contains("erofs")),
    ]
    .into_iter()
    .find_map(|(need, is_there)| (!is_there).then_some(need))
}

impl Host {
    fn new() -> Option<Self> {
        if let Some(need) = missing() {
            eprintln!("SKIP: needs {need}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "content").unwrap();
        let host = Self { dir };
        assert_code(&host.run(&["convert", &format!("dir:{}", source.display()), &host.image()]), 0);
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    fn image(&self) -> String {
        format!("oci:{}:a", self.dir.path().join("images").display())
    }

    fn command_of(&self, root: &str, run: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ublkimg"));
        command.arg("--root").arg(self.path(root)).arg("--run-dir").arg(self.path(run)).args(arguments);
        command
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.command_of("root", "run", arguments)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// `add --transport fuse`; gives what it printed.
    #[track_caller]
    fn add(&self, name: &str, mount: &Path) -> String {
        let mount = mount.to_str().unwrap();
        let added = self.run(&["add", &self.image(), "--name", name, "--mount", mount, "--transport", "fuse"]);
        assert_code(&added, 0);
        text(&added.stdout)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for name in ["a", "b"] {
            self.run(&["rm", "--force", name]);
        }
        self.run(&["daemon", "--stop"]);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

#[track_caller]
fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
}

/// The error: one line on stderr.
#[track_caller]
fn error_line(output: &Output, code: i32) -> String {
    assert_code(output, code);
    let line = text(&output.stderr);
    assert!(line.starts_with("ublkimg: ") && !line.contains('\n'), "{line}");
    line
}

fn mounts_at(directory: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.split(' ').nth(4) == directory.to_str()).count()
}

#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[track_caller]
fn wait_until_ended(mut child: Child) {
    wait_until("the guard ends", || child.try_wait().unwrap().is_some());
}

#[test]
fn without_a_daemon_there_is_nothing_and_none_is_started() {
    let Some(host) = Host::new() else { return };
    assert_code(&host.run(&["ls"]), 0);
    assert_eq!(text(&host.run(&["ls", "--json"]).stdout), "[]");
    assert!(error_line(&host.run(&["status", "one"]), 3).contains("one"));
    assert!(error_line(&host.run(&["rm", "one"]), 3).contains("one"));
    assert_code(&host.run(&["daemon", "--stop"]), 0);
    assert!(!host.path("run").exists());
}

#[test]
fn adding_again_through_a_link_finds_the_mount() {
    let Some(host) = Host::new() else { return };
    let (real, link) = (host.path("real"), host.path("link"));
    fs::create_dir(&real).unwrap();
    symlink(&real, &link).unwrap();
    let added = host.add("a", &link.join("m"));
    assert!(added.starts_with("/dev/loop") && added.ends_with(real.join("m").to_str().unwrap()), "{added}");
    assert_eq!(host.add("a", &link.join("m")), added);
    assert_eq!(mounts_at(&real.join("m")), 1);
    assert_code(&host.command(&["status", "m"]).current_dir(&real).output().unwrap(), 0);
    assert_code(&host.run(&["rm", link.join("m").to_str().unwrap()]), 0);
    assert_eq!(mounts_at(&real.join("m")), 0);
    assert_eq!(fs::read_dir(host.path("run/fuse")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(host.path("root/devices")).unwrap().count(), 0);
}

#[test]
fn a_mount_point_names_what_is_mounted_there_now() {
    let Some(host) = Host::new() else { return };
    let place = host.path("m");
    host.add("a", &place);
    assert!(Command::new("umount").arg(&place).status().unwrap().success());
    host.add("b", &place);
    assert_code(&host.run(&["rm", place.to_str().unwrap()]), 0);
    assert_code(&host.run(&["status", "a"]), 0);
    assert_code(&host.run(&["status", "b"]), 3);
}

#[test]
fn what_somebody_else_mounted_over_an_image_is_not_unmounted() {
    let Some(host) = Host::new() else { return };
    let place = host.path("m");
    host.add("a", &place);
    assert!(Command::new("mount").args(["-t", "tmpfs", "over"]).arg(&place).status().unwrap().success());
    let refused = host.run(&["rm", "a"]);
    let mounts = mounts_at(&place);
    assert!(Command::new("umount").arg(&place).status().unwrap().success());
    assert!(error_line(&refused, 9).contains(place.to_str().unwrap()));
    assert_eq!(mounts, 2);
    assert_code(&host.run(&["rm", "a"]), 0);
}

#[test]
fn a_new_guard_watches_the_server_of_a_killed_one_and_ends_with_it() {
    let Some(host) = Host::new() else { return };
    let mut killed = host.command(&["daemon"]).spawn().unwrap();
    host.add("a", &host.path("m"));
    killed.kill().unwrap();
    killed.wait().unwrap();
    let guard = host.command(&["daemon"]).spawn().unwrap();
    assert_eq!(fs::read_to_string(host.path("m/file")).unwrap(), "content");
    assert_code(&host.run(&["rm", "a"]), 0);
    assert_code(&host.run(&["daemon", "--stop"]), 0);
    wait_until_ended(guard);
    assert!(!host.path("run/daemon.sock").exists());
}

#[test]
fn a_daemon_does_not_hold_the_mounts_of_another() {
    let Some(host) = Host::new() else { return };
    host.add("a", &host.path("m"));
    // Its mount namespace begins as a copy of ours, the mount of the image included.
    let other = host.command_of("root2", "run2", &["daemon"]).spawn().unwrap();
    wait_until("the other daemon serves", || host.path("run2/daemon.sock").exists());
    let removed = host.run(&["rm", "a"]);
    assert_code(&host.command_of("root2", "run2", &["daemon", "--stop"]).output().unwrap(), 0);
    wait_until_ended(other);
    assert_code(&removed, 0);
}

#[test]
fn a_server_that_cannot_start_says_why_and_nothing_stays() {
    let Some(host) = Host::new() else { return };
    fs::create_dir(host.path("root")).unwrap();
    fs::write(host.path("root/objects"), "in the way").unwrap();
    let line = error_line(&host.run(&["add", &host.image(), "--transport", "fuse"]), 12);
    assert!(line.contains(host.path("root/objects").to_str().unwrap()), "{line}");
    assert!(!host.path("run/daemon.sock").exists());
}
