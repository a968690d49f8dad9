//! The commonest mistakes, each made as a new user would: one line, which names the thing and what to do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::chown;
use std::path::Path;

use ublkimg_tests::command::{Invocation, ublkimg_path};
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::registry::Auth;
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::skip;

/// `nobody`, on every system.
const NOBODY: u32 = 65534;

/// The last line of a command that fails, without the names that differ from run to run.
#[track_caller]
fn mistake(host: &Host, arguments: &[&str], code: i32, line: &str) {
    let outcome = host.ublkimg(arguments);
    outcome.refused(code, &[]);
    let said = outcome.stderr.lines().last().unwrap();
    let said = said.replace(&host.registry.addr().to_string(), "REGISTRY");
    let said = said.replace(&host.root.path().display().to_string(), "ROOT");
    assert_eq!(said, line);
}

#[test]
fn names_and_registries() {
    let host = Host::with_sample();
    SampleImage::default().write_layout(&host.root.join("plain"), "v1").unwrap();
    host.registry.load_layout(&host.root.join("plain"), Some("v1"), "plain", "v1").unwrap();
    let reference = |repository: &str, tag: &str| host.registry.reference(repository, tag);
    mistake(
        &host,
        &["pull", &reference("sample", "v9")],
        3,
        "ublkimg: resolve REGISTRY/sample:v9: repository REGISTRY/sample has no tag v9",
    );
    mistake(
        &host,
        &["pull", &reference("Sample", "v1")],
        2,
        "ublkimg: \"REGISTRY/Sample:v1\" is not an image reference: a repository is lower-case letters, digits and single . _ - \
         between them, in parts divided by /",
    );
    let plain = host.ublkimg(&["pull", &reference("plain", "v1")]);
    plain.refused(5, &["plain:v1", "not an ublkimg image", "run `ublkimg convert"]);
    mistake(&host, &["rm", "app"], 3, "ublkimg: no device app: `ublkimg ls` lists those there are");
    mistake(&host, &["status", "/mnt/app"], 3, "ublkimg: no device /mnt/app: `ublkimg ls` lists those there are");
}

#[test]
fn credentials() {
    let credentials = ublkimg_tests::registry::Credentials { user: "u".into(), password: "p".into() };
    let host = Host::new(Auth::Basic(credentials));
    mistake(
        &host,
        &["pull", &host.registry.reference("app", "v1")],
        4,
        "ublkimg: resolve REGISTRY/app:v1: registry REGISTRY wants credentials for repository app; run \"docker login \
         REGISTRY\" or give --auth-file",
    );
}

#[test]
fn a_kernel_without_ublk() {
    if Path::new("/dev/ublk-control").exists() {
        skip!("this kernel has ublk");
    }
    let host = Host::with_sample();
    let add = ["add", &host.registry.reference("sample", "v1"), "--transport", "ublk"];
    let outcome = host.ublkimg(&add);
    outcome.refused(8, &["/dev/ublk-control", "fuse"]);
    host.ublkimg(&["daemon", "--stop"]).success();
}

#[test]
fn without_root() {
    if !skip::is_root() {
        skip!("only root can become nobody");
    }
    let host = Host::new(Auth::Anonymous);
    chown(host.root.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let program = host.root.join("ublkimg");
    std::fs::copy(ublkimg_path(), &program).unwrap();
    let id = NOBODY.to_string();
    let add = Invocation::new("setpriv")
        .args(["--reuid", &id, "--regid", &id, "--clear-groups"])
        .arg(&program)
        .args(["--config", "/dev/null", "--root", "/var/lib/ublkimg-of-root", "--run-dir", "/run/ublkimg-of-root"])
        .args(["add", &host.registry.reference("app", "v1")])
        .run();
    add.refused(12, &["/var/lib/ublkimg-of-root", "run it as root"]);
}

#[test]
fn a_registry_that_is_not_there() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::new(Auth::Anonymous);
    let away = host.ublkimg(&["add", "registry.invalid/app:1", "--attach-timeout", "1s"]);
    away.refused(7, &["registry.invalid"]);
    host.end();
}

#[test]
fn mount_points_and_devices_in_use() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    host.convert("source", "other");
    let mount = host.mounted("sample");
    let text = mount.display().to_string();
    mistake(
        &host,
        &["add", &host.registry.reference("other", "v1"), "--name", "other", "--mount", &text],
        9,
        "ublkimg: ROOT/mnt-sample is a mount point already: unmount it or choose another",
    );
    let name = host.devices()[0]["name"].as_str().unwrap().to_owned();
    mistake(
        &host,
        &["add", &host.registry.reference("other", "v1"), "--name", &name],
        9,
        &format!("ublkimg: {name} serves REGISTRY/sample:v1 already: give another --name")
            .replace(&host.registry.addr().to_string(), "REGISTRY"),
    );
    let held = std::fs::File::open(&mount).unwrap();
    host.ublkimg(&["rm", &name]).refused(9, &[&text]);
    drop(held);
    host.end();
}
