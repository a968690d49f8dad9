//! A conversion that ends in the middle, and is run again: the same digest, and nothing left behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use ublkimg_convert::{ErrorKind, NoProgress, Options, convert};
use ublkimg_registry::ClientOptions;
use ublkimg_tests::command::{Invocation, Outcome, ublkimg, ublkimg_path};
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Config, Fault, LinkConfig, TestRegistry, Toxic};
use ublkimg_tests::sample_image::noise;
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};
use ublkimg_tests::temp_root::TempRoot;

/// Kills of one test, spread over the time that a conversion takes.
const KILLS: u32 = 8;

struct Fixture {
    root: TempRoot,
    registry: TestRegistry,
    /// What a conversion that nobody disturbs prints.
    digest: Value,
}

impl Fixture {
    /// Four layers of some 400 KB in a layout, and a registry that takes a few tenths of a second for them.
    fn new() -> Self {
        let root = TempRoot::new().unwrap();
        root.dir("spool").unwrap();
        let layers = (1..=4).map(|seed| {
            let entries = [Entry::file(&format!("file-{seed}"), noise(seed, 400_000)), Entry::file("small", "x")];
            Layer { tar: archive(&entries, LongNames::Pax), compression: Compression::Gzip }
        });
        OciLayout::create(&root.join("source")).unwrap().add_image("v1", layers).unwrap();
        let registry = TestRegistry::start(Config { link: LinkConfig::new(100, 5), ..Config::default() }).unwrap();
        let mut fixture = Self { root, registry, digest: Value::Null };
        let undisturbed = format!("oci:{}:v1", fixture.root.join("undisturbed").display());
        fixture.digest = index(&fixture.run(&undisturbed, &["--no-cache"]).success());
        fixture
    }

    fn source(&self) -> String {
        format!("oci:{}:v1", self.root.join("source").display())
    }

    fn run(&self, destination: &str, options: &[&str]) -> Outcome {
        let tmpdir = self.root.join("spool");
        let source = self.source();
        ublkimg(self.root.path())
            .args(["convert", "--json", &source, destination, "--tmpdir"])
            .arg(tmpdir)
            .args(options)
            .run()
    }

    /// Starts a conversion and kills it after this time; tells whether it was still running.
    fn kill_after(&self, destination: &str, time: Duration) -> bool {
        let mut child = Command::new(ublkimg_path())
            .args(["convert", &self.source(), destination, "--tmpdir"])
            .arg(self.root.join("spool"))
            .env("HOME", self.root.path())
            .env_remove("XDG_CACHE_HOME")
            .env_remove("UBLKIMG_CONVERT_CACHE")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(time);
        let was_running = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        was_running
    }

    /// Run again it ends well, with the right digest, and what is left is what belongs there.
    fn ends_as_undisturbed(&self, destination: &str) {
        let outcome = self.run(destination, &[]).success();
        assert_eq!(index(&outcome), self.digest);
        assert_eq!(temporary_files(self.root.path()), [""; 0]);
        ublkimg(self.root.path()).args(["check", destination, "--source", &self.source()]).run().success();
    }
}

fn index(outcome: &Outcome) -> Value {
    serde_json::from_str::<Value>(&outcome.stdout).unwrap()["index"].clone()
}

/// Files below that are neither blobs, nor of a layout, nor of the conversion cache.
fn temporary_files(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(temporary_files(&entry.path()));
        } else if !is_kept(&name) {
            found.push(entry.path().display().to_string());
        }
    }
    found
}

fn is_kept(name: &str) -> bool {
    let (hex, rest) = name.split_at_checked(64).unwrap_or_default();
    let is_hex = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    matches!(name, "index.json" | "oci-layout") || is_hex && (rest.is_empty() || rest.starts_with('.'))
}

/// Kills conversions to `destination` until one is done, at later and later times.
fn kill_again_and_again(fixture: &Fixture, destination: &dyn Fn(u32) -> String) {
    let start = Instant::now();
    fixture.run(&destination(KILLS), &["--no-cache"]).success();
    let whole = start.elapsed();
    let mut killed = 0;
    for round in 0..KILLS {
        killed += u32::from(fixture.kill_after(&destination(round), whole * round / KILLS));
        if round % 3 == 2 {
            // And once more where a kill was before.
            fixture.kill_after(&destination(round), whole / 2);
        }
        fixture.ends_as_undisturbed(&destination(round));
        std::fs::remove_dir_all(fixture.root.join(".cache")).unwrap();
    }
    assert!(killed >= KILLS / 2, "{killed} of {KILLS} were killed in time");
}

#[test]
fn killed_on_the_way_to_a_registry() {
    let fixture = Fixture::new();
    kill_again_and_again(&fixture, &|round| fixture.registry.reference(&format!("made-{round}"), "v1"));
}

#[test]
fn killed_on_the_way_to_a_layout() {
    let fixture = Fixture::new();
    kill_again_and_again(&fixture, &|round| format!("oci:{}:v1", fixture.root.join(format!("made-{round}")).display()));
}

#[test]
fn a_network_that_is_cut() {
    let fixture = Fixture::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = ClientOptions { retry_deadline: Duration::from_millis(300), ..ClientOptions::default() };
    let options = Options { client, tmpdir: fixture.root.join("spool"), ..Options::default() };
    let mut cut = 0;
    for round in 0..6 {
        let repository = format!("made-{round}");
        let destination = fixture.registry.reference(&repository, "v1");
        let fault = Fault { after_ms: Some(40 * round), ..Fault::new("*", Toxic::Refuse) };
        fixture.registry.set_fault("cut", fault);
        let (source, to) = (fixture.source().parse().unwrap(), destination.parse().unwrap());
        let outcome = runtime.block_on(convert(&source, &to, &options, Arc::new(NoProgress)));
        fixture.registry.clear_faults();
        if let Err(error) = outcome {
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            assert_eq!(fixture.registry.manifest(&repository, "v1").unwrap(), None, "the tag moves last");
            cut += 1;
        }
        fixture.ends_as_undisturbed(&destination);
    }
    assert!(cut >= 3, "{cut} of 6 were cut in time");
}

#[test]
fn an_upload_that_fails_is_called_off() {
    let fixture = Fixture::new();
    fixture.registry.set_fault("refused", Fault::new("*/blobs/uploads/*", Toxic::Status { code: 403 }).method("PUT"));
    let destination = fixture.registry.reference("made", "v1");
    fixture.run(&destination, &[]).refused(4, &[]);
    assert!(fixture.registry.fault_hits("refused") > 0);
    assert_eq!(fixture.registry.open_uploads(), 0);
    fixture.registry.clear_faults();
    fixture.ends_as_undisturbed(&destination);
}

#[test]
fn a_disk_that_is_full_and_then_is_not() {
    if !skip::is_root() {
        skip!("a small file system needs root");
    }
    let fixture = Fixture::new();
    let grow = |dir: &Path| {
        Invocation::new("mount").args(["-o", "remount,size=64m"]).arg(dir).run().success();
    };
    let spool = fixture.root.tmpfs("spool", 600 << 10).unwrap();
    let destination = fixture.registry.reference("made", "v1");
    fixture.run(&destination, &[]).refused(10, &[spool.to_str().unwrap()]);
    assert_eq!(temporary_files(fixture.root.path()), [""; 0]);
    grow(&spool);
    fixture.ends_as_undisturbed(&destination);

    let made = fixture.root.tmpfs("made", 1 << 20).unwrap();
    let destination = format!("oci:{}:v1", made.display());
    fixture.run(&destination, &[]).refused(10, &[made.to_str().unwrap()]);
    assert_eq!(temporary_files(fixture.root.path()), [""; 0]);
    grow(&made);
    fixture.ends_as_undisturbed(&destination);
}
