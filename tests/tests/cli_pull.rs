//! Images brought onto a host before they are needed, as builds of machine images use it, on this machine's kernel.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use serde_json::Value;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::registry::{Auth, Config, Fault, TestRegistry, Toxic};
use ublkimg_tests::skip;

fn pull(host: &Host, options: &[&str]) -> Value {
    let reference = host.registry.reference("sample", "v1");
    let output = host.ublkimg(&[&["pull", &reference, "--json"], options].concat()).success();
    serde_json::from_str(&output.stdout).unwrap()
}

/// All that the registry answers now is a refused connection.
fn cut(host: &Host) {
    host.registry.set_fault("away", Fault::new("*", Toxic::Refuse));
}

#[test]
fn what_was_pulled_needs_no_registry() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let pulled = pull(&host, &[]);
    assert_eq!(pulled["present_bytes"], pulled["total_bytes"], "{pulled}");
    assert!(!host.root.join("run/daemon.sock").exists(), "no daemon is needed");
    // Again: nothing is fetched.
    host.registry.reset_stats();
    assert_eq!(pull(&host, &[]), pulled);
    assert_eq!(host.registry.stats().blobs.len(), 0, "{:?}", host.registry.stats().blobs);
    cut(&host);
    let mount: PathBuf = host.root.join("mnt");
    // By its tag, which nobody can resolve now.
    host.add("sample", &["--mount", mount.to_str().unwrap(), "--read-timeout", "2s"]).success();
    let read = std::process::Command::new("tar").arg("-cf").arg("-").arg(&mount).output().unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    assert!(read.stdout.len() > 1 << 20);
    host.end();
}

#[test]
fn a_daemon_that_runs_is_asked() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let mount = host.mounted("sample");
    let pulled = pull(&host, &[]);
    assert_eq!(pulled["present_bytes"], pulled["total_bytes"], "{pulled}");
    assert_eq!(host.devices().len(), 1);
    cut(&host);
    let read = std::process::Command::new("tar").arg("-cf").arg("-").arg(&mount).output().unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    host.end();
}

#[test]
fn only_what_a_profile_names() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let reference = host.registry.reference("sample", "v1");
    host.ublkimg(&["pull", &reference, "--what", "profile"]).refused(3, &["profile", &reference]);
    let (list, trace) = (host.root.join("list"), host.root.join("list.trace"));
    let file = {
        let mount = host.mounted("sample");
        let mut files: Vec<PathBuf> = walk(&mount);
        files.sort_by_key(|file| std::cmp::Reverse(std::fs::metadata(file).unwrap().len()));
        host.ublkimg(&["rm", mount.to_str().unwrap()]).success();
        files[0].strip_prefix(&mount).unwrap().to_owned()
    };
    host.ublkimg(&["daemon", "--stop"]).success();
    std::fs::remove_dir_all(host.root.join("store")).unwrap();
    std::fs::write(&list, format!("/{}\n", file.display())).unwrap();
    let made = ["trace", "from-list", list.to_str().unwrap(), "--image", &reference, "-o", trace.to_str().unwrap()];
    host.ublkimg(&made).success();
    let pulled = pull(&host, &["--what", "profile", "--profile", trace.to_str().unwrap()]);
    let (present, total) = (pulled["present_bytes"].as_u64().unwrap(), pulled["total_bytes"].as_u64().unwrap());
    assert!(present > 0 && present < total, "{pulled}");
    cut(&host);
    let mount = host.root.join("mnt");
    host.add("sample", &["--mount", mount.to_str().unwrap(), "--read-timeout", "2s"]).success();
    assert!(std::fs::read(mount.join(&file)).is_ok());
    host.end();
}

fn walk(directory: &std::path::Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let below = entries.flat_map(|entry| match entry.file_type().unwrap() {
        kind if kind.is_dir() => walk(&entry.path()),
        kind if kind.is_file() => vec![entry.path()],
        _ => Vec::new(),
    });
    below.collect()
}

#[test]
fn a_name_that_nobody_attached_needs_its_registry() {
    let host = Host::new(Auth::Anonymous);
    let other = TestRegistry::start(Config::default()).unwrap();
    other.set_fault("away", Fault::new("*", Toxic::Status { code: 404 }));
    let reference = other.reference("sample", "v1");
    host.ublkimg(&["pull", &reference]).refused(3, &[&reference]);
}

#[test]
fn a_disk_that_is_full_is_said_to_be() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let small = host.root.tmpfs("small", 2 << 20).unwrap();
    let reference = host.registry.reference("sample", "v1");
    let small = small.to_str().unwrap();
    let full = host.ublkimg(&["--root", small, "pull", &reference]);
    assert_eq!(full.code, Some(10), "{}", full.stderr);
    assert!(full.stderr.lines().last().unwrap().contains("the disk of the store is full"), "{}", full.stderr);
    rustix::mount::unmount(small, rustix::mount::UnmountFlags::DETACH).unwrap();
    host.end();
}
