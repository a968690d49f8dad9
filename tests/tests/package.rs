//! The Debian package: built of the program under test, unpacked into an empty root, and looked at there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use ublkimg_tests::command::{Invocation, ublkimg_path};
use ublkimg_tests::skip;

fn has(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging")
}

fn output(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn the_package_unpacks_into_an_empty_root_and_works_there() {
    if !has("dpkg-deb") {
        skip!("there is no dpkg-deb");
    }
    let place = tempfile::tempdir().unwrap();
    let build = || Invocation::new(packaging().join("deb.sh")).arg(ublkimg_path()).arg(place.path()).run().success();
    let package = PathBuf::from(build().stdout.trim());
    let first = std::fs::read(&package).unwrap();
    build();
    assert!(std::fs::read(&package).unwrap() == first, "the same program gives the same package");

    let root = place.path().join("root");
    output(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root));
    for file in [
        "etc/ublkimg/config.toml",
        "usr/bin/ublkimg-runc",
        "usr/lib/modules-load.d/ublkimg.conf",
        "usr/lib/systemd/system/ublkimg.service",
        "usr/lib/systemd/system/ublkimg@.service",
        "usr/lib/tmpfiles.d/ublkimg.conf",
        "usr/share/bash-completion/completions/ublkimg",
        "usr/sbin/mount.ublkimg",
        "usr/share/doc/ublkimg/copyright",
        "usr/share/doc/ublkimg/grafana.json",
        "usr/share/man/man1/ublkimg-add.1.gz",
    ] {
        assert!(root.join(file).exists(), "{file}");
    }
    // A program without libraries needs nothing of the root.
    let config = root.join("etc/ublkimg/config.toml");
    let mut ls = Command::new(root.join("usr/bin/ublkimg"));
    ls.arg("--config").arg(config).arg("--root").arg(&root).arg("--run-dir").arg(&root).args(["ls", "--json"]);
    let shown = output(&mut ls);
    assert_eq!(shown.stdout, b"[]\n", "the packaged configuration is one");
    if skip::is_root() {
        let version = output(Command::new("chroot").arg(&root).args(["/usr/bin/ublkimg", "--version"]));
        assert!(version.stdout.starts_with(b"ublkimg "));
    }
    let control = output(Command::new("dpkg-deb").arg("-I").arg(&package));
    assert!(String::from_utf8_lossy(&control.stdout).contains("Package: ublkimg\n"));
}

#[test]
fn the_units_are_what_systemd_takes() {
    if !has("systemd-analyze") {
        skip!("there is no systemd-analyze");
    }
    // Its own directory, or the units would be looked for among those that are installed; and the program where they expect it.
    let place = tempfile::tempdir().unwrap();
    for unit in ["ublkimg.service", "ublkimg@.service"] {
        let text = std::fs::read_to_string(packaging().join("systemd").join(unit)).unwrap();
        let here = text.replace("/usr/bin/ublkimg", ublkimg_path().to_str().unwrap());
        std::fs::write(place.path().join(unit), here).unwrap();
    }
    let instance = place.path().join("ublkimg@weights.service");
    std::fs::copy(place.path().join("ublkimg@.service"), &instance).unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).arg(place.path().join("ublkimg.service")).arg(&instance);
    let said = String::from_utf8(verify.output().unwrap().stderr).unwrap();
    let ours: Vec<_> = said.lines().filter(|line| line.contains("ublkimg")).collect();
    assert!(ours.is_empty(), "{said}");
}
