//! Every trouble that a registry can make while an image is read, and what becomes of the read.
//!
//! Each case is one line of the table in docs/guarantees.md, which `make faults` makes of what is printed here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_registry::{ClientOptions, Location};
use ublkimg_tests::fault_row;
use ublkimg_tests::registry::{Auth, Config, Credentials, Fault, TestRegistry, Toxic};

use crate::fixture::{Image, LayerContent, read};
use crate::outage::Waiting;
use crate::{AttachOptions, Engine, LoadedImage, Store, attach};

/// How long a read waits here.
const READ_DEADLINE: Duration = Duration::from_secs(3);

/// The scheduler's pause before a failed chunk is asked for again, and some more.
const FAILURE_HOLD: Duration = Duration::from_millis(1500);

/// What becomes of the read that meets the trouble. The one after it, when the trouble is over, always gets its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Data,
    Eio,
}

struct Rig {
    registry: TestRegistry,
    engine: Engine,
    image: Image,
    _dirs: [TempDir; 2],
    loaded: LoadedImage,
}

impl Rig {
    fn new(auth: Auth) -> Self {
        Self::with_deadline(auth, READ_DEADLINE)
    }

    fn with_deadline(auth: Auth, read_deadline: Duration) -> Self {
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let registry = TestRegistry::start(Config { auth, ..Config::default() }).unwrap();
        let store = Arc::new(Store::open(dirs[1].path()).unwrap());
        let engine = Engine::start(&store).unwrap();
        let image = Image::new(&[LayerContent::new(5, &[64, 64])]);
        engine.runtime().block_on(image.push(dirs[0].path(), "v1"));
        registry.load_layout(dirs[0].path(), Some("v1"), "app", "v1").unwrap();
        let location: Location = registry.reference("app", "v1").parse().unwrap();
        let short = Duration::from_millis(700);
        let client = ClientOptions {
            connect_timeout: short,
            response_timeout: short,
            idle_timeout: short,
            auth_file: Some(auth_file(&dirs[0], &registry)),
            ..ClientOptions::default()
        };
        let options = AttachOptions { client, read_deadline, ..AttachOptions::default() };
        let loaded = engine.runtime().block_on(attach(&store, &engine, &location, &options)).unwrap();
        Self { registry, engine, image, _dirs: dirs, loaded }
    }

    /// Reads the first chunk, or the second.
    fn read(&self, chunk: u32) -> Result<bool, i32> {
        let start = self.image.layer_starts[0] + 64 * chunk;
        let expected = &self.image.device[start as usize * BLOCK_SIZE..(start as usize + 64) * BLOCK_SIZE];
        read(&self.loaded.image, start, 64).map(|bytes| bytes == expected)
    }
}

fn auth_file(dir: &TempDir, registry: &TestRegistry) -> std::path::PathBuf {
    let path = dir.path().join("auth.json");
    // dXNlcjpodW50ZXIy: user:hunter2
    let text = format!(r#"{{"auths": {{"{}": {{"auth": "dXNlcjpodW50ZXIy"}}}}}}"#, registry.addr());
    std::fs::write(&path, text).unwrap();
    path
}

fn blobs(toxic: Toxic) -> Fault {
    Fault::new("*/blobs/*", toxic)
}

/// Meets the trouble, then is free of it.
fn case(what: &str, fault: Fault, fate: Fate) {
    case_of(what, Auth::Anonymous, fault, fate);
}

fn case_of(what: &str, auth: Auth, fault: Fault, fate: Fate) {
    let rig = Rig::new(auth);
    rig.registry.set_fault("it", fault);
    let began = Instant::now();
    let met = rig.read(0);
    let took = began.elapsed();
    let expected = match fate {
        Fate::Data => Ok(true),
        Fate::Eio => Err(libc::EIO),
    };
    assert_eq!(met, expected, "{what}");
    assert!(rig.registry.fault_hits("it") > 0 || what.contains("down"), "{what}: it was not met");
    rig.registry.clear_fault("it");
    if fate == Fate::Eio {
        // A chunk that has just failed is not asked for again at once.
        std::thread::sleep(FAILURE_HOLD);
    }
    assert_eq!(rig.read(0), Ok(true), "{what}: the read after it");
    assert_eq!(rig.read(1), Ok(true), "{what}: another read");
    assert_eq!(rig.loaded.image.waiting(), None, "{what}");
    drop(rig.loaded);
    rig.engine.stop();
    note(what, fate, took);
}

fn note(what: &str, fate: Fate, took: Duration) {
    let outcome = match fate {
        Fate::Data => "data",
        Fate::Eio => "EIO; the next read tries afresh",
    };
    fault_row::seen(what, outcome, took);
}

#[test]
fn a_registry_that_is_down() {
    case("registry down for 1 s", Fault::new("*", Toxic::Refuse).for_ms(1000), Fate::Data);
    case("registry down beyond `--io-timeout`", Fault::new("*", Toxic::Refuse), Fate::Eio);
}

#[test]
fn a_registry_that_hangs() {
    case("request hangs once", blobs(Toxic::Hang).times(1), Fate::Data);
    case("requests hang beyond `--io-timeout`", blobs(Toxic::Hang), Fate::Eio);
}

#[test]
fn connections_that_break() {
    case("reset in the body", blobs(Toxic::Reset { after_bytes: 30_000 }).times(2), Fate::Data);
    case("reset before the first byte", blobs(Toxic::Reset { after_bytes: 0 }).times(2), Fate::Data);
    case("truncated body", blobs(Toxic::ShortBody { after_bytes: 1000 }).times(2), Fate::Data);
    case("body drips at 300 kB/s", blobs(Toxic::Slow { bytes_per_s: 300_000 }), Fate::Data);
    let began = Instant::now();
    case("body drips at 1 kB/s beyond `--io-timeout`", blobs(Toxic::Slow { bytes_per_s: 1000 }), Fate::Eio);
    assert!(began.elapsed() < Duration::from_secs(30), "256 KiB would take four minutes: {:?}", began.elapsed());
}

#[test]
fn a_drip_is_one_wait() {
    let rig = Rig::with_deadline(Auth::Anonymous, Duration::from_secs(60));
    rig.registry.set_fault("it", blobs(Toxic::Slow { bytes_per_s: 1000 }));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| rig.read(0));
        let since = wait_for_waiting(&rig, &reader);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            let waiting = rig.loaded.image.waiting().expect("it still waits");
            assert!(waiting.since_ms >= since.since_ms, "it began to wait again: {waiting:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        rig.registry.clear_fault("it");
        rig.loaded.image.detach();
        assert_eq!(reader.join().unwrap(), Err(libc::EIO));
    });
}

fn wait_for_waiting<T>(rig: &Rig, reader: &std::thread::ScopedJoinHandle<'_, T>) -> Waiting {
    loop {
        assert!(!reader.is_finished(), "nobody was said to wait");
        if let Some(waiting) = rig.loaded.image.waiting() {
            return waiting;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn answers_that_do_not_fit() {
    case("`Content-Range` of other bytes, once", blobs(Toxic::WrongContentRange).times(1), Fate::Data);
    case("`Content-Range` of other bytes, always", blobs(Toxic::WrongContentRange), Fate::Eio);
    case("200 with the whole blob instead of 206", blobs(Toxic::IgnoreRange), Fate::Data);
    case("a flipped bit", blobs(Toxic::BitFlip { offset_bytes: 5000 }), Fate::Eio);
}

#[test]
fn refusals() {
    for (code, what) in [(403, "403, access revoked"), (404, "404, blob deleted"), (416, "416")] {
        case(what, blobs(Toxic::Status { code }), Fate::Eio);
    }
}

#[test]
fn overload() {
    case("429 with `Retry-After: 1`", blobs(Toxic::TooManyRequests { retry_after_s: 1 }).times(1), Fate::Data);
    for (code, what) in [(503, "503, three times"), (500, "500, three times"), (502, "502, three times")] {
        case(what, blobs(Toxic::Status { code }).times(3), Fate::Data);
    }
    case("503 beyond `--io-timeout`", blobs(Toxic::Status { code: 503 }), Fate::Eio);
}

#[test]
fn a_token_that_ends_during_reads() {
    let credentials = Credentials::new("user", "hunter2");
    let bearer = Auth::Bearer { credentials, anonymous_pull: false, token_lifetime_s: 1 };
    let rig = Rig::new(bearer);
    assert_eq!(rig.read(0), Ok(true));
    std::thread::sleep(Duration::from_millis(1200));
    let began = Instant::now();
    assert_eq!(rig.read(1), Ok(true));
    note("401, the token has ended", Fate::Data, began.elapsed());
}

#[test]
fn status_says_who_waits_since_when_and_why() {
    let rig = Rig::with_deadline(Auth::Anonymous, Duration::from_secs(60));
    rig.registry.set_fault("it", blobs(Toxic::Hang));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| rig.read(0));
        let waiting = wait_for_waiting(&rig, &reader);
        assert_eq!(waiting.fetches, 1);
        assert!(!waiting.cause.is_empty());
        rig.registry.clear_fault("it");
        assert_eq!(reader.join().unwrap(), Ok(true));
    });
    assert_eq!(rig.read(0), Ok(true));
    assert_eq!(rig.loaded.image.waiting(), None);
}

#[test]
fn nothing_is_fetched_for_an_image_that_was_removed() {
    let rig = Rig::new(Auth::Anonymous);
    rig.registry.set_fault("it", blobs(Toxic::Hang));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| rig.read(0));
        while rig.registry.fault_hits("it") == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        rig.loaded.image.detach();
        assert_eq!(reader.join().unwrap(), Err(libc::EIO), "who waits is told at once");
    });
    let before = rig.registry.stats().requests;
    rig.registry.clear_fault("it");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(rig.registry.stats().requests, before);
}
