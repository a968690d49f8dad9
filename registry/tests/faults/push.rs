//! Pushes: what is sent, what is not, and how often.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ublkimg_registry::{BlobSource, ClientOptions, Digest, Error, ErrorKind, Pushed};

use crate::fake::{Answer, Fake, Seen, Then, answer, blob, hasty, options};

const LEN: usize = 700_000;

async fn push(fake: &Fake, options: &ClientOptions, from: Option<&str>) -> Result<Pushed, Error> {
    let (bytes, digest) = blob(LEN);
    fake.open(options).await.push_blob(&digest, LEN as u64, BlobSource::Bytes(bytes.into()), from).await
}

/// A registry without the blob; `put` answers the uploads, the address of each is `location` and a number.
async fn registry(location: &'static str, put: impl Fn(&Seen, usize) -> Answer + Send + Sync + 'static) -> Fake {
    let puts = AtomicUsize::new(0);
    Fake::start(move |request, _| match request.method.as_str() {
        "HEAD" => answer(404, &[("Content-Length", "0")], ""),
        "POST" => answer(202, &[("Location", location)], ""),
        "DELETE" => answer(204, &[], ""),
        _ => put(request, puts.fetch_add(1, Ordering::SeqCst)),
    })
    .await
}

fn methods(fake: &Fake) -> Vec<String> {
    fake.seen().into_iter().map(|seen| seen.method).collect()
}

#[tokio::test]
async fn what_is_there_is_not_sent() {
    let fake = Fake::start(|_, _| answer(200, &[("Content-Length", "0")], "")).await;
    assert_eq!(push(&fake, &options(), Some("other")).await.unwrap(), Pushed::Existed);
    assert_eq!(methods(&fake), ["HEAD"]);
    // A storage host may refuse HEAD: that the registry redirects is answer enough.
    let fake = Fake::start(|_, _| answer(307, &[("Location", "https://storage.example.com/x")], "")).await;
    assert_eq!(push(&fake, &options(), None).await.unwrap(), Pushed::Existed);
    let fake = Fake::start(|request, _| answer(if request.method == "HEAD" { 405 } else { 206 }, &[], "")).await;
    assert_eq!(push(&fake, &options(), None).await.unwrap(), Pushed::Existed);
    assert_eq!(methods(&fake), ["HEAD", "GET"]);
}

#[tokio::test]
async fn mounted_from_another_repository() {
    let fake = Fake::start(|request, _| answer(if request.method == "HEAD" { 404 } else { 201 }, &[], "")).await;
    assert_eq!(push(&fake, &options(), Some("other/one")).await.unwrap(), Pushed::Mounted);
    let expected = format!("/v2/app/web/blobs/uploads/?mount={}&from=other%2Fone", blob(LEN).1);
    assert_eq!(fake.seen()[1].target.replace("%3A", ":"), expected);
}

#[tokio::test]
async fn a_link_that_is_not_made_leaves_no_upload() {
    let (_, digest) = blob(LEN);
    let fake = Fake::start(|_, _| answer(201, &[], "")).await;
    assert!(fake.open(&options()).await.mount_blob(&digest, "other/one").await.unwrap());
    assert_eq!(methods(&fake), ["POST"]);
    let fake = registry("/up", |_, _| answer(500, &[], "")).await;
    assert!(!fake.open(&options()).await.mount_blob(&digest, "other/one").await.unwrap());
    assert_eq!(methods(&fake), ["POST", "DELETE"]);
    assert_eq!(fake.seen()[1].target, "/up");
}

#[tokio::test]
async fn uploaded_to_where_the_registry_says() {
    for (location, target) in
        [("/up/1?state=a%2Fb", "/up/1?state=a%2Fb&digest="), ("2", "/v2/app/web/blobs/uploads/2?digest=")]
    {
        let fake = registry(location, |_, _| answer(201, &[], "")).await;
        assert_eq!(
            push(&fake, &options(), Some("other")).await.unwrap(),
            Pushed::Uploaded,
            "a refused mount is an upload"
        );
        let put = fake.seen().pop().unwrap();
        assert_eq!(put.target, format!("{target}{}", blob(LEN).1.to_string().replace(':', "%3A")));
        assert_eq!(put.body, blob(LEN).0);
        assert_eq!(put.header("content-length"), Some("700000"));
        assert_eq!(put.header("transfer-encoding"), None);
    }
}

#[tokio::test]
async fn a_file_is_streamed_and_read_again() {
    let fake = registry("/up", |_, number| if number < 2 { answer(502, &[], "") } else { answer(201, &[], "") }).await;
    let dir = tempfile::tempdir().unwrap();
    let (bytes, digest) = blob(LEN);
    let path = dir.path().join("blob");
    std::fs::write(&path, &bytes).unwrap();
    let repository = fake.open(&options()).await;
    let pushed = repository.push_blob(&digest, LEN as u64, BlobSource::File(path), None).await.unwrap();
    assert_eq!(pushed, Pushed::Uploaded);
    assert_eq!(methods(&fake), ["HEAD", "POST", "PUT", "DELETE", "POST", "PUT", "DELETE", "POST", "PUT"]);
    assert!(fake.seen().iter().filter(|seen| seen.method == "PUT").all(|seen| seen.body == bytes));
}

#[tokio::test]
async fn three_uploads_and_no_more() {
    let fake = registry("/up", |_, _| answer(500, &[], "")).await;
    assert_eq!(push(&fake, &options(), None).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(methods(&fake).join(" "), "HEAD POST PUT DELETE POST PUT DELETE POST PUT DELETE");
    let fake = registry("/up", |_, _| answer(403, &[], "")).await;
    assert_eq!(push(&fake, &options(), None).await.unwrap_err().kind(), ErrorKind::Unauthorized);
    assert_eq!(methods(&fake), ["HEAD", "POST", "PUT", "DELETE"]);
    let stored = Digest::of(b"other").to_string();
    let fake = registry("/up", move |_, _| answer(201, &[("Docker-Content-Digest", &stored)], "")).await;
    assert_eq!(push(&fake, &options(), None).await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn a_connection_that_stands_still_is_given_up() {
    let silent = Answer { delay: Duration::from_secs(60), bytes: Vec::new(), then: Then::Hang };
    let (listener, digest) = (std::net::TcpListener::bind("127.0.0.1:0").unwrap(), Digest::of(&vec![0; 64 << 20]));
    // Accepts connections and reads nothing.
    let stuck = listener.local_addr().unwrap();
    let fake = Fake::start(move |request, _| match request.method.as_str() {
        "HEAD" => answer(404, &[("Content-Length", "0")], ""),
        "POST" => answer(202, &[("Location", &format!("http://{stuck}/up"))], ""),
        _ => silent.clone(),
    })
    .await;
    let started = std::time::Instant::now();
    let once = ClientOptions { retry_deadline: Duration::ZERO, ..hasty() };
    let source = BlobSource::Bytes(vec![0; 64 << 20].into());
    let error = fake.open(&once).await.push_blob(&digest, 64 << 20, source, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("stopped taking an upload"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
}

#[tokio::test]
async fn sources_that_do_not_fit_are_refused_early() {
    let fake = registry("/up", |_, _| answer(201, &[], "")).await;
    let repository = fake.open(&options()).await;
    let bytes = BlobSource::Bytes(Bytes::from_static(b"abc"));
    let error = repository.push_blob(&Digest::of(b"abc"), 4, bytes, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let absent = BlobSource::File("/nonexistent/blob".into());
    let error = repository.push_blob(&Digest::of(b"abc"), 3, absent, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(methods(&fake), ["HEAD", "HEAD"]);
}

/// A registry behind Basic authentication whose uploads go to `elsewhere`.
async fn guarded(elsewhere: Option<String>, tokens: Arc<AtomicUsize>) -> (Fake, ClientOptions, tempfile::TempDir) {
    let fake = Fake::start(move |request, number| {
        if request.header("authorization") != Some("Basic dTpw") {
            return answer(401, &[("WWW-Authenticate", "Basic realm=x")], "");
        }
        match (request.method.as_str(), &elsewhere) {
            ("HEAD", _) => answer(404, &[("Content-Length", "0")], ""),
            ("POST", Some(elsewhere)) => answer(202, &[("Location", &format!("http://{elsewhere}/up"))], ""),
            ("POST", None) => answer(202, &[("Location", "/up")], ""),
            _ => {
                tokens.store(number, Ordering::SeqCst);
                answer(201, &[], "")
            }
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auth.json");
    std::fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, fake.authority)).unwrap();
    (fake, ClientOptions { auth_file: Some(file), ..options() }, dir)
}

#[tokio::test]
async fn authorization_stays_with_the_registry() {
    let (fake, options, _dir) = guarded(None, Arc::default()).await;
    assert_eq!(push(&fake, &options, None).await.unwrap(), Pushed::Uploaded);
    let storage = Fake::start(|request, _| {
        assert_eq!(request.header("authorization"), None);
        answer(201, &[], "")
    })
    .await;
    let (fake, options, _dir) = guarded(Some(storage.authority.clone()), Arc::default()).await;
    assert_eq!(push(&fake, &options, None).await.unwrap(), Pushed::Uploaded);
    assert_eq!(storage.count(), 1);
}

#[tokio::test]
async fn scopes_of_a_push_and_a_token_that_ends_under_way() {
    let tokens =
        Fake::start(|_, number| answer(200, &[], format!(r#"{{"token":"T{number}","expires_in":300}}"#))).await;
    let challenge = format!(r#"Bearer realm="http://{}/token""#, tokens.authority);
    let fake = Fake::start(move |request, _| match (request.method.as_str(), request.header("authorization")) {
        ("HEAD", Some(_)) => answer(404, &[("Content-Length", "0")], ""),
        ("POST", Some(_)) => answer(202, &[("Location", "/up")], ""),
        ("DELETE", Some(_)) => answer(204, &[], ""),
        ("PUT", Some("Bearer T1")) => answer(201, &[], ""),
        ("HEAD", None) => answer(401, &[("WWW-Authenticate", &challenge), ("Content-Length", "0")], ""),
        _ => answer(401, &[("WWW-Authenticate", &challenge)], ""),
    })
    .await;
    assert_eq!(push(&fake, &options(), Some("from/it")).await.unwrap(), Pushed::Uploaded);
    assert_eq!(methods(&fake), ["HEAD", "HEAD", "POST", "PUT", "DELETE", "POST", "PUT"]);
    let target = &tokens.seen()[0].target;
    assert_eq!(target, "/token?scope=repository%3Aapp%2Fweb%3Apull%2Cpush&scope=repository%3Afrom%2Fit%3Apull");
    assert_eq!(tokens.count(), 2);
}

#[tokio::test]
async fn manifests() {
    let fake = Fake::start(|_, number| if number == 0 { answer(500, &[], "") } else { answer(201, &[], "") }).await;
    let repository = fake.open(&options()).await;
    let digest = repository.push_manifest("application/x", Bytes::from_static(b"{}"), Some("v2")).await.unwrap();
    assert_eq!(digest, Digest::of(b"{}"));
    repository.push_manifest("application/x", Bytes::from_static(b"{}"), None).await.unwrap();
    let seen = fake.seen();
    let targets: Vec<_> = seen.iter().map(|seen| seen.target.as_str()).collect();
    let by_digest = format!("/v2/app/web/manifests/{digest}");
    assert_eq!(targets, ["/v2/app/web/manifests/v2", "/v2/app/web/manifests/v2", &by_digest]);
    assert!(seen.iter().all(|seen| seen.header("content-type") == Some("application/x") && seen.body == b"{}"));
    for (media_type, tag) in [("application/x", Some("../x")), ("a\nb", None)] {
        let error = repository.push_manifest(media_type, Bytes::from_static(b"{}"), tag).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let stored = Digest::of(b"other").to_string();
    let fake = Fake::start(move |_, _| answer(201, &[("Docker-Content-Digest", &stored)], "")).await;
    let error = fake.open(&options()).await.push_manifest("application/x", Bytes::new(), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}
