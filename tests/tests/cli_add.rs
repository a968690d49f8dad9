//! `ublkimg add` to `rm` as scripts use them, on this machine's kernel: over ublk where it has it, else over a FUSE file.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use ublkimg_tests::compare::compare_trees;
use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Auth, Credentials, Fault, Toxic};
use ublkimg_tests::sample_image::{SampleImage, noise};
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};
use ublkimg_tests::temp_root::TempRoot;

#[test]
fn the_mounted_tree_is_that_of_the_source() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let comparison = TempRoot::new().unwrap();
    let expected = comparison.tmpfs("expected", 64 << 20).unwrap();
    SampleImage::default().write_expected_tree(&expected).unwrap();
    let mount = host.root.join("mnt");
    let added = host.add("sample", &["--mount", mount.to_str().unwrap()]).success();
    let device = added.stdout.split(' ').next().unwrap().to_owned();
    assert_eq!(added.stdout, format!("{device} {}\n", mount.display()), "the device, the mount point, nothing else");
    assert!(device.starts_with("/dev/"), "{device}");

    assert_eq!(compare_trees(&expected, &mount).unwrap(), Vec::<String>::new());
    let again = compare_trees(&expected, &mount).unwrap();
    assert_eq!(again, Vec::<String>::new());
    let stats = host.registry.stats();
    assert_eq!(stats.duplicate_bytes, 0, "nothing is fetched twice");

    let repeated = host.add("sample", &["--mount", mount.to_str().unwrap()]).success();
    assert_eq!(repeated.stdout, added.stdout, "idempotent");
    assert_eq!(host.devices().len(), 1);
    let status = host.ublkimg(&["status", "--json", mount.to_str().unwrap()]).success();
    let status: Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["device"], device.as_str(), "{status}");

    host.ublkimg(&["rm", mount.to_str().unwrap()]).success();
    assert_eq!(host.devices(), Vec::<Value>::new());
    assert_eq!(std::fs::metadata(&mount).unwrap().dev(), std::fs::metadata(host.root.path()).unwrap().dev());
    host.ublkimg(&["rm", mount.to_str().unwrap()]).refused(3, &["mnt"]);
    host.end();
}

/// A process in a mount namespace of its own, whose mounts have this propagation; it ends with the test.
fn namespace(propagation: &str) -> Elsewhere {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", propagation, "sh", "-c", "echo there; exec cat"]);
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "there\n");
    Elsewhere(process)
}

struct Elsewhere(Child);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn copies_in_the_namespaces_of_services_go_too() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let elsewhere = TempRoot::new().unwrap();
    let shared = elsewhere.tmpfs("shared", 1 << 20).unwrap();
    Command::new("mount").arg("--make-shared").arg(&shared).status().unwrap();
    // As systemd-udevd has it, and all units with a sandbox.
    let service = namespace("slave");
    let mount = shared.join("mnt");
    let mount = mount.to_str().unwrap();
    host.add("sample", &["--mount", mount]).success();
    let seen = std::fs::read_to_string(format!("/proc/{}/mountinfo", service.0.id())).unwrap();
    assert!(seen.contains(mount), "the service has a copy: {seen}");
    host.ublkimg(&["rm", mount]).success();
    assert_eq!(host.devices(), Vec::<Value>::new());

    // As a container's own mounts: unmounting here does not reach them.
    host.add("sample", &["--mount", mount]).success();
    let container = namespace("private");
    host.ublkimg(&["rm", mount]).refused(9, &["mnt", &format!("process {}", container.0.id())]);
    assert!(Path::new(mount).join("etc/replaced").exists(), "nothing was unmounted");
    drop(container);
    host.ublkimg(&["rm", mount]).success();
    drop(service);
    host.end();
}

#[test]
fn little_is_fetched_for_little() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    host.registry.reset_stats();
    let mount = host.mounted("sample");
    let attached = host.registry.stats();
    assert!(attached.bytes_sent < 200_000, "{} bytes to attach an image of 6 MB", attached.bytes_sent);
    assert_eq!(std::fs::read(mount.join("etc/replaced")).unwrap(), b"new\n");
    assert_eq!(std::fs::read(mount.join("links/b")).unwrap(), b"not linked any more\n");
    let read = host.registry.stats();
    assert!(read.bytes_sent < attached.bytes_sent + 1_000_000, "{} bytes for two small files", read.bytes_sent);
    assert_eq!(read.duplicate_bytes, 0);
    host.end();
}

#[test]
fn a_layer_of_two_images_is_fetched_once() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::new(Auth::Anonymous);
    let layer = |entry: Entry| Layer { tar: archive(&[entry], LongNames::Pax), compression: Compression::None };
    for own in ["one", "two"] {
        let layout = OciLayout::create(&host.root.join(own)).unwrap();
        let layers = [layer(Entry::file("shared", noise(9, 2_000_000))), layer(Entry::file("own", own))];
        layout.add_image("v1", &layers).unwrap();
        host.convert(own, own);
    }
    let mounts = ["one", "two"].map(|repository| (repository, host.mounted(repository)));
    for (own, mount) in &mounts {
        assert!(std::fs::read(mount.join("shared")).unwrap() == noise(9, 2_000_000));
        assert_eq!(std::fs::read_to_string(mount.join("own")).unwrap(), *own);
    }
    assert_eq!(host.devices().len(), 2);
    assert_eq!(host.registry.stats().duplicate_bytes, 0, "{:#?}", host.registry.stats().blobs);
    host.end();
}

#[test]
fn a_changed_chunk_is_an_error_and_never_data() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::new(Auth::Anonymous);
    let contents = noise(11, 4 << 20);
    let layers = [Layer {
        tar: archive(&[Entry::file("noise", contents.clone())], LongNames::Pax),
        compression: Compression::None,
    }];
    OciLayout::create(&host.root.join("source")).unwrap().add_image("v1", &layers).unwrap();
    host.convert("source", "noise");
    let index: Value = serde_json::from_slice(&host.registry.manifest("noise", "v1").unwrap().unwrap()).unwrap();
    let manifest = index["manifests"][0]["digest"].as_str().unwrap();
    let manifest: Value = serde_json::from_slice(&host.registry.manifest("noise", manifest).unwrap().unwrap()).unwrap();
    let blob = manifest["layers"][0]["digest"].as_str().unwrap();
    // Noise does not compress, so the middle of the blob is about the middle of the file.
    let offset_bytes = manifest["layers"][0]["size"].as_u64().unwrap() / 2;
    let flip = Fault::new(&format!("*/blobs/{blob}"), Toxic::BitFlip { offset_bytes });
    host.registry.set_fault("flip", flip);

    let mount = host.mounted("noise");
    let file = std::fs::File::open(mount.join("noise")).unwrap();
    let mut failed = BTreeSet::new();
    for page in 0..contents.len() / 4096 {
        let mut buffer = [0; 4096];
        match std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer, page as u64 * 4096) {
            Ok(()) => assert!(buffer == contents[page * 4096..][..4096], "page {page}"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(5), "page {page}: {error}");
                failed.insert(page);
            }
        }
    }
    drop(file);
    let (first, last) = (*failed.first().unwrap(), *failed.last().unwrap());
    assert!(failed.len() == last - first + 1 && failed.len() <= 64, "one chunk, no more: {failed:?}");
    let log = host.log();
    let line = log.lines().find(|line| line.contains(blob)).unwrap_or_else(|| panic!("{blob} is not in:\n{log}"));
    assert!(line.contains("chunk"), "{line}");
    host.registry.clear_fault("flip");
    host.end();
}

#[test]
fn a_registry_that_is_away_is_needed_by_nothing_but_reads() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let mount = host.mounted("sample");
    let mount = mount.to_str().unwrap();
    let prose = std::fs::read(Path::new(mount).join("data/prose")).unwrap();
    host.registry.set_fault("down", Fault::new("*", Toxic::Refuse));
    assert!(std::fs::read(Path::new(mount).join("data/prose")).unwrap() == prose);
    host.ublkimg(&["status", "--json", mount]).success();
    host.ublkimg(&["rm", mount]).success();
    let start = Instant::now();
    host.end();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

/// With `--on-timeout hold` a read outlasts any `--io-timeout`; `eio`, the default, is beside it.
#[test]
fn a_read_that_is_held_waits_beyond_its_time_limit() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    for (on_timeout, is_held) in [("eio", false), ("hold", true)] {
        let host = Host::with_sample();
        let mount = host.root.join("mnt");
        let options = ["--mount", mount.to_str().unwrap(), "--profile", "none", "--io-timeout", "1s"];
        host.add("sample", &[&options[..], &["--on-timeout", on_timeout]].concat()).success();
        host.registry.set_fault("down", Fault::new("*", Toxic::Refuse));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| std::fs::read(mount.join("data/prose")));
            if is_held {
                std::thread::sleep(Duration::from_secs(4));
                assert!(!reader.is_finished(), "it gave up");
                let status = host.ublkimg(&["status", "--json", mount.to_str().unwrap()]).success();
                let status: Value = serde_json::from_str(&status.stdout).unwrap();
                let address = host.registry.addr().to_string();
                let waiting = &status["waiting"];
                assert!(waiting["since_ms"].as_u64().unwrap() >= 2500, "{waiting}");
                assert!(waiting["cause"].as_str().unwrap().contains(&address), "{waiting}");
                let what = waiting["what"].as_str().unwrap();
                assert!(what.contains("of blob sha256:"), "{waiting}");
                let status = host.ublkimg(&["status", mount.to_str().unwrap()]).success().stdout;
                assert!(status.contains(what.split(' ').next_back().unwrap()), "{status}");
                let image = status.lines().find_map(|line| line.strip_prefix("reference")).unwrap().trim().to_owned();
                assert!(host.log().contains(&format!("{image} waits for {what}: ")), "{}", host.log());
                host.registry.clear_fault("down");
            }
            match reader.join().unwrap() {
                Ok(bytes) => assert!(is_held && !bytes.is_empty()),
                Err(error) => assert!(!is_held && error.raw_os_error() == Some(5), "{on_timeout}: {error}"),
            }
        });
        host.end();
    }
}

/// What `add` refuses, with code and name, and that it leaves neither device nor mount.
#[test]
fn bad_input() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    host.registry.load_layout(&host.root.join("source"), None, "plain", "v1").unwrap();
    let address = host.registry.addr().to_string();
    let mount = host.root.join("mnt");
    let refused = |repository: &str, code: i32, names: &[&str]| {
        let outcome = host.add(repository, &["--mount", mount.to_str().unwrap(), "--timeout", "4s"]);
        outcome.refused(code, names);
        assert!(outcome.elapsed < Duration::from_secs(8), "{:?}", outcome.elapsed);
        assert!(!mount.exists(), "the mount point was made, and is left");
        assert_eq!(host.devices(), Vec::<Value>::new());
    };
    refused("missing", 3, &[&address, "missing"]);
    refused("plain", 5, &["not an ublkimg image"]);
    host.ublkimg(&["add", "UPPER/case:x"]).refused(2, &["UPPER/case:x"]);
    host.ublkimg(&["rm", "nothing"]).refused(3, &["nothing"]);
    host.ublkimg(&["status", "nothing"]).refused(3, &["nothing"]);

    let fault = |toxic| host.registry.set_fault("it", Fault::new("*", toxic));
    fault(Toxic::Hang);
    refused("sample", 7, &[&address]);
    fault(Toxic::Refuse);
    refused("sample", 7, &[&address]);
    fault(Toxic::Status { code: 401 });
    refused("sample", 4, &[&address]);
    host.registry.clear_faults();
    host.registry.set_fault("it", Fault::new("*/blobs/*", Toxic::BitFlip { offset_bytes: 100 }));
    refused("sample", 6, &["sha256:"]);
    host.registry.clear_faults();

    if !Path::new("/dev/ublk-control").exists() {
        host.add("sample", &["--transport", "ublk"]).refused(8, &["ublk"]);
    }
    let elsewhere = TempRoot::new().unwrap();
    let busy = elsewhere.tmpfs("busy", 4096).unwrap();
    host.add("sample", &["--mount", busy.to_str().unwrap()]).refused(9, &["busy"]);
    assert_eq!(host.devices(), Vec::<Value>::new());
    host.end();
}

#[test]
fn wrong_credentials() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::new(Auth::Basic(Credentials::new("user", "secret")));
    let address = host.registry.addr().to_string();
    host.add("a", &[]).refused(4, &[&address]);
    let file = host.root.file("auth.json", format!(r#"{{"auths": {{"{address}": {{"auth": "dXNlcjpndWVzcw=="}}}}}}"#));
    let fault = FaultRow::begins("wrong credentials");
    host.add("a", &["--auth-file", file.unwrap().to_str().unwrap()]).refused(4, &[&address]);
    fault.ends("the command fails with exit code 4, no secret in the message");
    assert!(!host.log().contains("dXNlcjpndWVzcw"), "secrets are not for logs");
    host.end();
}

/// The image is pulled, converted into the store of this host, and attached.
#[test]
fn an_image_that_nobody_converted() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::new(Auth::Anonymous);
    SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
    host.registry.load_layout(&host.root.join("source"), Some("v1"), "plain", "v1").unwrap();
    let reference = host.registry.reference("plain", "v1");
    host.add("plain", &[]).refused(5, &[&format!("ublkimg add --convert {reference}")]);

    let comparison = TempRoot::new().unwrap();
    let expected = comparison.tmpfs("expected", 64 << 20).unwrap();
    SampleImage::default().write_expected_tree(&expected).unwrap();
    let mount = host.root.join("mnt");
    let added = host.add("plain", &["--convert", "--mount", mount.to_str().unwrap()]).success();
    assert_eq!(compare_trees(&expected, &mount).unwrap(), Vec::<String>::new());
    assert_eq!(host.devices()[0]["name"], "plain-v1", "as if it had been converted before");
    host.registry.set_fault("away", Fault::new("*", Toxic::Refuse));
    let repeated = host.add("plain", &["--convert", "--mount", mount.to_str().unwrap()]).success();
    assert_eq!(repeated.stdout, added.stdout);
    host.registry.clear_faults();

    // What was pulled stays for the next time, for a while.
    host.ublkimg(&["rm", "plain-v1"]).success();
    host.registry.reset_stats();
    host.add("plain", &["--convert"]).success();
    assert!(host.registry.stats().blobs.len() <= 1, "the config: {:?}", host.registry.stats().blobs);
    for number in 0..6 {
        let (layout, tag) = (OciLayout::create(&host.root.join(format!("source-{number}"))).unwrap(), "v1");
        let tar = archive(&[Entry::file("file", format!("{number}"))], LongNames::Pax);
        layout.add_image(tag, &[Layer { tar, compression: Compression::None }]).unwrap();
        let repository = format!("other-{number}");
        let source = host.root.join(format!("source-{number}"));
        host.registry.load_layout(&source, Some(tag), &repository, tag).unwrap();
        host.add(&repository, &["--convert"]).success();
        host.ublkimg(&["rm", &format!("{repository}-v1")]).success();
    }
    let kept = std::fs::read_dir(host.root.join("store/converted")).unwrap().count();
    assert_eq!(kept, 6, "one in use, one new, and the newest four of the others");

    // The tag moved: what it named before goes.
    host.ublkimg(&["rm", "plain-v1"]).success();
    host.registry.load_layout(&host.root.join("source-0"), Some("v1"), "plain", "v1").unwrap();
    host.add("plain", &["--convert"]).success();
    let device = host.devices()[0].clone();
    let layout = device["reference"].as_str().unwrap().trim_start_matches("oci:").trim_end_matches(":image");
    let blobs = std::fs::read_dir(format!("{layout}/blobs/sha256")).unwrap().count();
    assert_eq!(blobs, 5, "index, manifest, config, metadata, one layer");
    host.end();
}
