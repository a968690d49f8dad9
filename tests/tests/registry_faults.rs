//! Each fault of the test registry does what it says, once, and goes away.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{ErrorKind, Read};
use std::time::{Duration, Instant};

use ublkimg_image::Sha256;
use ublkimg_tests::http::Connection;
use ublkimg_tests::registry::{Config, Fault, TestRegistry, Toxic};

struct Fixture {
    registry: TestRegistry,
    path: String,
    bytes: Vec<u8>,
}

impl Fixture {
    fn new() -> Self {
        let registry = TestRegistry::start(Config::default()).unwrap();
        let bytes: Vec<u8> = (0..600_000u32).map(|i| (i % 253) as u8).collect();
        let digest: Sha256 = registry.put_blob("a", bytes.clone()).unwrap();
        Self { registry, path: format!("/v2/a/blobs/{digest}"), bytes }
    }

    fn with(toxic: Toxic) -> Self {
        let fixture = Self::new();
        fixture.registry.set_fault("it", Fault::new("*/blobs/*", toxic).times(1));
        fixture
    }

    fn connect(&self) -> Connection {
        Connection::open(self.registry.addr()).unwrap()
    }

    /// The fault was met, and an ordinary answer follows it.
    fn is_over(&self) {
        assert_eq!(self.registry.fault_hits("it"), 1);
        assert!(self.connect().get(&self.path).unwrap().body == self.bytes);
    }
}

#[test]
fn status_and_retry_after() {
    let fixture = Fixture::with(Toxic::Status { code: 503 });
    assert_eq!(fixture.connect().get("/v2/").unwrap().status, 200, "another path");
    assert_eq!(fixture.connect().get(&fixture.path).unwrap().status, 503);
    fixture.is_over();

    let fixture = Fixture::with(Toxic::TooManyRequests { retry_after_s: 7 });
    let answer = fixture.connect().get(&fixture.path).unwrap();
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("7")));
    fixture.is_over();
}

#[test]
fn latency_and_hang() {
    let fixture = Fixture::with(Toxic::Latency { latency_ms: 80 });
    let start = Instant::now();
    fixture.connect().get(&fixture.path).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(80));
    fixture.is_over();

    let fixture = Fixture::new();
    fixture.registry.set_fault("hang", Fault::new("*", Toxic::Hang));
    let mut client = fixture.connect();
    client.stream().get_ref().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(client.get("/v2/").unwrap_err().kind(), ErrorKind::WouldBlock);
    fixture.registry.clear_fault("hang");
    let mut rest = String::new();
    client.stream().take(15).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "HTTP/1.1 200 OK", "it goes on");
}

#[test]
fn slow_bodies() {
    let fixture = Fixture::with(Toxic::Slow { bytes_per_s: 2_000_000 });
    let start = Instant::now();
    assert!(fixture.connect().get(&fixture.path).unwrap().body == fixture.bytes);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(280), "600 kB at 2 MB/s take 300 ms: {took:?}");
    fixture.is_over();
}

#[test]
fn a_sequence_of_faults_goes_by_itself() {
    let fixture = Fixture::new();
    // Before the faults count their time.
    let start = Instant::now();
    fixture.registry.set_fault("busy", Fault::new("*", Toxic::TooManyRequests { retry_after_s: 1 }).for_ms(300));
    fixture.registry.set_fault("away", Fault::new("*", Toxic::Refuse).after_ms(300).for_ms(300));
    let mut open = fixture.connect();
    assert_eq!(open.get("/v2/").unwrap().status, 429);
    while open.get("/v2/").is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(start.elapsed() >= Duration::from_millis(300), "open connections are reset");
    while Connection::open(fixture.registry.addr()).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(start.elapsed() >= Duration::from_millis(600));
    assert_eq!(fixture.connect().get("/v2/").unwrap().status, 200);
}

#[test]
fn short_body_and_reset() {
    for (toxic, kind) in [
        (Toxic::ShortBody { after_bytes: 300_000 }, None),
        (Toxic::Reset { after_bytes: 300_000 }, Some(ErrorKind::ConnectionReset)),
    ] {
        let fixture = Fixture::with(toxic);
        let mut client = fixture.connect();
        let answer = client.send("GET", &fixture.path, &[], &[]).unwrap();
        assert_eq!(answer.header("content-length"), Some("600000"));
        let mut body = Vec::new();
        let end = client.stream().read_to_end(&mut body);
        assert_eq!(end.as_ref().err().map(std::io::Error::kind), kind);
        assert_eq!(body.len(), 300_000);
        fixture.is_over();
    }
}

#[test]
fn spoiled_ranges() {
    let range = [("Range", "bytes=1000-1999")];
    let fixture = Fixture::with(Toxic::IgnoreRange);
    let answer = fixture.connect().request("GET", &fixture.path, &range, &[]).unwrap();
    assert_eq!((answer.status, answer.body == fixture.bytes), (200, true));
    fixture.is_over();

    let fixture = Fixture::with(Toxic::WrongContentRange);
    let answer = fixture.connect().request("GET", &fixture.path, &range, &[]).unwrap();
    assert_eq!(answer.header("content-range"), Some("bytes 1001-2000/600000"));
    assert_eq!(answer.body, fixture.bytes[1000..2000]);
    fixture.is_over();
}

#[test]
fn a_bit_flips_where_it_is_told() {
    for (range, at) in [("bytes=0-599999", 400_123), ("bytes=400000-400199", 123), ("bytes=0-99", usize::MAX)] {
        let fixture = Fixture::with(Toxic::BitFlip { offset_bytes: 400_123 });
        let answer = fixture.connect().request("GET", &fixture.path, &[("Range", range)], &[]).unwrap();
        let start = usize::from(range.starts_with("bytes=4")) * 400_000;
        let expected = &fixture.bytes[start..start + answer.body.len()];
        let wrong: Vec<usize> = (0..expected.len()).filter(|i| answer.body[*i] != expected[*i]).collect();
        assert_eq!(wrong, Vec::from_iter((at < usize::MAX).then_some(at)));
        fixture.is_over();
    }
}

#[test]
fn down_and_up_again_on_the_same_port() {
    let fixture = Fixture::new();
    let mut open = fixture.connect();
    open.get("/v2/").unwrap();
    fixture.registry.set_fault("down", Fault::new("*", Toxic::Refuse));
    std::thread::sleep(Duration::from_millis(50));
    assert!(open.get("/v2/").is_err(), "open connections are reset");
    let error = Connection::open(fixture.registry.addr()).err().map(|error| error.kind());
    assert_eq!(error, Some(ErrorKind::ConnectionRefused));
    fixture.registry.clear_fault("down");
    let deadline = Instant::now() + Duration::from_secs(2);
    while Connection::open(fixture.registry.addr()).is_err() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(fixture.connect().get("/v2/").unwrap().status, 200);
}

#[test]
fn faults_and_counters_by_http() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let faults = br#"{"busy": {"path": "*", "times": 1, "toxic": {"status": {"code": 503}}}}"#;
    assert_eq!(client.request("POST", "/_faults", &[], faults).unwrap().status, 204);
    assert_eq!(client.get("/v2/").unwrap().status, 503);
    let listed: serde_json::Value = serde_json::from_slice(&client.get("/_faults").unwrap().body).unwrap();
    assert_eq!(listed["busy"]["hits"], 1);
    assert_eq!(client.request("POST", "/_faults", &[], br#"{"busy": null}"#).unwrap().status, 204);
    assert_eq!(client.get("/_faults").unwrap().body, b"{}\n");
    let unknown = client.request("POST", "/_faults", &[], br#"{"x": {"toxic": "gremlins"}}"#).unwrap();
    assert_eq!(unknown.status, 400);

    let stats: ublkimg_tests::registry::Stats = serde_json::from_slice(&client.get("/_stats").unwrap().body).unwrap();
    assert_eq!((stats.requests_of("ping"), stats.requests_of("other")), (1, 0), "control is not counted");
    assert_eq!(client.request("POST", "/_stats/reset", &[], &[]).unwrap().status, 204);
    assert_eq!(fixture.registry.stats().requests_of("ping"), 0);
}
