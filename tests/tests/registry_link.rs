//! The shaped link of the test registry is what it says: other tests and benchmarks measure by it.

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

#[track_caller]
fn assert_within(what: &str, found: Duration, expected: Duration, percent: u32) {
    let (low, high) = (expected * (100 - percent) / 100, expected * (100 + percent) / 100);
    assert!((low..=high).contains(&found), "{what}: {found:?}, not within {percent} % of {expected:?}");
}

#[test]
fn bytes_take_their_time() {
    for rate_mbit in [40, 400] {
        let registry = shaped(rate_mbit, 0);
        let len_bytes = 40_000 * usize::try_from(rate_mbit).unwrap();
        let path = blob(&registry, len_bytes);
        let mut client = Connection::open(registry.addr()).unwrap();
        let start = Instant::now();
        assert_eq!(client.get(&path).unwrap().body.len(), len_bytes);
        assert_within("320 ms worth of bytes", start.elapsed(), Duration::from_millis(320), 15);
    }
}

#[test]
fn requests_take_round_trips_and_a_new_connection_one_more() {
    let registry = shaped(0, 10);
    let path = blob(&registry, 100);
    let start = Instant::now();
    let mut client = Connection::open(registry.addr()).unwrap();
    client.get(&path).unwrap();
    assert_within("the first request", start.elapsed(), Duration::from_millis(40), 15);
    let start = Instant::now();
    for _ in 0..20 {
        client.get(&path).unwrap();
    }
    assert_within("20 requests", start.elapsed(), Duration::from_millis(400), 15);
}

#[test]
fn delay_does_not_limit_the_rate() {
    let registry = shaped(80, 20);
    let path = blob(&registry, 4_000_000);
    let mut client = Connection::open(registry.addr()).unwrap();
    let start = Instant::now();
    client.get(&path).unwrap();
    assert_within("4 MB at 10 MB/s, two round trips", start.elapsed(), Duration::from_millis(480), 15);
}

#[test]
fn connections_share_evenly() {
    let registry = shaped(80, 0);
    let path = blob(&registry, 8_000_000);
    let (address, end) = (registry.addr(), Instant::now() + Duration::from_millis(500));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || {
                let mut client = Connection::open(address).unwrap();
                client.send("GET", &path, &[], &[]).unwrap();
                let mut buffer = [0; 4096];
                let mut len_bytes = 0;
                while Instant::now() < end {
                    len_bytes += client.stream().read(&mut buffer).unwrap();
                }
                len_bytes as f64
            })
        })
        .collect();
    let shares: Vec<f64> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    assert!((shares[0] / shares[1] - 1.0).abs() < 0.15, "{shares:?}");
    assert!((shares[0] + shares[1] - 5_000_000.0).abs() < 750_000.0, "{shares:?} in 500 ms at 10 MB/s");
}

#[test]
fn a_small_answer_passes_a_long_one() {
    let registry = shaped(80, 0);
    let (long, short) = (blob(&registry, 8_000_000), blob(&registry, 4096));
    let mut bulk = Connection::open(registry.addr()).unwrap();
    bulk.send("GET", &long, &[], &[]).unwrap();
    let address = registry.addr();
    let reader = std::thread::spawn(move || bulk.stream().take(4_000_000).read_to_end(&mut Vec::new()));
    let mut client = Connection::open(address).unwrap();
    client.get(&short).unwrap();
    let start = Instant::now();
    for _ in 0..10 {
        client.get(&short).unwrap();
    }
    let each = start.elapsed() / 10;
    assert!(each < Duration::from_millis(10), "{each:?}: a turn of the other is 1.6 ms");
    assert!(!reader.is_finished(), "the long one was under way");
    reader.join().unwrap().unwrap();
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
    let start = Instant::now();
    client.get(&path).unwrap();
    assert_within("4 MB at 20 MB/s", start.elapsed(), Duration::from_millis(200), 15);
}
