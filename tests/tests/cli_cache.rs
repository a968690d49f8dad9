//! The store as an operator sees it: listed, checked, made smaller, pinned, while its images are read.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use ublkimg_tests::command::ublkimg;
use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::registry::{Auth, Config, Credentials, Fault, TestRegistry, Toxic};
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::skip;

/// What `cache ls` says.
fn cache(host: &Host) -> Value {
    serde_json::from_str(&host.ublkimg(&["cache", "ls", "--json"]).success().stdout).unwrap()
}

fn present_bytes(cache: &Value) -> u64 {
    cache["blobs"].as_array().unwrap().iter().map(|blob| blob["present_bytes"].as_u64().unwrap()).sum()
}

/// All files below, with their bytes, past the page cache.
fn read_all(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    files_below(dir)
}

fn files_below(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file() {
                files.push((entry.path(), std::fs::read(entry.path()).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn the_store_is_listed_checked_emptied_and_filled_again_while_it_is_in_use() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let dir = host.mounted("sample");
    let files = read_all(&dir);
    let full = cache(&host);
    assert!(present_bytes(&full) > 0, "{full}");
    assert_eq!(full["blobs"][0]["devices"].as_array().unwrap().len(), 1, "{full}");

    host.ublkimg(&["cache", "gc", "--cache-limit", "0"]).success();
    assert_eq!(present_bytes(&cache(&host)), 0);
    assert!(read_all(&dir) == files, "what was evicted is fetched again");

    let kept = present_bytes(&cache(&host));
    let name = host.devices()[0]["name"].as_str().unwrap().to_owned();
    host.ublkimg(&["cache", "pin", &name]).success();
    host.ublkimg(&["cache", "gc", "--cache-limit", "0", "--unused"]).success();
    assert!(kept > 0 && present_bytes(&cache(&host)) >= kept, "pinned");
    host.ublkimg(&["rm", &name]).success();
    host.ublkimg(&["daemon", "--stop"]).success();
    host.ublkimg(&["cache", "gc", "--unused"]).success();
    assert!(present_bytes(&cache(&host)) >= kept, "pinned, and without a daemon");
    host.ublkimg(&["cache", "unpin", &host.registry.reference("sample", "v1")]).success();
    host.ublkimg(&["cache", "unpin", "sample"]).refused(3, &["sample"]);
    host.ublkimg(&["cache", "gc", "--unused"]).success();
    assert_eq!(cache(&host)["blobs"].as_array().unwrap().len(), 0);
    host.end();
}

#[test]
fn a_byte_that_changed_on_the_disk_is_found_and_fetched_again() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let dir = host.mounted("sample");
    let files = read_all(&dir);
    host.ublkimg(&["cache", "verify"]).success();
    let fault = FaultRow::begins("a changed byte in a data file");
    for entry in std::fs::read_dir(host.root.join("store/blobs")).unwrap().map(Result::unwrap) {
        if entry.path().extension().is_some_and(|extension| extension == "data") {
            let data = std::fs::File::options().read(true).write(true).open(entry.path()).unwrap();
            let mut byte = [0];
            let at = data.metadata().unwrap().len() / 2;
            data.read_exact_at(&mut byte, at).unwrap();
            data.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
    }
    let found = host.ublkimg(&["cache", "verify", "--json"]);
    assert_eq!(found.code, Some(6), "{}", found.stderr);
    let found: Value = serde_json::from_str(&found.stdout).unwrap();
    assert!(found["damaged_blocks"].as_u64().unwrap() > 0, "{found}");
    host.ublkimg(&["cache", "verify"]).success();
    assert!(read_all(&dir) == files);
    fault.ends("found by `cache verify`, dropped, fetched again");
    host.end();
}

/// Changes a byte in the middle of every file of a directory of the store.
fn spoil(host: &Host, directory: &str) {
    let entries: Vec<_> = std::fs::read_dir(host.root.join("store").join(directory)).unwrap().collect();
    assert!(!entries.is_empty(), "nothing is in {directory}");
    for path in entries.into_iter().map(|entry| entry.unwrap().path()) {
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        let at = file.metadata().unwrap().len() / 2;
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}

#[test]
fn what_a_device_needs_to_come_back_is_mended_while_it_is_served() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let dir = host.mounted("sample");
    let files = read_all(&dir);
    let verify = || {
        let found = host.ublkimg(&["cache", "verify", "--json"]);
        let checked: Value = serde_json::from_str(&found.stdout).unwrap();
        (found.code, checked["damaged_objects"].as_u64().unwrap())
    };
    for (directories, damaged) in [(&["metadata"][..], 1), (&["objects"], 2), (&["metadata", "objects"], 3)] {
        let fault = FaultRow::begins("a changed byte in a manifest, a metadata blob or the metadata image of a device");
        directories.iter().for_each(|directory| spoil(&host, directory));
        assert_eq!(verify(), (Some(6), damaged), "{directories:?}");
        assert_eq!(verify(), (Some(0), 0), "{directories:?}");
        assert!(read_all(&dir) == files);
        fault.ends("found by `cache verify`, and mended from the store or the registry");
    }
    // All that a device needs is here: it comes without its registry.
    host.ublkimg(&["rm", dir.to_str().unwrap()]).success();
    host.ublkimg(&["daemon", "--stop"]).success();
    host.registry.set_fault("away", Fault::new("*", Toxic::Refuse));
    host.mounted("sample");
    assert!(read_all(&dir) == files);
    host.end();
}

const OVERFLOWED: &str = "ublkimg_store_overflowed_chunks_total";

/// What `metrics` says of a name without labels.
fn metric(host: &Host, name: &str) -> u64 {
    let page = host.ublkimg(&["metrics"]).success().stdout;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in\n{page}")).parse().unwrap()
}

#[test]
fn a_disk_that_cannot_be_read_any_more_is_served_past() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let dir = host.mounted("sample");
    let files = read_all(&dir);
    assert_eq!(metric(&host, OVERFLOWED), 0);
    for entry in std::fs::read_dir(host.root.join("store/blobs")).unwrap().map(Result::unwrap) {
        if entry.path().extension().is_some_and(|extension| extension == "data") {
            std::fs::File::options().write(true).open(entry.path()).unwrap().set_len(0).unwrap();
        }
    }
    let fault = FaultRow::begins("the data files of a mounted image are cut");
    assert!(read_all(&dir) == files);
    fault.ends("fetched again, served from memory: data");
    let overflowed = metric(&host, OVERFLOWED);
    assert!(overflowed > 0);
    assert_eq!(cache(&host)["room"]["overflowed_chunks"], overflowed);
    let log = host.log();
    for said in [".data cannot be read: blocks", "what is fetched is served from memory"] {
        assert!(log.contains(said), "{said:?} is not in the log");
    }
    host.end();
}

#[test]
fn a_small_disk_serves_a_larger_image() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let (expected, dir) = (host.root.dir("expected").unwrap(), host.root.join("mnt"));
    SampleImage::default().write_expected_tree(&expected).unwrap();
    let small = host.root.tmpfs("small", 2 << 20).unwrap();
    // Nothing is evicted: the disk stays full.
    let command = || ublkimg(host.root.path()).env("UBLKIMG_ROOT", &small).env("UBLKIMG_FREE_FLOOR", "0");
    let reference = host.registry.reference("sample", "v1");
    let fault = FaultRow::begins("cache disk smaller than the image");
    command().args(["add", &reference, "--mount", dir.to_str().unwrap()]).run().success();
    let below = |root: &Path, files: Vec<(PathBuf, Vec<u8>)>| -> Vec<(PathBuf, Vec<u8>)> {
        files.into_iter().map(|(path, bytes)| (path.strip_prefix(root).unwrap().to_owned(), bytes)).collect()
    };
    assert!(below(&dir, read_all(&dir)) == below(&expected, files_below(&expected)));
    fault.ends("served from memory: data");
    assert!(metric(&host, OVERFLOWED) > 0);
    assert!(host.log().contains("what is fetched is served from memory"));
    command().args(["rm", dir.to_str().unwrap()]).run().success();
    command().args(["daemon", "--stop"]).run().success();
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
    host.end();
}

#[test]
fn a_daemon_keeps_its_store_within_its_limits_and_what_is_pinned() {
    const LIMIT: u64 = 1 << 20;
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let dir = host.root.join("mnt");
    let reference = host.registry.reference("sample", "v1");
    let add = |variable, limit| {
        let command = ublkimg(host.root.path()).env(variable, limit);
        let command = command.args(["--log", "info", "add", &reference, "--name", "limited"]);
        command.args(["--mount", dir.to_str().unwrap()]).run().success()
    };
    let used_bytes = || cache(&host)["room"]["used_bytes"].as_u64().unwrap();
    // It is looked all the time as long as there is too much.
    let looked = || host.log().lines().filter(|line| line.contains("evicted") && line.contains("excess_bytes")).count();

    add("UBLKIMG_CACHE_LIMIT", "1M");
    let files = read_all(&dir);
    for _ in 0..2 {
        host::wait_until("the store is within its limit", || used_bytes() <= LIMIT);
        assert!(read_all(&dir) == files, "what was evicted is fetched again");
    }
    host.ublkimg(&["cache", "pin", "limited"]).success();
    let before = looked();
    // The next time it may be at work by what was pinned earlier.
    host::wait_until("it is looked after the pin, and all is there", || {
        assert!(read_all(&dir) == files);
        looked() > before && present_bytes(&cache(&host)) > 2 * LIMIT
    });
    let pinned_bytes = present_bytes(&cache(&host));
    let before = looked();
    host::wait_until("it is looked again", || looked() > before);
    assert_eq!(present_bytes(&cache(&host)), pinned_bytes, "what is pinned stays");

    host.ublkimg(&["cache", "unpin", &reference]).success();
    host.ublkimg(&["rm", "limited"]).success();
    host.ublkimg(&["daemon", "--stop"]).success();
    add("UBLKIMG_FREE_FLOOR", "1000T");
    for _ in 0..2 {
        assert!(read_all(&dir) == files);
        host::wait_until("as much is free as can be", || present_bytes(&cache(&host)) == 0);
    }
    host.end();
}

/// A registry, and the storage that it sends readers to, at addresses with a signature.
struct Secretive {
    host: Host,
    storage: TestRegistry,
    said: Vec<String>,
}

impl Secretive {
    /// Each has a word of its own in it, so that none is hidden by another.
    const PASSWORD: &str = "hunter2-secret";
    const WRONG: &str = "wr0ng-secret";
    const IDENTITY: &str = "ident1ty-secret";
    const OF_HELPER: &str = "h3lper-secret";
    const HEADER: &str = "h3ader-secret";
    const SIGNATURE: &str = "s1gnature-secret";
    const TOKEN: &str = "t0ken-secret-";

    fn new() -> Self {
        let credentials = Credentials::new("user", Self::PASSWORD);
        let host = Host::new(Auth::Bearer { credentials, anonymous_pull: false, token_lifetime_s: 60 });
        SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
        host.convert("source", "sample");
        let storage = TestRegistry::start(Config::default()).unwrap();
        storage.load_layout(&host.root.join("converted/sample"), Some("v1"), "sample", "v1").unwrap();
        let hosts = format!("certs.d/{}/hosts.toml", host.registry.addr());
        let secretive = Self { host, storage, said: Vec::new() };
        secretive.file(&hosts, &format!("[header]\nX-Key = \"{}\"\n", Self::HEADER));
        secretive
    }

    /// A file that the user has written, below the host's root.
    fn file(&self, below: &str, text: &str) -> String {
        let path = self.host.root.join(below);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A file of credentials with this entry for the registry.
    fn auth_file(&self, name: &str, entry: &str) -> String {
        self.file(name, &format!(r#"{{"auths": {{"{}": {entry}}}}}"#, self.host.registry.addr()))
    }

    /// Runs a command that says all it can, and keeps what it says.
    fn run(&mut self, code: i32, arguments: &[&str]) {
        let path = format!("{}:{}", self.host.root.join("bin").display(), std::env::var("PATH").unwrap());
        let command = ublkimg(self.host.root.path()).args(["--log", "trace"]).args(arguments).env("PATH", path);
        let outcome = command.run();
        assert_eq!(outcome.code, Some(code), "{arguments:?}: {}", outcome.stderr);
        self.said.extend([outcome.stdout, outcome.stderr]);
    }

    /// Commands that fail with secrets at hand.
    fn fail(&mut self) {
        let reference = self.host.registry.reference("sample", "v1");
        let wrong = STANDARD.encode(format!("user:{}", Self::WRONG));
        let identity = format!(r#"{{"identitytoken": "{}"}}"#, Self::IDENTITY);
        let helper = self.file("helped.json", r#"{"credsStore": "test"}"#);
        for (code, file) in [
            (4, self.auth_file("wrong.json", &format!(r#"{{"auth": "{wrong}"}}"#))),
            (4, self.auth_file("identity.json", &identity)),
            (2, self.auth_file("broken.json", &format!(r#"{{"auth": {{"{}": 1}}}}"#, Self::WRONG))),
        ] {
            self.run(code, &["inspect", "--auth-file", &file, &reference]);
        }
        for (code, end) in [(4, "}"), (2, "")] {
            let answer = format!(r#"{{"Username":"user","Secret":"{}"{end}"#, Self::OF_HELPER);
            let program = self.file("bin/docker-credential-test", &format!("#!/bin/sh\nread -r _\necho '{answer}'\n"));
            std::fs::set_permissions(program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            self.run(code, &["inspect", "--auth-file", &helper, &reference]);
        }
    }

    /// Reads everything with nothing in the store, well or with an error.
    fn read(&self, dir: &Path, code: i32) {
        self.host.ublkimg(&["cache", "gc", "--cache-limit", "0"]).success();
        std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        let read = std::process::Command::new("cat").arg(dir.join("data/noise")).output().unwrap();
        assert_eq!(read.status.code(), Some(code));
    }

    /// What was said, and every file that the program wrote.
    fn written(&self) -> Vec<String> {
        let files = ["store", "run", "written"].into_iter().flat_map(|below| files_below(&self.host.root.join(below)));
        let files = files.map(|(_, bytes)| String::from_utf8_lossy(&bytes).into_owned());
        files.chain(self.said.iter().cloned()).collect()
    }
}

#[test]
fn no_secret_is_written_anywhere() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let mut here = Secretive::new();
    here.fail();
    let basic = STANDARD.encode(format!("user:{}", Secretive::PASSWORD));
    let auth_file = here.auth_file("auth.json", &format!(r#"{{"auth": "{basic}"}}"#));
    let dir = here.host.root.join("mnt-sample");
    let mount = dir.to_str().unwrap().to_owned();
    let reference = here.host.registry.reference("sample", "v1");
    here.run(0, &["add", &reference, "--mount", &mount, "--auth-file", &auth_file, "--read-timeout", "5s"]);
    here.read(&dir, 0);

    let to = format!("http://{}?signature={}", here.storage.addr(), Secretive::SIGNATURE);
    here.host.registry.set_fault("redirect", Fault::new("/v2/*/blobs/*", Toxic::Redirect { to }));
    here.read(&dir, 0);
    here.storage.set_fault("expired", Fault::new("*", Toxic::Status { code: 403 }));
    here.read(&dir, 1);
    here.host.registry.set_fault("refused", Fault::new("*", Toxic::Status { code: 401 }));
    // Soon after a read that failed, others fail without a question.
    host::wait_until("a read that the registry refuses", || {
        here.read(&dir, 1);
        here.host.registry.fault_hits("refused") > 0
    });
    assert!(here.storage.fault_hits("expired") > 0);
    here.run(4, &["inspect", "--auth-file", &auth_file, &reference]);
    here.host.registry.clear_faults();

    std::fs::create_dir(here.host.root.join("written")).unwrap();
    let [events, page] = ["events", "start.html"].map(|name| here.host.root.join("written").join(name));
    here.run(0, &["status", "--json", &mount]);
    here.run(0, &["status", "--events", events.to_str().unwrap(), &mount]);
    here.run(0, &["report", &mount, "-o", page.to_str().unwrap(), "--auth-file", &auth_file]);
    for command in [&["ls"][..], &["ls", "--json"], &["metrics"], &["cache", "ls", "--json"]] {
        here.run(0, command);
    }
    assert!(here.host.log().contains(&here.host.registry.addr().to_string()), "the log says what is asked of whom");
    let written = here.written();
    let [wrong, helper] = [Secretive::WRONG, Secretive::OF_HELPER].map(|word| STANDARD.encode(format!("user:{word}")));
    let words = [Secretive::PASSWORD, Secretive::WRONG, Secretive::IDENTITY, Secretive::OF_HELPER, Secretive::HEADER];
    for secret in words.into_iter().chain([Secretive::SIGNATURE, Secretive::TOKEN, &basic, &wrong, &helper]) {
        let line = written.iter().flat_map(|text| text.lines()).find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret} in {:?}", line.map(|line| line.chars().take(300).collect::<String>()));
    }
    here.host.end();
}

/// Names of metrics in the queries of the dashboard.
fn shown_by_dashboard() -> BTreeSet<String> {
    let text = include_str!("../../packaging/grafana.json");
    let dashboard: serde_json::Value = serde_json::from_str(text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    let mut queries: Vec<&str> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    queries
        .extend(dashboard["templating"]["list"].as_array().unwrap().iter().map(|list| list["query"].as_str().unwrap()));
    let words = queries.iter().flat_map(|query| query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    let names: BTreeSet<String> = words.filter(|word| word.starts_with("ublkimg_")).map(str::to_owned).collect();
    assert!(names.len() > 10, "{names:?}");
    names
}

#[test]
fn metrics_say_what_was_read_and_fetched() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let metrics = || host.ublkimg(&["metrics"]).success().stdout;
    assert!(metrics().contains("\nublkimg_up 0"), "{}", metrics());
    let mount = host.mounted("sample");
    let read = std::process::Command::new("tar").arg("-cf").arg("-").arg(&mount).output().unwrap();
    assert!(read.status.success());
    host.ublkimg(&["ready", mount.to_str().unwrap()]).success();
    let page = metrics();
    // Every sample has a name that was announced, and a number.
    let mut announced = Vec::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            announced.push(rest.split_once(' ').unwrap().0.to_owned());
        } else if !line.starts_with('#') {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let name = sample.split('{').next().unwrap();
            let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let last = announced.last().map(String::as_str);
            assert!(last == Some(name) || last == of_histogram, "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    let value = |sample: &str| -> f64 {
        let line =
            page.lines().find(|line| line.starts_with(sample)).unwrap_or_else(|| panic!("no {sample} in\n{page}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    };
    assert!(value("ublkimg_read_bytes_total{name=\"sample-v1\"}") > 0.0);
    assert!(value("ublkimg_fetched_bytes_total{name=\"sample-v1\"}") > 0.0);
    assert!(value("ublkimg_reads_total{name=\"sample-v1\",result=\"miss\"}") > 0.0);
    let duration = |part: &str| value(&format!("ublkimg_read_duration_seconds_{part}"));
    let misses = "{name=\"sample-v1\",result=\"miss\"";
    assert!(duration(&format!("sum{misses}")) > 0.0);
    assert_eq!(duration(&format!("bucket{misses},le=\"+Inf\"")), duration(&format!("count{misses}")));
    assert!(duration(&format!("count{misses}")) <= value(&format!("ublkimg_reads_total{misses}")));
    assert!(duration("count{name=\"sample-v1\",result=\"hit\"") > 0.0);
    assert!(value("ublkimg_store_bytes") > 0.0);
    assert_eq!(value(OVERFLOWED), 0.0);
    let samples: BTreeSet<&str> = page.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    let missing: Vec<String> =
        shown_by_dashboard().into_iter().filter(|name| !samples.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "the dashboard shows what there is not: {missing:?}");
    let file = host.root.join("ublkimg.prom");
    host.ublkimg(&["metrics", "-o", file.to_str().unwrap()]).success();
    assert!(std::fs::read_to_string(&file).unwrap().contains("ublkimg_up 1\n"));
    host.end();
}
