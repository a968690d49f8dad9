//! Blocks that a profile foretells in the page cache before anybody reads them, on this machine's kernel.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use ublkimg_tests::host::{self, Host, wait_until};
use ublkimg_tests::leaks;
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Auth, LinkConfig};
use ublkimg_tests::sample_image::noise;
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};

/// Blocks of the file of the image.
const BLOCKS: usize = 1024;

/// Blocks that are left to the reader: the end of the trace, and one stretch of 64 in 8 before it.
const LEFT: usize = 64 + 64;

const NAME: &str = "data-v1";

/// A host that has nothing of an image with a file `file`, and the image with a profile of a program that reads the file from
/// its end, page by page.
fn host_with_profile() -> Host {
    let host = Host::new(Auth::Anonymous);
    let layers =
        [Layer { tar: archive(&[Entry::file("dir/file", content())], LongNames::Pax), compression: Compression::None }];
    OciLayout::create(&host.root.join("source")).unwrap().add_image("v1", &layers).unwrap();
    host.convert("source", "data");
    let mount = add(&host, &["--no-record"]);
    host.ublkimg(&["record", "start", NAME, "--read-ahead-kb", "0"]).success();
    read(&mount, (0..BLOCKS).rev());
    let trace = host.root.join("trace");
    host.ublkimg(&["record", "stop", NAME, "-o", trace.to_str().unwrap()]).success();
    let reference = host.registry.reference("data", "v1");
    host.ublkimg(&["optimize", &reference, "--trace", trace.to_str().unwrap(), "--default"]).success();
    host.ublkimg(&["rm", NAME]).success();
    host.ublkimg(&["daemon", "--stop"]).success();
    std::fs::remove_dir_all(host.root.join("store")).unwrap();
    host
}

fn content() -> Vec<u8> {
    noise(5, BLOCKS * 4096)
}

fn add(host: &Host, arguments: &[&str]) -> PathBuf {
    let mount = host.root.join("mnt");
    host.add("data", &[&["--mount", mount.to_str().unwrap()], arguments].concat()).success();
    mount
}

/// Reads blocks of the file, and compares them.
fn read(mount: &Path, blocks: impl Iterator<Item = usize>) {
    let (content, file) = (content(), std::fs::File::open(mount.join("dir/file")).unwrap());
    for block in blocks {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, block as u64 * 4096).unwrap();
        assert!(bytes == content[block * 4096..][..4096], "block {block}");
    }
}

fn figure(host: &Host, pointer: &str) -> u64 {
    let status: Value = serde_json::from_str(&host.ublkimg(&["status", "--json", NAME]).success().stdout).unwrap();
    status.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} in {status}"))
}

fn pushed_blocks(host: &Host) -> usize {
    usize::try_from(figure(host, "/start/first_reads/pushed_blocks")).unwrap()
}

/// First reads of others than the warmer.
fn first_reads(host: &Host) -> u64 {
    ["hits", "late_hits", "misses"].map(|kind| figure(host, &format!("/start/first_reads/{kind}"))).iter().sum()
}

/// The process ids of the host's warmers.
fn warmers(host: &Host) -> Vec<i32> {
    let all = leaks::processes_of(host.root.path());
    let warmers = all.iter().filter(|process| process.contains(" mount-helper "));
    warmers.map(|process| process.split(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn what_is_pushed_is_read_from_memory_and_counted_apart() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_profile();
    let mount = add(&host, &["--warm", "on"]);
    wait_until("all is pushed, save what is left to the reader", || pushed_blocks(&host) == BLOCKS - LEFT);
    wait_until("the warmer ends", || warmers(&host).is_empty());
    assert_eq!(first_reads(&host), 0, "nobody has read anything");

    let device_reads = figure(&host, "/counters/reads");
    let ranks = |ranks: std::ops::Range<usize>| ranks.map(|rank| BLOCKS - 1 - rank);
    read(&mount, ranks(0..448).chain(ranks(512..960)));
    assert_eq!(figure(&host, "/counters/reads"), device_reads, "a read of what was pushed came to the device");
    read(&mount, ranks(0..BLOCKS));
    assert_eq!(first_reads(&host), LEFT as u64);
    assert_eq!(figure(&host, "/start/first_reads/misses"), 0);
    host.end();
}

#[test]
fn a_warmer_that_is_killed_is_not_missed() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_profile();
    host.registry.set_link(LinkConfig::new(20, 1));
    let mount = add(&host, &["--warm", "on"]);
    wait_until("something is pushed", || pushed_blocks(&host) > 0);
    let [warmer] = warmers(&host)[..] else { panic!("one warmer: {:?}", warmers(&host)) };
    let warmer = rustix::process::Pid::from_raw(warmer).unwrap();
    rustix::process::kill_process(warmer, rustix::process::Signal::KILL).unwrap();
    wait_until("it is gone", || warmers(&host).is_empty());
    read(&mount, (0..BLOCKS).rev());
    assert!(pushed_blocks(&host) < BLOCKS - LEFT, "it was killed too late to tell");
    host.end();
}

#[test]
fn an_image_is_removed_while_it_is_pushed() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_profile();
    host.registry.set_link(LinkConfig::new(20, 1));
    for _ in 0..5 {
        let mount = add(&host, &["--warm", "on"]);
        wait_until("something is pushed", || pushed_blocks(&host) > 0);
        host.ublkimg(&["rm", mount.to_str().unwrap()]).success();
        wait_until("the warmer ends", || warmers(&host).is_empty());
        host.ublkimg(&["daemon", "--stop"]).success();
        std::fs::remove_dir_all(host.root.join("store")).unwrap();
    }
    host.end();
}

#[test]
fn nothing_is_pushed_when_it_is_not_to_be_or_while_it_is_recorded() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = host_with_profile();
    let has_arrived = || figure(&host, "/start/prefetch_bytes") > 4 * 1024 * 1024;
    add(&host, &["--warm", "off"]);
    assert_eq!(warmers(&host), [] as [i32; 0]);
    wait_until("what the profile names arrives", has_arrived);
    assert_eq!(pushed_blocks(&host), 0);
    host.ublkimg(&["rm", NAME]).success();

    // A recording takes the place of the warmer, whatever it has still to do.
    host.ublkimg(&["cache", "gc", "--unused"]).success();
    host.registry.set_link(LinkConfig::new(20, 1));
    let mount = add(&host, &["--warm", "on"]);
    wait_until("something is pushed", || pushed_blocks(&host) > 0);
    host.ublkimg(&["record", "start", NAME, "--read-ahead-kb", "0"]).success();
    wait_until("the warmer ends", || warmers(&host).is_empty());
    let pushed = pushed_blocks(&host);
    assert!(pushed < BLOCKS - LEFT, "it was recorded too late to tell");
    read(&mount, (0..BLOCKS).rev());
    assert_eq!(pushed_blocks(&host), pushed);
    assert_eq!(first_reads(&host), (BLOCKS - pushed) as u64, "the others were read, and recorded");
    host.end();
}
