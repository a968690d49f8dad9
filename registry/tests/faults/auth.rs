//! Tokens and passwords: obtained once, renewed when refused, never sent to a stranger.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ublkimg_registry::{ClientOptions, ErrorKind};

use crate::fake::{Answer, Fake, Seen, Then, answer, blob, hasty, options, partial};
use crate::fault_row::FaultRow;

/// A token service that gives T0, T1, ..., and a registry that takes the tokens from `valid` on.
struct Pair {
    registry: Fake,
    tokens: Fake,
    valid: Arc<AtomicUsize>,
}

async fn pair(token: impl Fn(&Seen, usize) -> Answer + Send + Sync + 'static) -> Pair {
    pair_that_refuses(401, token).await
}

/// The same; the registry refuses a token with this status.
async fn pair_that_refuses(status: u16, token: impl Fn(&Seen, usize) -> Answer + Send + Sync + 'static) -> Pair {
    let tokens = Fake::start(token).await;
    let valid = Arc::new(AtomicUsize::new(0));
    let (first, (bytes, _)) = (Arc::clone(&valid), blob(1000));
    let challenge = format!(
        r#"Bearer realm="http://{}/token?x=1",service="s & s",scope="repository:app/web:pull aws""#,
        tokens.authority
    );
    let registry = Fake::start(move |request, _| {
        let token: Option<usize> =
            request.header("authorization").and_then(|header| header.strip_prefix("Bearer T")?.parse().ok());
        match token {
            Some(number) if number >= first.load(Ordering::SeqCst) && number < 1000 => partial(request, &bytes),
            Some(_) if status != 401 => answer(status, &[], ""),
            _ => answer(401, &[("WWW-Authenticate", &challenge)], ""),
        }
    })
    .await;
    Pair { registry, tokens, valid }
}

fn token(number: usize) -> Answer {
    answer(200, &[], format!(r#"{{"token":"T{number}","expires_in":300}}"#))
}

fn auth_file(dir: &tempfile::TempDir, authority: &str, entry: &str) -> ClientOptions {
    let file = dir.path().join("auth.json");
    std::fs::write(&file, format!(r#"{{"auths":{{"{authority}":{entry}}}}}"#)).unwrap();
    ClientOptions { auth_file: Some(file), ..options() }
}

#[tokio::test]
async fn an_anonymous_token_serves_many_requests() {
    let pair = pair(|_, number| token(number)).await;
    let repository = pair.registry.open(&options()).await;
    for _ in 0..3 {
        repository.blob_range(&blob(1000).1, 0..10).await.unwrap();
    }
    assert_eq!((pair.registry.count(), pair.tokens.count()), (4, 1));
    let seen = pair.tokens.seen().remove(0);
    assert_eq!(seen.target, "/token?x=1&service=s+%26+s&scope=repository%3Aapp%2Fweb%3Apull&scope=aws");
    assert_eq!((seen.method.as_str(), seen.header("authorization")), ("GET", None));
}

#[tokio::test]
async fn many_refusals_one_renewal() {
    let pair = pair(|_, number| token(number).after(Duration::from_millis(50))).await;
    let repository = pair.registry.open(&options()).await;
    let digest = blob(1000).1;
    for expired in 0..3 {
        pair.valid.store(expired, Ordering::SeqCst);
        let reads = (0..20).map(|_| repository.blob_range(&digest, 0..10));
        for result in futures_util::future::join_all(reads).await {
            result.unwrap();
        }
        assert_eq!(pair.tokens.count(), expired + 1);
    }
}

#[tokio::test]
async fn a_token_is_renewed_before_its_end() {
    let lifetime_s = |number| if number == 0 { 1 } else { 300 };
    let token = move |number| format!(r#"{{"access_token":"T{number}","expires_in":{}}}"#, lifetime_s(number));
    let pair = pair(move |_, number| answer(200, &[], token(number)).after(Duration::from_millis(50))).await;
    let repository = pair.registry.open(&options()).await;
    let digest = blob(1000).1;
    repository.blob_range(&digest, 0..10).await.unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    let reads = (0..20).map(|_| repository.blob_range(&digest, 0..10));
    for result in futures_util::future::join_all(reads).await {
        result.unwrap();
    }
    assert_eq!((pair.registry.count(), pair.tokens.count()), (2 + 20, 2), "no second 401, one token for all");
}

#[tokio::test]
async fn a_token_that_is_refused_with_403_is_renewed_once() {
    let pair = pair_that_refuses(403, |_, number| token(number)).await;
    let repository = pair.registry.open(&options()).await;
    let digest = blob(1000).1;
    for ended in 0..3 {
        pair.valid.store(ended, Ordering::SeqCst);
        repository.blob_range(&digest, 0..10).await.unwrap();
        assert_eq!(pair.tokens.count(), ended + 1);
    }
    let before = (pair.registry.count(), pair.tokens.count());
    pair.valid.store(5000, Ordering::SeqCst);
    let error = repository.blob_range(&digest, 0..10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(error.to_string().contains("denies access"), "{error}");
    assert_eq!(
        (pair.registry.count(), pair.tokens.count()),
        (before.0 + 2, before.1 + 1),
        "a second 403 is the answer"
    );
}

#[tokio::test]
async fn passwords_go_to_the_token_service() {
    let pair = pair(|request, number| match request.header("authorization") {
        Some("Basic dTpw") => token(number),
        _ => answer(401, &[], "SECRET"),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let good = auth_file(&dir, &pair.registry.authority, r#"{"auth":"dTpw"}"#);
    pair.registry.open(&good).await.blob_range(&blob(1000).1, 0..10).await.unwrap();

    let bad = auth_file(&dir, &pair.registry.authority, r#"{"auth":"dTpwcA"}"#);
    let error = pair.registry.open(&bad).await.blob_range(&blob(1000).1, 0..10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    let name = &pair.registry.authority;
    let expected = format!("credentials for {name} were refused; run \"docker login {name}\" or give --auth-file");
    assert_eq!(error.to_string(), expected);

    let error = pair.registry.open(&options()).await.blob_range(&blob(1000).1, 0..10).await.unwrap_err();
    let expected = format!(
        "registry {name} wants credentials for repository app/web; run \"docker login {name}\" or give --auth-file"
    );
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Unauthorized, expected));
}

#[tokio::test]
async fn a_file_that_was_rotated_is_noticed() {
    let pair = pair(|request, number| match (number, request.header("authorization")) {
        (0, Some("Basic dTpw")) | (1.., Some("Basic dTpuZXc=")) => token(number),
        _ => answer(401, &[], ""),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let options = auth_file(&dir, &pair.registry.authority, r#"{"auth":"dTpw"}"#);
    let repository = pair.registry.open(&options).await;
    repository.blob_range(&blob(1000).1, 0..10).await.unwrap();
    auth_file(&dir, &pair.registry.authority, r#"{"auth":"dTpuZXc="}"#);
    pair.valid.store(1, Ordering::SeqCst);
    repository.blob_range(&blob(1000).1, 0..10).await.unwrap();
    assert_eq!(pair.tokens.count(), 2);
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let pair = pair(|request, number| {
        assert_eq!(request.method, "POST");
        let expected = "grant_type=refresh_token&refresh_token=I%3D&client_id=ublkimg\
            &scope=repository%3Aapp%2Fweb%3Apull+aws&service=s+%26+s";
        assert_eq!(String::from_utf8_lossy(&request.body), expected);
        answer(200, &[], format!(r#"{{"access_token":"T{number}"}}"#))
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let options = auth_file(&dir, &pair.registry.authority, r#"{"identitytoken":"I="}"#);
    pair.registry.open(&options).await.blob_range(&blob(1000).1, 0..10).await.unwrap();
}

#[tokio::test]
async fn a_token_that_gives_no_access_is_not_asked_for_again() {
    let pair = pair(|_, _| token(5000)).await;
    let fault = FaultRow::begins("a token that gives no access");
    let error = pair.registry.open(&options()).await.blob_range(&blob(1000).1, 0..10).await.unwrap_err();
    fault.ends("an error; it is not asked for again");
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert_eq!((pair.registry.count(), pair.tokens.count()), (2, 1));
}

#[tokio::test]
async fn a_token_service_in_trouble_is_waited_for() {
    let pair = pair(|_, number| if number < 2 { answer(500, &[], "") } else { token(number) }).await;
    pair.registry.open(&options()).await.blob_range(&blob(1000).1, 0..10).await.unwrap();
    assert_eq!(pair.tokens.count(), 3);
}

#[tokio::test]
async fn a_hanging_token_service_holds_all_readers_once() {
    let silent = Answer { delay: Duration::ZERO, bytes: Vec::new(), then: Then::Hang };
    let pair = pair(move |_, _| silent.clone()).await;
    let repository = pair.registry.open(&ClientOptions { retry_deadline: Duration::ZERO, ..hasty() }).await;
    let digest = blob(1000).1;
    let started = std::time::Instant::now();
    let fault = FaultRow::begins("token service hangs beyond every deadline");
    let reads = (0..20).map(|_| repository.blob_range(&digest, 0..10));
    for result in futures_util::future::join_all(reads).await {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    fault.ends("one request for all that wait, then an error");
    assert_eq!(pair.tokens.count(), 1);
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

#[tokio::test]
async fn rubbish_from_a_token_service_is_refused() {
    for rubbish in ["", "{}", r#"{"token":""}"#, r#"{"token":"a\nb"}"#, r#"{"token":1}"#, "SECRET"] {
        let pair = pair(move |_, _| answer(200, &[], rubbish)).await;
        let fault = FaultRow::begins("rubbish from the token service");
        let error = pair.registry.open(&options()).await.blob_range(&blob(1000).1, 0..10).await.unwrap_err();
        fault.ends("an error");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{rubbish}: {error}");
        assert!(!format!("{error:?}").contains("SECRET"), "{error:?}");
    }
    let pair = pair(|_, _| answer(200, &[("Transfer-Encoding", "chunked")], "FFFFFFF\r\n").then(Then::Forever)).await;
    let error = pair.registry.open(&options()).await.blob_range(&blob(1000).1, 0..10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
}

#[tokio::test]
async fn basic_only_registries() {
    let (bytes, digest) = blob(1000);
    let accepting = Arc::new(AtomicBool::new(true));
    let accepts = Arc::clone(&accepting);
    let fake = Fake::start(move |request, _| match request.header("authorization") {
        Some("Basic dTpw") if accepts.load(Ordering::SeqCst) => partial(request, &bytes),
        _ => answer(401, &[("WWW-Authenticate", r#"Basic realm="Registry Realm""#)], ""),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let good = auth_file(&dir, &fake.authority, r#"{"auth":"dTpw"}"#);
    let repository = fake.open(&good).await;
    repository.blob_range(&digest, 0..10).await.unwrap();
    repository.blob_range(&digest, 0..10).await.unwrap();
    assert_eq!(fake.count(), 3);
    accepting.store(false, Ordering::SeqCst);
    let error = repository.blob_range(&digest, 0..10).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(error.to_string().starts_with("credentials for "), "{error}");
    let error = fake.open(&options()).await.blob_range(&digest, 0..10).await.unwrap_err();
    assert!(error.to_string().contains("wants credentials for repository app/web"), "{error}");
}

#[tokio::test]
async fn unknown_and_unencrypted_kinds_are_refused() {
    for (challenge, kind) in [
        ("Negotiate", ErrorKind::Unauthorized),
        (r#"Bearer realm="http://auth.example.com/token""#, ErrorKind::Invalid),
        (r#"Bearer realm="nonsense""#, ErrorKind::Corrupt),
    ] {
        let fake = Fake::start(move |_, _| answer(401, &[("WWW-Authenticate", challenge)], "")).await;
        let error = fake.open(&options()).await.resolve().await.unwrap_err();
        assert_eq!((error.kind(), fake.count()), (kind, 1), "{error}");
    }
}
