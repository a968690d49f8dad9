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
use ublkimg_tests::skip;
use ublkimg_tests::tls::{Authority, TlsFront};

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
    dirs: [TempDir; 2],
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
        Self { registry, engine, image, dirs, loaded }
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

/// Meets the trouble, then is free of it; how long the read took that met it.
fn case(what: &str, fault: Fault, fate: Fate) -> Duration {
    case_of(what, Auth::Anonymous, |_| fault, fate)
}

fn case_of(what: &str, auth: Auth, fault: impl FnOnce(&Rig) -> Fault, fate: Fate) -> Duration {
    let rig = Rig::new(auth);
    let fault = fault(&rig);
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
    took
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
}

#[test]
fn a_drip_does_not_hold_a_read() {
    // Longer than any pause of the registry's client: in one of those the deadline would pass by itself.
    let rig = Rig::with_deadline(Auth::Anonymous, Duration::from_secs(6));
    rig.registry.set_fault("it", blobs(Toxic::Slow { bytes_per_s: 1000 }));
    let began = Instant::now();
    assert_eq!(rig.read(0), Err(libc::EIO));
    let took = began.elapsed();
    assert!(took < Duration::from_secs(60), "256 KiB would take four minutes: {took:?}");
    note("body drips at 1 kB/s beyond `--io-timeout` (6 s)", Fate::Eio, took);
    rig.registry.clear_fault("it");
    std::thread::sleep(FAILURE_HOLD);
    assert_eq!(rig.read(0), Ok(true));
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
    let refusals = [(401, "401, always"), (403, "403, access revoked"), (404, "404, blob deleted"), (416, "416")];
    for (code, what) in refusals {
        case(what, blobs(Toxic::Status { code }), Fate::Eio);
    }
}

#[test]
fn overload() {
    let busy = [
        ("429 with `Retry-After: 1`", Toxic::TooManyRequests { retry_after_s: 1 }),
        ("503 with `Retry-After: 1`", Toxic::Unavailable { retry_after_s: 1 }),
    ];
    for (what, toxic) in busy {
        let took = case(what, blobs(toxic).times(1), Fate::Data);
        assert!(took >= Duration::from_secs(1), "{what}: it came back after {took:?}");
    }
    for (code, what) in [(503, "503, three times"), (500, "500, three times"), (502, "502, three times")] {
        case(what, blobs(Toxic::Status { code }).times(3), Fate::Data);
    }
    case("503 beyond `--io-timeout`", blobs(Toxic::Status { code: 503 }), Fate::Eio);
}

fn bearer() -> Auth {
    let credentials = Credentials::new("user", "hunter2");
    Auth::Bearer { credentials, anonymous_pull: false, token_lifetime_s: 600 }
}

#[test]
fn a_token_that_ends_during_reads() {
    let rig = Rig::new(bearer());
    assert_eq!(rig.read(0), Ok(true));
    let before = rig.registry.stats();
    rig.registry.revoke_tokens();
    let began = Instant::now();
    assert_eq!(rig.read(1), Ok(true));
    note("401, the token has ended", Fate::Data, began.elapsed());
    let after = rig.registry.stats();
    assert_eq!(after.statuses[&401], before.statuses[&401] + 1);
    assert_eq!(after.requests_of("token"), before.requests_of("token") + 1);
    case_of("403 once, the token has ended", bearer(), |_| blobs(Toxic::Status { code: 403 }).times(1), Fate::Data);
}

#[test]
fn a_token_service_in_trouble() {
    let tokens = |toxic| {
        move |rig: &Rig| {
            rig.registry.revoke_tokens();
            Fault::new("/_token", toxic)
        }
    };
    let busy = |rig: &Rig| tokens(Toxic::Status { code: 503 })(rig).times(2);
    case_of("token service down, twice", bearer(), busy, Fate::Data);
    case_of("token service hangs beyond `--io-timeout`", bearer(), tokens(Toxic::Hang), Fate::Eio);
    case_of("token service refuses", bearer(), tokens(Toxic::Status { code: 403 }), Fate::Eio);
}

/// Another registry with the blobs, to which the rig's redirects.
fn storage(rig: &Rig) -> (TestRegistry, Fault) {
    let storage = TestRegistry::start(Config::default()).unwrap();
    storage.load_layout(rig.dirs[0].path(), Some("v1"), "app", "v1").unwrap();
    let redirect = blobs(Toxic::Redirect { to: format!("http://{}", storage.addr()) });
    (storage, redirect)
}

#[test]
fn a_storage_whose_address_expires() {
    let rig = Rig::new(Auth::Anonymous);
    let (storage, redirect) = storage(&rig);
    rig.registry.set_fault("redirect", redirect);
    assert_eq!(rig.read(0), Ok(true));
    storage.set_fault("expired", blobs(Toxic::Status { code: 403 }).times(1));
    let began = Instant::now();
    assert_eq!(rig.read(1), Ok(true));
    note("redirect to storage whose address expires", Fate::Data, began.elapsed());
    assert_eq!((storage.fault_hits("expired"), rig.registry.fault_hits("redirect")), (1, 2), "a new address is got");
}

#[test]
fn redirects_that_lead_nowhere() {
    let circle = |rig: &Rig| blobs(Toxic::Redirect { to: format!("http://{}", rig.registry.addr()) });
    case_of("redirects in a circle", Auth::Anonymous, circle, Fate::Eio);
    let mut lives = None;
    let refused = |rig: &Rig| {
        let (storage, redirect) = storage(rig);
        storage.set_fault("it", blobs(Toxic::Status { code: 403 }));
        lives = Some(storage);
        redirect
    };
    case_of("redirect to storage that refuses", Auth::Anonymous, refused, Fate::Eio);
    drop(lives);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = |_: &Rig| blobs(Toxic::Redirect { to: format!("http://{gone}") });
    case_of("redirect to storage that is down beyond `--io-timeout`", Auth::Anonymous, gone, Fate::Eio);
}

#[test]
fn a_certificate_that_does_not_verify() {
    if !Authority::is_possible() {
        skip!("there is no openssl");
    }
    let rig = Rig::new(Auth::Anonymous);
    let authority = Authority::new(rig.dirs[0].path().join("authority")).unwrap();
    let (storage, _) = storage(&rig);
    let front = TlsFront::start(storage.addr(), &authority.issue("stranger").unwrap(), None).unwrap();
    rig.registry.set_fault("it", blobs(Toxic::Redirect { to: format!("https://{}", front.addr()) }));
    let began = Instant::now();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| rig.read(0));
        let waiting = wait_for_waiting(&rig, &reader);
        assert!(waiting.cause.contains("certificate"), "{waiting:?}");
        assert!(waiting.cause.contains(&front.addr().to_string()), "{waiting:?}");
        assert_eq!(reader.join().unwrap(), Err(libc::EIO));
    });
    note("a certificate that does not verify, beyond `--io-timeout`", Fate::Eio, began.elapsed());
    rig.registry.clear_fault("it");
    std::thread::sleep(FAILURE_HOLD);
    assert_eq!(rig.read(0), Ok(true));
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
        assert_eq!(waiting.what, format!("chunk 0 of blob {}", rig.image.manifest.layers[0].digest));
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
