//! Proxies and caches between a host and its registry, as the command line meets them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ublkimg_tests::command::ublkimg;
use ublkimg_tests::docker_registry::DockerRegistry;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::http::Connection;
use ublkimg_tests::registry::TestRegistry;
use ublkimg_tests::skip;

/// Hosts that start at the same time.
const CLIENTS: usize = 8;

/// A forward proxy that sends everything to one place; keeps the first line of each connection.
fn proxy(to: SocketAddr) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let keeper = Arc::clone(&asked);
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut client = connection.unwrap();
            let mut reader = BufReader::new(client.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let mut server = TcpStream::connect(to).unwrap();
            server.write_all(line.as_bytes()).unwrap();
            keeper.lock().unwrap().push(line);
            let mut back = server.try_clone().unwrap();
            std::thread::spawn(move || std::io::copy(&mut reader, &mut server));
            std::thread::spawn(move || std::io::copy(&mut back, &mut client));
        }
    });
    (format!("http://{address}"), asked)
}

#[test]
fn a_proxy_of_the_environment_is_used_unless_the_host_is_excepted() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let host = Host::with_sample();
    let (address, asked) = proxy(host.registry.addr());
    let inspect = |except: &str| {
        let command = ublkimg(host.root.path()).args(["inspect", "--plain-http", "registry.test/sample:v1"]);
        command.env("http_proxy", &address).env("no_proxy", except).run()
    };
    inspect("other.test").success();
    let first = asked.lock().unwrap()[0].clone();
    assert!(first.starts_with("GET http://registry.test/v2/sample/manifests/v1"), "{first}");
    let before = asked.lock().unwrap().len();
    // Nobody answers to that name, so the daemon, which has the variables from its first command, gives up.
    let excepted = ublkimg(host.root.path())
        .args(["add", "--attach-timeout", "1s", "--plain-http", "registry.test:1/sample:v1"])
        .env("http_proxy", &address)
        .env("no_proxy", "registry.test")
        .run();
    excepted.refused(7, &["registry.test:1"]);
    assert_eq!(asked.lock().unwrap().len(), before);
    host.end();
}

/// A `hosts.toml` that puts `mirror` before the registry of `host`.
fn put_before(root: &Path, registry: SocketAddr, mirror: SocketAddr) {
    let directory = root.join("certs.d").join(registry.to_string());
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), format!("[host.\"http://{mirror}\"]\n")).unwrap();
}

/// Reads the blobs of an image whole through a cache, so that the cache has them.
fn fill(cache: &DockerRegistry, registry: &TestRegistry, repository: &str) {
    let get = |path: String| {
        let answer = Connection::open(cache.addr()).and_then(|mut client| client.get(&path)).unwrap();
        assert_eq!(answer.status, 200, "{path}");
    };
    let document = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&registry.manifest(repository, name).unwrap().unwrap()).unwrap()
    };
    let manifest = document(document("v1")["manifests"][0]["digest"].as_str().unwrap());
    let blobs = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]);
    for digest in blobs.map(|blob| blob["digest"].as_str().unwrap()) {
        // It keeps a blob a moment after it has sent it.
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let before = registry.stats().requests_of("blob_get");
            get(format!("/v2/{repository}/blobs/{digest}"));
            if registry.stats().requests_of("blob_get") == before {
                break;
            }
            assert!(Instant::now() < deadline, "{digest} is not kept");
        }
    }
}

#[test]
fn hosts_behind_a_cache_that_has_the_image_ask_the_registry_for_next_to_nothing() {
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
    let clients: Vec<_> = (0..CLIENTS).map(|number| host.root.join(format!("client-{number}"))).collect();
    for client in &clients {
        put_before(client, host.registry.addr(), cache.addr());
    }
    std::thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| ublkimg(client).args(["pull", &reference]).run().success());
        }
    });
    let all_clients = host.registry.stats().bytes_sent;
    println!("bytes of the registry: {one_client} for one client, {all_clients} for {CLIENTS} behind a cache");
    assert!(all_clients * 100 <= one_client * 15, "{all_clients} of {one_client}");
}
