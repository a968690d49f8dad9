//! Proxies between a host and its registry, as the command line meets them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use ublkimg_tests::command::ublkimg;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::skip;

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
