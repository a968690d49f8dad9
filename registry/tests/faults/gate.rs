//! A `Retry-After` holds the whole client: the process.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ublkimg_registry::{BlobSource, ClientOptions, Digest, ErrorKind};

use crate::fake::{Fake, answer, blob, options, partial};

const LEN: usize = 10_000;

/// A registry that says once, to request `at`, to come back after a second; when that was, and when each request came.
struct Held {
    fake: Fake,
    told: Arc<Mutex<Option<Instant>>>,
    came: Arc<Mutex<Vec<Instant>>>,
}

async fn held(status: u16, at: usize) -> Held {
    let told: Arc<Mutex<Option<Instant>>> = Arc::default();
    let came: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let (telling, coming) = (Arc::clone(&told), Arc::clone(&came));
    let (bytes, _) = blob(LEN);
    let fake = Fake::start(move |request, number| {
        coming.lock().unwrap().push(Instant::now());
        if number == at {
            *telling.lock().unwrap() = Some(Instant::now());
            return answer(status, &[("Retry-After", "1")], "");
        }
        match request.method.as_str() {
            "HEAD" => answer(404, &[("Content-Length", "0")], ""),
            "POST" => answer(202, &[("Location", "/up")], ""),
            "PUT" => answer(201, &[], ""),
            _ if request.target.contains("/manifests/") => answer(200, &[], "{}"),
            _ if request.target.contains("/referrers/") => answer(
                200,
                &[("Content-Type", "application/vnd.oci.image.index.v1+json")],
                r#"{"schemaVersion":2,"manifests":[]}"#,
            ),
            _ => partial(request, &bytes),
        }
    })
    .await;
    Held { fake, told, came }
}

impl Held {
    /// Nothing came between the answer and the end of its second, give or take what was on its way.
    fn nothing_came_too_early(&self) {
        let told = self.told.lock().unwrap().expect("it was told");
        let after = |at: &Instant| at.saturating_duration_since(told);
        let came = self.came.lock().unwrap();
        let early: Vec<_> =
            came.iter().map(after).filter(|time| !time.is_zero() && *time < Duration::from_millis(950)).collect();
        assert_eq!(early, [] as [Duration; 0]);
        assert!(came.iter().any(|at| after(at) >= Duration::from_millis(950)), "and then they came");
    }
}

#[tokio::test]
async fn all_kinds_of_requests_wait_and_then_succeed() {
    for status in [429, 503] {
        let held = held(status, 0).await;
        let repository = held.fake.open(&options()).await;
        let (bytes, digest) = blob(LEN);
        // The first request is told.
        let first = tokio::spawn({
            let repository = repository.clone();
            async move { repository.blob_range(&digest, 0..10).await }
        });
        while held.told.lock().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        let absent = Digest::of(b"absent");
        let mut stream = repository.blob_stream(&digest, 0..LEN as u64);
        let (range, piece, manifest, has, referrers, pushed) = tokio::join!(
            repository.blob_range(&digest, 5..10),
            stream.next(),
            repository.resolve(),
            repository.has_blob(&absent),
            repository.referrers(&digest, None),
            repository.push_blob(&digest, LEN as u64, BlobSource::Bytes(bytes.clone().into()), None),
        );
        assert_eq!(range.unwrap(), bytes[5..10]);
        assert!(!piece.unwrap().unwrap().is_empty());
        assert!(manifest.is_ok() && !has.unwrap() && referrers.unwrap().is_empty() && pushed.is_ok());
        assert!(first.await.unwrap().is_ok());
        held.nothing_came_too_early();
    }
}

#[tokio::test]
async fn other_repositories_of_the_registry_wait_too() {
    let held = held(429, 0).await;
    let (_, digest) = blob(LEN);
    let (one, other) = (held.fake.open(&options()).await, held.fake.open_as("app/other:v2", &options()).await);
    let first = tokio::spawn(async move { one.blob_range(&digest, 0..10).await });
    while held.told.lock().unwrap().is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(other.blob_range(&digest, 0..10).await.unwrap().len(), 10);
    assert!(first.await.unwrap().is_ok());
    held.nothing_came_too_early();
}

#[tokio::test]
async fn the_wait_is_not_a_failure_of_who_met_no_refusal() {
    // One attempt each: whoever was not refused is not short of time either.
    let held = held(429, 0).await;
    let repository = held.fake.open(&ClientOptions { retry_deadline: Duration::ZERO, ..options() }).await;
    let (_, digest) = blob(LEN);
    assert_eq!(repository.blob_range(&digest, 0..10).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(repository.blob_range(&digest, 0..10).await.unwrap().len(), 10);
    held.nothing_came_too_early();
}

#[tokio::test]
async fn a_token_service_closes_the_gate_too() {
    let told = Arc::new(Mutex::new(None::<Instant>));
    let telling = Arc::clone(&told);
    let (bytes, digest) = blob(LEN);
    let fake = Fake::start(move |request, _| {
        let realm = format!("Bearer realm=\"http://{}/token\"", request.header("host").unwrap());
        if request.target.starts_with("/token") {
            let mut told = telling.lock().unwrap();
            if told.is_none() {
                *told = Some(Instant::now());
                return answer(429, &[("Retry-After", "1")], "");
            }
            assert!(told.unwrap().elapsed() >= Duration::from_millis(950));
            return answer(200, &[], r#"{"token":"t"}"#);
        }
        match request.header("authorization") {
            None => answer(401, &[("WWW-Authenticate", &realm)], ""),
            Some(_) => partial(request, &bytes),
        }
    })
    .await;
    let repository = fake.open(&options()).await;
    assert_eq!(repository.blob_range(&digest, 0..10).await.unwrap().len(), 10);
}

#[tokio::test]
async fn a_stream_keeps_its_place() {
    let (bytes, digest) = blob(700_000);
    let expected = bytes.clone();
    let fake = Fake::start(move |request, number| match number {
        0 => {
            let mut whole = partial(request, &bytes);
            whole.bytes.truncate(whole.bytes.len() - 300_000);
            whole.then(crate::fake::Then::Close)
        }
        1 => answer(429, &[("Retry-After", "1")], ""),
        _ => {
            assert_eq!(request.header("range"), Some("bytes=400000-699999"));
            partial(request, &bytes)
        }
    })
    .await;
    let repository = fake.open(&options()).await;
    let mut stream = repository.blob_stream(&digest, 0..700_000);
    let mut read = Vec::new();
    while let Some(piece) = stream.next().await {
        read.extend_from_slice(&piece.unwrap());
    }
    assert!(read == expected);
    assert_eq!(fake.count(), 3);
}
