//! The store as an operator sees it: listed, checked, made smaller, pinned, while its images are read.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use ublkimg_tests::command::ublkimg;
use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::registry::{Auth, Credentials};
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

/// Every file below the host's directories, save the one that the user wrote the secret into.
#[test]
fn no_secret_is_written_anywhere() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let credentials = Credentials::new("user", "hunter2-secret");
    let host = Host::new(Auth::Bearer { credentials, anonymous_pull: false, token_lifetime_s: 60 });
    SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
    host.convert("source", "sample");
    let basic = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, "user:hunter2-secret");
    let auth_file = host.root.join("auth.json");
    std::fs::write(&auth_file, format!(r#"{{"auths": {{"{}": {{"auth": "{basic}"}}}}}}"#, host.registry.addr()))
        .unwrap();
    let dir = host.root.join("mnt-sample");
    let arguments = ["--mount", dir.to_str().unwrap(), "--auth-file", auth_file.to_str().unwrap()];
    let added = ublkimg(host.root.path()).args(["--log", "trace", "add", &host.registry.reference("sample", "v1")]);
    let added = added.args(arguments).run().success();
    assert!(!read_all(&dir).is_empty());
    let status = host.ublkimg(&["status", "--json", dir.to_str().unwrap()]).success();
    let mut texts = vec![added.stdout, added.stderr, status.stdout];
    for below in ["store", "run"] {
        texts.extend(
            files_below(&host.root.join(below)).iter().map(|(_, bytes)| String::from_utf8_lossy(bytes).into_owned()),
        );
    }
    assert!(texts.iter().any(|text| text.contains("registry")), "the log is among them");
    for secret in ["hunter2-secret", &basic, "Bearer token-"] {
        let holds = texts.iter().find(|text| text.contains(secret));
        assert!(holds.is_none(), "{secret} in {:?}", holds.map(|text| text.chars().take(300).collect::<String>()));
    }
    host.end();
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
    let samples: BTreeSet<&str> = page.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    let missing: Vec<String> =
        shown_by_dashboard().into_iter().filter(|name| !samples.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "the dashboard shows what there is not: {missing:?}");
    let file = host.root.join("ublkimg.prom");
    host.ublkimg(&["metrics", "-o", file.to_str().unwrap()]).success();
    assert!(std::fs::read_to_string(&file).unwrap().contains("ublkimg_up 1\n"));
    host.end();
}
