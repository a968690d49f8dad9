//! Blobs that lie elsewhere: storage hosts with signed, expiring addresses.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ublkimg_registry::{ClientOptions, ErrorKind};

use crate::fake::{Fake, answer, blob, options, partial};
use crate::fault_row::FaultRow;

/// A registry that redirects to `storage` with a new signature each time, after Basic authentication.
async fn registry(storage: String) -> (Fake, ClientOptions, tempfile::TempDir) {
    let signatures = AtomicUsize::new(0);
    let fake = Fake::start(move |request, _| {
        if request.header("authorization").is_none() {
            return answer(401, &[("WWW-Authenticate", "Basic realm=x")], "");
        }
        let number = signatures.fetch_add(1, Ordering::SeqCst);
        answer(307, &[("Location", &format!("http://{storage}/data?signature=SECRET{number}"))], "moved")
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auth.json");
    std::fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, fake.authority)).unwrap();
    (fake, ClientOptions { auth_file: Some(file), ..options() }, dir)
}

#[tokio::test]
async fn the_address_is_kept_until_it_expires() {
    let (bytes, digest) = blob(1000);
    let valid = Arc::new(AtomicUsize::new(0));
    let expected = Arc::clone(&valid);
    let storage = Fake::start(move |request, _| {
        assert_eq!(request.header("authorization"), None, "authorization must not leave the registry");
        let current = format!("/data?signature=SECRET{}", expected.load(Ordering::SeqCst));
        if request.target == current { partial(request, &bytes) } else { answer(403, &[], "expired") }
    })
    .await;
    let (registry, options, _dir) = registry(storage.authority.clone()).await;
    let repository = registry.open(&options).await;
    for _ in 0..3 {
        assert_eq!(repository.blob_range(&digest, 10..20).await.unwrap().len(), 10);
    }
    assert_eq!((registry.count(), storage.count()), (2, 3), "401 and redirect once, then straight to the storage");

    valid.store(1, Ordering::SeqCst);
    assert_eq!(repository.blob_range(&digest, 10..20).await.unwrap().len(), 10);
    assert_eq!((registry.count(), storage.count()), (3, 5), "one refusal, one new address");
    assert_eq!(repository.blob_range(&digest, 0..1000).await.unwrap(), blob(1000).0);
    assert_eq!((registry.count(), storage.count()), (3, 6));
}

#[tokio::test]
async fn a_storage_that_always_refuses_is_asked_once() {
    let storage = Fake::start(|_, _| answer(403, &[], "SECRET")).await;
    let (registry, options, _dir) = registry(storage.authority.clone()).await;
    let error = registry.open(&options).await.blob_range(&blob(9).1, 0..9).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert_eq!((registry.count(), storage.count()), (2, 1));
    assert!(error.to_string().contains(&storage.authority), "{error}");
    assert!(!format!("{error:?}").contains("SECRET"), "{error:?}");
}

#[tokio::test]
async fn a_storage_in_trouble_is_asked_again_without_the_registry() {
    let (bytes, digest) = blob(1000);
    let storage = Fake::start(move |request, number| match number {
        1 => answer(500, &[], ""),
        _ => partial(request, &bytes),
    })
    .await;
    let (registry, options, _dir) = registry(storage.authority.clone()).await;
    let repository = registry.open(&options).await;
    for _ in 0..2 {
        assert_eq!(repository.blob_range(&digest, 10..20).await.unwrap().len(), 10);
    }
    assert_eq!((registry.count(), storage.count()), (2, 3));
}

#[tokio::test]
async fn a_storage_that_is_gone_leaks_no_address() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (registry, options, _dir) = registry(gone.to_string()).await;
    let options = ClientOptions { retry_deadline: Duration::from_millis(200), ..options };
    let repository = registry.open(&options).await;
    let error = repository.blob_range(&blob(9).1, 0..9).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&format!("{gone} (for registry {}) is not reachable", registry.authority)));
    assert!(!format!("{error:?} {repository:?}").contains("SECRET"), "{error:?}");
    assert!(!format!("{error:?} {repository:?}").contains("dTpw"), "{error:?}");
}

#[tokio::test]
async fn circles_and_odd_addresses_end() {
    for location in ["/v2/app/web/elsewhere", "ftp://127.0.0.1/x", "http://blobs.example.com/x", "http://", ""] {
        let fake = Fake::start(move |_, _| answer(302, &[("Location", location)], "")).await;
        let once = ClientOptions { retry_deadline: Duration::ZERO, ..options() };
        let fault = FaultRow::begins("redirects in a circle, or to an address that is none");
        let error = fake.open(&once).await.blob_range(&blob(9).1, 0..9).await.unwrap_err();
        fault.ends("an error, after at most 6 requests an attempt");
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid), "{location}: {error}");
        assert!(fake.count() <= 6, "{location}: {}", fake.count());
    }
    let fake = Fake::start(|_, _| answer(307, &[], "")).await;
    let error = fake.open(&options()).await.blob_range(&blob(9).1, 0..9).await.unwrap_err();
    assert!(error.to_string().ends_with("answers 307 Temporary Redirect without an address"), "{error}");
}

#[tokio::test]
async fn within_the_registry_authorization_stays() {
    let (bytes, digest) = blob(100);
    let fake = Fake::start(move |request, _| match (request.header("authorization"), request.target.as_str()) {
        (None, _) => answer(401, &[("WWW-Authenticate", "Basic realm=x")], ""),
        (Some(_), "/elsewhere") => partial(request, &bytes),
        (Some(_), _) => answer(307, &[("Location", "/elsewhere")], ""),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auth.json");
    std::fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, fake.authority)).unwrap();
    let repository = fake.open(&ClientOptions { auth_file: Some(file), ..options() }).await;
    assert_eq!(repository.blob_range(&digest, 0..100).await.unwrap(), blob(100).0);
}
