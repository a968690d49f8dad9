//! What the daemon may call and take: the system calls of its unit, and so many descriptors.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::leaks;
use ublkimg_tests::skip;
use ublkimg_tests::temp_root::TempRoot;

/// Which of these programs is not here; `option` makes them do nothing.
fn missing(programs: &[(&'static str, &str)]) -> Option<&'static str> {
    let runs = |program, option| {
        Command::new(program).arg(option).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    programs.iter().find(|(program, option)| !runs(*program, *option)).map(|(program, _)| *program)
}

/// The system calls that a word of the unit's filter allows; a group begins with @.
fn allowed(word: &str) -> BTreeSet<String> {
    if !word.starts_with('@') {
        return BTreeSet::from([word.to_owned()]);
    }
    let listed = Command::new("systemd-analyze").args(["syscall-filter", "--no-pager", word]).output().unwrap();
    assert!(listed.status.success(), "systemd knows no group {word}");
    let listed = String::from_utf8(listed.stdout).unwrap();
    let members = listed.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    members.flat_map(allowed).collect()
}

/// The system calls in what `strace -f` wrote: `PID NAME(...`.
fn called(trace: &str) -> BTreeSet<String> {
    let call = |line: &str| {
        let call = line.split_once(' ')?.1.trim_start().split_once('(')?.0;
        let is_name = call.chars().all(|char| char.is_ascii_alphanumeric() || char == '_');
        is_name.then(|| call.to_owned())
    };
    trace.lines().filter_map(call).collect()
}

#[test]
fn every_system_call_of_a_daemon_is_one_that_the_unit_allows() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if let Some(program) = missing(&[("strace", "-V"), ("systemd-analyze", "--version")]) {
        skip!("there is no {program}");
    }
    let unit = include_str!("../../packaging/systemd/ublkimg.service");
    let filter = unit.lines().find_map(|line| line.strip_prefix("SystemCallFilter=")).unwrap();
    let allowed: BTreeSet<String> = filter.split(' ').flat_map(allowed).collect();

    let host = Host::with_sample();
    let elsewhere = TempRoot::new().unwrap();
    let trace = elsewhere.join("trace");
    let mut daemon = host.daemon_under(&["strace", "-f", "-qq", "-o", trace.to_str().unwrap()]);
    // The guard too is watched: it brings back a server that was killed.
    let server = || leaks::processes_of(host.root.path()).into_iter().find(|process| process.contains("--server"));
    let first = server().unwrap();
    host.kill_server();
    host::wait_until("another server", || server().is_some_and(|server| server != first));
    let dir = host.mounted("sample");
    assert_eq!(std::fs::read(dir.join("etc/added")).unwrap(), b"added\n");
    host.ublkimg(&["cache", "verify"]).success();
    host.ublkimg(&["cache", "gc"]).success();
    host.end();
    daemon.wait().unwrap();
    let called = called(&std::fs::read_to_string(&trace).unwrap());
    assert!(called.len() > 40 && called.contains("unshare"), "it was traced: {called:?}");
    assert_eq!(called.difference(&allowed).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn a_daemon_without_free_descriptors_refuses_images_and_serves_those_it_has() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if let Some(program) = missing(&[("prlimit", "--version")]) {
        skip!("there is no {program}");
    }
    /// The daemon keeps 128 free, and has some thirty itself.
    const DESCRIPTORS: &str = "--nofile=256:256";
    let host = Host::with_sample();
    let mut daemon = host.daemon_under(&["prlimit", DESCRIPTORS]);
    let dir = host.mounted("sample");
    let names: Vec<String> = (0..64).map(|number| format!("more-{number}")).collect();
    let mut attached = 0;
    let refused = loop {
        let fault = FaultRow::begins("too many images for the limit of descriptors");
        let outcome = host.add("sample", &["--name", &names[attached], "--fill", "off"]);
        if outcome.code != Some(0) {
            fault.ends("the command fails with exit code 9; images attached before are served on: data");
            break outcome;
        }
        attached += 1;
    };
    refused.refused(9, &["of 256 descriptors"]);
    assert!(attached > 0, "not one image fits");
    // Whatever was not read yet is fetched over connections of its own.
    assert_eq!(std::fs::read(dir.join("etc/added")).unwrap(), b"added\n");
    assert_eq!(std::fs::read(dir.join("data/noise")).unwrap().len(), 2 * 1024 * 1024 + 17);
    assert_eq!(host.devices().len(), attached + 1);
    // What is removed makes room.
    for name in &names[..attached] {
        host.ublkimg(&["rm", name]).success();
    }
    host.add("sample", &["--name", "again"]).success();
    host.end();
    daemon.wait().unwrap();
}
