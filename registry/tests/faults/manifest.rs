//! Manifests: verified and bounded.

use std::time::Duration;

use ublkimg_registry::{ClientOptions, Digest, ErrorKind, MAX_MANIFEST_BYTES};

use crate::fake::{Fake, Then, answer, options};
use crate::fault_row::FaultRow;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

#[tokio::test]
async fn one_request_by_tag() {
    let digest = Digest::of(b"{}");
    let stated = digest.to_string();
    let fake = Fake::start(move |_, _| {
        answer(200, &[("Content-Type", &format!("{INDEX}; charset=utf-8")), ("Docker-Content-Digest", &stated)], "{}")
    })
    .await;
    let resolved = fake.open(&options()).await.resolve().await.unwrap();
    assert_eq!((resolved.digest, resolved.media_type.as_str(), &resolved.bytes[..]), (digest, INDEX, &b"{}"[..]));
    let seen = fake.seen();
    assert_eq!((seen.len(), seen[0].target.as_str()), (1, "/v2/app/web/manifests/v1"));
    assert!(seen[0].header("accept").unwrap().contains(INDEX));
}

#[tokio::test]
async fn a_digest_in_the_reference_wins_over_the_tag() {
    let digest = Digest::of(b"{}");
    let fake = Fake::start(|_, _| answer(200, &[("Content-Type", "text/plain")], "{}")).await;
    let repository = fake.open_as(&format!("a:tag@{digest}"), &options()).await;
    let resolved = repository.resolve().await.unwrap();
    assert_eq!((resolved.digest, resolved.media_type.as_str()), (digest, "text/plain"));
    assert_eq!(fake.seen()[0].target, format!("/v2/a/manifests/{digest}"));
    let other = fake.open_as(&format!("a@{}", Digest::of(b"other")), &options()).await;
    assert_eq!(other.resolve().await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn the_media_type_inside_counts_where_none_is_stated() {
    let body = format!(r#"{{"mediaType":"{INDEX}"}}"#);
    let fake = Fake::start(move |_, _| answer(200, &[("Content-Type", "application/json")], &body)).await;
    assert_eq!(fake.open(&options()).await.resolve().await.unwrap().media_type, INDEX);
}

#[tokio::test]
async fn other_bytes_are_corrupt() {
    let stated = Digest::of(b"other").to_string();
    let fake = Fake::start(move |_, _| answer(200, &[("Docker-Content-Digest", &stated)], "{}")).await;
    let repository = fake.open(&options()).await;
    let error = repository.resolve().await.unwrap_err();
    assert_eq!((error.kind(), fake.count()), (ErrorKind::Corrupt, 3), "{error}");
    let fault = FaultRow::begins("a manifest with other bytes than its digest");
    let error = repository.manifest(&Digest::of(b"[]")).await.unwrap_err();
    fault.ends("refused");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(&repository.manifest(&Digest::of(b"{}")).await.unwrap()[..], b"{}");
}

#[tokio::test]
async fn too_long_is_refused_early() {
    let announced = (MAX_MANIFEST_BYTES + 1).to_string();
    let fake = Fake::start(move |_, number| match number {
        0 => answer(200, &[("Content-Length", &announced)], "").then(Then::Hang),
        _ => answer(200, &[("Transfer-Encoding", "chunked")], "FFFFFFFF\r\n").then(Then::Forever),
    })
    .await;
    let repository = fake.open(&options()).await;
    for _ in 0..2 {
        let error = repository.resolve().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    }
    assert_eq!(fake.count(), 2);
    let longest = vec![b' '; MAX_MANIFEST_BYTES + 1];
    let error = repository.push_manifest(INDEX, longest.into(), None).await.unwrap_err();
    assert_eq!((error.kind(), fake.count()), (ErrorKind::TooLarge, 2));
}

#[tokio::test]
async fn trouble_is_waited_out() {
    let fake = Fake::start(|_, number| if number < 2 { answer(503, &[], "") } else { answer(200, &[], "{}") }).await;
    assert_eq!(fake.open(&options()).await.resolve().await.unwrap().digest, Digest::of(b"{}"));
    let never = ClientOptions { retry_deadline: Duration::ZERO, ..options() };
    let fake = Fake::start(|_, _| answer(503, &[], r#"{"errors":[{"code":"UNAVAILABLE"}]}"#)).await;
    let error = fake.open(&never).await.resolve().await.unwrap_err();
    let expected = format!("registry {} answers 503 Service Unavailable for tag v1: UNAVAILABLE", fake.authority);
    assert_eq!((error.kind(), error.to_string(), fake.count()), (ErrorKind::Unavailable, expected, 1));
}
