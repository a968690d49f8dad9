//! The shaped link of the test registry is what it says: other tests and benchmarks measure by it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Read;
use std::time::{Duration, Instant};

use ublkimg_tests::http::Connection;
use ublkimg_tests::registry::{Config, LinkConfig, TestRegistry};

fn shaped(rate_mbit: u64, delay_ms: u64) -> TestRegistry {
    TestRegistry::start(Config { link: LinkConfig::new(rate_mbit, delay_ms), ..Config::default() }).unwrap()
}

/// A blob of so many bytes, and its path.
fn blob(registry: &TestRegistry, len_bytes: usize) -> String {
    let digest = registry.put_blob("a", vec![7; len_bytes]).unwrap();
    format!("/v2/a/blobs/{digest}")
}

/// A busy machine can only spoil a measurement, so one good one in so many will do.
const ATTEMPTS: usize = 8;

/// Measures until `is_good`.
#[track_caller]
fn measure<M: std::fmt::Debug>(what: &str, mut take: impl FnMut() -> M, is_good: impl Fn(&M) -> bool) {
    let mut taken = Vec::new();
    while taken.len() < ATTEMPTS {
        let measured = take();
        if is_good(&measured) {
            return;
        }
        taken.push(measured);
    }
    panic!("{what}: {taken:?}");
}

/// What `act` does takes `expected_ms`, within 15 %.
#[track_caller]
fn assert_takes(what: &str, expected_ms: u64, mut act: impl FnMut()) {
    let expected = Duration::from_millis(expected_ms);
    let take = || {
        let start = Instant::now();
        act();
        start.elapsed()
    };
    measure(what, take, |time| (expected * 85 / 100..=expected * 115 / 100).contains(time));
}

#[test]
fn bytes_take_their_time() {
    for rate_mbit in [40, 400] {
        let registry = shaped(rate_mbit, 0);
        let len_bytes = 40_000 * usize::try_from(rate_mbit).unwrap();
        let path = blob(&registry, len_bytes);
        let mut client = Connection::open(registry.addr()).unwrap();
        assert_takes("320 ms worth of bytes", 320, || assert_eq!(client.get(&path).unwrap().body.len(), len_bytes));
    }
}

#[test]
fn requests_take_round_trips_and_a_new_connection_one_more() {
    let registry = shaped(0, 10);
    let path = blob(&registry, 100);
    assert_takes("a request on a new connection", 40, || {
        Connection::open(registry.addr()).unwrap().get(&path).unwrap();
    });
    let mut client = Connection::open(registry.addr()).unwrap();
    client.get(&path).unwrap();
    assert_takes("20 requests", 400, || {
        for _ in 0..20 {
            client.get(&path).unwrap();
        }
    });
}

#[test]
fn delay_does_not_limit_the_rate() {
    let registry = shaped(80, 20);
    let path = blob(&registry, 4_000_000);
    assert_takes("4 MB at 10 MB/s, two round trips", 480, || {
        Connection::open(registry.addr()).unwrap().get(&path).unwrap();
    });
}

#[test]
fn connections_share_evenly() {
    let registry = shaped(80, 0);
    let path = blob(&registry, 8_000_000);
    let read_for_500_ms = |end: Instant| {
        let mut client = Connection::open(registry.addr()).unwrap();
        client.send("GET", &path, &[], &[]).unwrap();
        let mut buffer = [0; 4096];
        let mut len_bytes = 0;
        while Instant::now() < end {
            len_bytes += client.stream().read(&mut buffer).unwrap();
        }
        len_bytes as f64
    };
    let shares = || {
        let end = Instant::now() + Duration::from_millis(500);
        std::thread::scope(|scope| {
            let readers = [(), ()].map(|()| scope.spawn(|| read_for_500_ms(end)));
            readers.map(|reader| reader.join().unwrap())
        })
    };
    measure("bytes of each in 500 ms at 10 MB/s", shares, |[a, b]| {
        (a / b - 1.0).abs() < 0.15 && (a + b - 5_000_000.0).abs() < 750_000.0
    });
}

#[test]
fn a_small_answer_passes_a_long_one() {
    let registry = shaped(80, 0);
    let (long, short) = (blob(&registry, 8_000_000), blob(&registry, 4096));
    let time_of_a_small_one = || {
        let mut bulk = Connection::open(registry.addr()).unwrap();
        bulk.send("GET", &long, &[], &[]).unwrap();
        let reader = std::thread::spawn(move || bulk.stream().take(4_000_000).read_to_end(&mut Vec::new()));
        let mut client = Connection::open(registry.addr()).unwrap();
        client.get(&short).unwrap();
        let start = Instant::now();
        for _ in 0..10 {
            client.get(&short).unwrap();
        }
        let each = start.elapsed() / 10;
        let was_under_way = !reader.is_finished();
        reader.join().unwrap().unwrap();
        (each, was_under_way)
    };
    // A turn of the other takes 1.6 ms.
    measure("a small answer", time_of_a_small_one, |(each, under_way)| *under_way && *each < Duration::from_millis(10));
}

#[test]
fn a_client_that_does_not_read_takes_no_share() {
    let registry = shaped(160, 0);
    let (stuck_path, path) = (blob(&registry, 64_000_000), blob(&registry, 4_000_001));
    let mut stuck = Connection::open(registry.addr()).unwrap();
    stuck.send("GET", &stuck_path, &[], &[]).unwrap();
    let sent = || registry.stats().blobs.values().map(|blob| blob.bytes_sent).max().unwrap_or(0);
    let mut before = 0;
    while sent() > before {
        before = sent();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(before < 16_000_000, "{before} bytes are buffered for a client that reads none");
    let mut client = Connection::open(registry.addr()).unwrap();
    assert_takes("4 MB at 20 MB/s", 200, || drop(client.get(&path).unwrap()));
}
