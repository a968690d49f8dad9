//! What a start took, as a page and as figures that are shown again and again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use ublkimg_tests::command::ublkimg;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::skip;

#[test]
fn a_start_is_one_page_that_needs_nothing_else() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let mount = host.mounted("sample");
    let read = Command::new("tar").arg("-cf").arg("-").arg(&mount).output().unwrap();
    assert!(read.status.success());
    host.ublkimg(&["ready", mount.to_str().unwrap()]).success();
    let trace = host.root.join("start.trace");
    host.ublkimg(&["record", "stop", mount.to_str().unwrap(), "-o", trace.to_str().unwrap()]).success();
    let path = host.root.join("start.html");
    host.ublkimg(&["report", mount.to_str().unwrap(), "-o", path.to_str().unwrap()]).success();
    let page = std::fs::read_to_string(&path).unwrap();
    for part in [
        "<svg ",
        "sample:v1</title>",
        "<tr><th>misses<td",
        "<tr><th>time to ready<td>",
        "<tr><th>layers of the image<td>",
        "<tr><th>/data/prose<td",
        "</html>",
    ] {
        assert!(page.contains(part), "{part}");
    }
    for outside in ["<script", "<link", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    host.ublkimg(&["report", "nothing", "-o", path.to_str().unwrap()]).refused(3, &["nothing"]);
    host.end();
}

#[test]
fn figures_are_shown_until_the_device_goes() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let mount = host.mounted("sample");
    let name = host.devices()[0]["name"].as_str().unwrap().to_owned();
    let shown = std::thread::scope(|scope| {
        let root = host.root.path().to_owned();
        let watch = scope.spawn(move || ublkimg(&root).args(["status", &name, "--watch=10ms"]).run());
        // Long enough for a second look, however busy the machine is: that it was shown again is all that is asked.
        std::thread::sleep(std::time::Duration::from_millis(1500));
        host.ublkimg(&["rm", mount.to_str().unwrap()]).success();
        watch.join().unwrap()
    });
    assert!(shown.success().stdout.matches("\nmanifest ").count() > 1);
    host.end();
}

#[test]
fn devices_are_shown_at_work() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    assert_eq!(host.ublkimg(&["top", "-n", "1", "--delay", "1ms"]).success().stdout.lines().count(), 1);
    let mount = host.mounted("sample");
    let shown = std::thread::scope(|scope| {
        let root = host.root.path().to_owned();
        let top = scope.spawn(move || ublkimg(&root).args(["top", "-n", "2", "--delay", "2s"]).run());
        std::thread::sleep(std::time::Duration::from_millis(500));
        let read = Command::new("tar").arg("-cf").arg("-").arg(&mount).output().unwrap();
        assert!(read.status.success());
        top.join().unwrap()
    });
    let shown = shown.success().stdout;
    assert_eq!(shown.matches("NAME ").count(), 2, "{shown}");
    let rows: Vec<Vec<&str>> = shown
        .lines()
        .filter(|line| line.starts_with("sample-v1 "))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows.len(), 2, "{shown}");
    assert!(rows.iter().any(|row| row[1].parse::<u64>().unwrap() > 0), "{shown}");
    host.end();
}
