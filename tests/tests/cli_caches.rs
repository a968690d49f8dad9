//! Caches between many hosts and one registry: what the registry sends when all start the same image at once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ublkimg_tests::command::ublkimg;
use ublkimg_tests::docker_registry::DockerRegistry;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::http::Connection;
use ublkimg_tests::nginx::{ACCESS_VALID, Nginx};
use ublkimg_tests::registry::{Auth, Config, Credentials, Fault, TestRegistry, Toxic};
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::skip;

/// Hosts that start at the same time.
const CLIENTS: usize = 8;

/// A host's own root, below which its `hosts.toml` puts `cache` before the registry.
fn client(host: &Host, name: &str, cache: SocketAddr) -> PathBuf {
    let root = host.root.join(name);
    let directory = root.join("certs.d").join(host.registry.addr().to_string());
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), format!("[host.\"http://{cache}\"]\n")).unwrap();
    root
}

/// All bytes of all files below `dir`, read.
fn read_all(dir: &Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()).fold(0, |sum, entry| {
        let kind = entry.file_type().unwrap();
        sum + match () {
            () if kind.is_dir() => read_all(&entry.path()),
            () if kind.is_file() => std::fs::read(entry.path()).unwrap().len() as u64,
            () => 0,
        }
    })
}

/// Starts the image on all hosts at once: attaches it, mounts it and reads every file. Then removes it everywhere. (Not meanwhile:
/// a daemon that starts holds, for a moment, the mounts of all others.)
fn start_on(clients: &[PathBuf], reference: &str) {
    let read: Vec<u64> = std::thread::scope(|scope| {
        let starts = clients.iter().map(|root| {
            scope.spawn(move || {
                let mount = root.join("mnt");
                let words =
                    ["add", reference, "--name", "sample", "--profile", "none", "--read-timeout", "30s", "--mount"];
                ublkimg(root).args(words).arg(&mount).run().success();
                read_all(&mount)
            })
        });
        let starts: Vec<_> = starts.collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert!(read.iter().all(|bytes| *bytes == read[0] && *bytes > 5_000_000), "{read:?}");
    for root in clients {
        ublkimg(root).args(["rm", "sample"]).run().success();
        ublkimg(root).args(["daemon", "--stop"]).run().success();
    }
}

/// A registry as large ones are: a token for everybody, and blobs that lie somewhere else.
fn registry_and_storage() -> (Host, TestRegistry) {
    let credentials = Credentials::new("user", "secret");
    let host = Host::new(Auth::Bearer { credentials, anonymous_pull: true, token_lifetime_s: 300 });
    SampleImage::default().write_layout(&host.root.join("source"), "v1").unwrap();
    host.convert("source", "sample");
    let storage = TestRegistry::start(Config::default()).unwrap();
    storage.load_layout(&host.root.join("converted/sample"), Some("v1"), "sample", "v1").unwrap();
    let elsewhere = Toxic::Redirect { to: format!("http://{}", storage.addr()) };
    host.registry.set_fault("storage", Fault::new("*/blobs/*", elsewhere));
    (host, storage)
}

#[test]
fn hosts_that_start_at_once_behind_an_empty_nginx_cost_the_registry_one_start() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if !Nginx::is_installed() {
        skip!("there is no nginx");
    }
    let (host, storage) = registry_and_storage();
    let reference = host.registry.reference("sample", "v1");
    let sent_to = |clients: &[PathBuf]| {
        host.registry.reset_stats();
        storage.reset_stats();
        start_on(clients, &reference);
        let [registry, storage] = [&host.registry, &storage].map(TestRegistry::stats);
        assert!(registry.requests_of("token") > 0, "{:?}", registry.requests);
        assert_eq!(storage.duplicate_bytes, 0, "no part of a blob is fetched twice");
        registry.bytes_sent + storage.bytes_sent
    };
    let cache = Nginx::start_cache(&host.root.join("cache-of-one"), host.registry.addr()).unwrap();
    let one = sent_to(&[client(&host, "one", cache.addr())]);
    drop(cache);
    let cache = Nginx::start_cache(&host.root.join("cache-of-all"), host.registry.addr()).unwrap();
    let clients: Vec<_> = (0..CLIENTS).map(|number| client(&host, &format!("client-{number}"), cache.addr())).collect();
    let all = sent_to(&clients);
    println!("bytes of registry and storage: {one} for one client, {all} for {CLIENTS}, each behind an empty nginx");
    assert!(all * 100 <= one * 115, "{all} of {one}");
}

#[test]
fn a_host_behind_an_nginx_that_has_the_image_reads_on_without_the_registry() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    if !Nginx::is_installed() {
        skip!("there is no nginx");
    }
    let (host, storage) = registry_and_storage();
    let reference = host.registry.reference("sample", "v1");
    let cache = Nginx::start_cache(&host.root.join("cache"), host.registry.addr()).unwrap();
    let [first, second] = ["first", "second"].map(|name| client(&host, name, cache.addr()));
    start_on(&[first], &reference);
    let mount = second.join("mnt");
    let words = ["add", &reference, "--profile", "none", "--io-timeout", "10s", "--mount"];
    ublkimg(&second).args(words).arg(&mount).run().success();
    for registry in [&host.registry, &storage] {
        registry.set_fault("away", Fault::new("*", Toxic::Status { code: 503 }));
        registry.reset_stats();
    }
    // Longer than a yes is remembered; nginx counts in whole seconds.
    std::thread::sleep(ACCESS_VALID + Duration::from_millis(1200));
    assert!(read_all(&mount) > 5_000_000);
    assert!(host.registry.stats().requests_of("ping") > 0, "it was asked again: {:?}", host.registry.stats().requests);
    ublkimg(&second).args(["rm"]).arg(&mount).run().success();
    ublkimg(&second).args(["daemon", "--stop"]).run().success();
}

/// Reads the blobs of an image whole through a cache, until it answers without asking the registry.
fn fill(cache: &DockerRegistry, registry: &TestRegistry, repository: &str) {
    let get = |path: &str| Connection::open(cache.addr()).and_then(|mut client| client.get(path)).unwrap().status;
    let document = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&registry.manifest(repository, name).unwrap().unwrap()).unwrap()
    };
    let manifest = document(document("v1")["manifests"][0]["digest"].as_str().unwrap());
    let blobs = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]);
    for digest in blobs.map(|blob| blob["digest"].as_str().unwrap()) {
        // It keeps a blob a moment after it has sent it, and who asks while it moves the blob into its place is told 500.
        host::wait_until(&format!("{digest} is kept"), || {
            let before = registry.stats().requests_of("blob_get");
            get(&format!("/v2/{repository}/blobs/{digest}")) == 200
                && registry.stats().requests_of("blob_get") == before
        });
    }
}

#[test]
fn hosts_behind_a_docker_registry_that_has_the_image_ask_the_registry_for_next_to_nothing() {
    if !DockerRegistry::is_installed() {
        skip!("there is no docker-registry");
    }
    let host = Host::with_sample();
    let reference = host.registry.reference("sample", "v1");
    host.registry.reset_stats();
    ublkimg(host.root.path()).args(["pull", &reference]).run().success();
    let one_client = host.registry.stats().bytes_sent;

    let cache = DockerRegistry::start_cache(host.root.path(), host.registry.addr()).unwrap();
    fill(&cache, &host.registry, "sample");
    host.registry.reset_stats();
    let clients: Vec<_> = (0..CLIENTS).map(|number| client(&host, &format!("client-{number}"), cache.addr())).collect();
    std::thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| ublkimg(client).args(["pull", &reference]).run().success());
        }
    });
    let all_clients = host.registry.stats().bytes_sent;
    println!("bytes of the registry: {one_client} for one client, {all_clients} for {CLIENTS} behind a cache");
    assert!(all_clients * 100 <= one_client * 15, "{all_clients} of {one_client}");
}
