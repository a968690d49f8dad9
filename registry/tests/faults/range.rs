//! Ranged reads: what is lawful, what is refused, what is tried again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ublkimg_registry::{ClientOptions, Digest, ErrorKind, Result};

use crate::fake::{Answer, Fake, Seen, Then, answer, blob, hasty, options, partial, range_of};
use crate::fault_row::FaultRow;

const LEN: usize = 10_000;

/// Reads 100..1100 of a blob from a registry that answers so; also how many requests that took.
async fn read(handler: impl Fn(&Seen, usize, &[u8]) -> Answer + Send + Sync + 'static) -> (Result<Bytes>, usize) {
    read_with(&options(), handler).await
}

async fn read_with(
    options: &ClientOptions,
    handler: impl Fn(&Seen, usize, &[u8]) -> Answer + Send + Sync + 'static,
) -> (Result<Bytes>, usize) {
    let (bytes, digest) = blob(LEN);
    let fake = Fake::start(move |request, number| handler(request, number, &bytes)).await;
    let result = fake.open(options).await.blob_range(&digest, 100..1100).await;
    (result, fake.count())
}

fn expected() -> Vec<u8> {
    blob(LEN).0[100..1100].to_vec()
}

#[tokio::test]
async fn exactly_the_range_is_asked_for() {
    let (bytes, digest) = blob(LEN);
    let fake = Fake::start(move |request, _| partial(request, &bytes)).await;
    let repository = fake.open(&options()).await;
    assert_eq!(repository.blob_range(&digest, 100..1100).await.unwrap(), expected());
    assert_eq!(repository.blob_range(&digest, 9_999..10_000).await.unwrap().len(), 1);
    assert_eq!(repository.blob_range(&digest, 7..7).await.unwrap().len(), 0, "without a request");
    assert_eq!(repository.blob_range(&digest, u64::MAX..u64::MAX).await.unwrap().len(), 0);
    #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake")]
    let error = repository.blob_range(&digest, 8..7).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let seen = fake.seen();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0].target, format!("/v2/app/web/blobs/{digest}"));
    assert_eq!(seen[0].header("range"), Some("bytes=100-1099"));
    assert_eq!(seen[0].header("accept-encoding"), Some("identity"));
    assert_eq!(seen[0].header("authorization"), None);
}

#[tokio::test]
async fn a_whole_blob_instead_of_the_range_is_cut() {
    let (result, count) = read(|_, _, bytes| answer(200, &[], bytes)).await;
    assert_eq!((result.unwrap(), count), (expected().into(), 1));
}

#[tokio::test]
async fn an_endless_answer_costs_no_more_than_the_slice() {
    let started = Instant::now();
    let length = i64::MAX.to_string();
    let (result, _) =
        read(move |_, _, bytes| answer(200, &[("Content-Length", &length)], bytes).then(Then::Forever)).await;
    assert_eq!(result.unwrap(), expected());
    let endless = |_: &Seen, _, _: &[u8]| {
        let headers = [("Content-Range", "bytes 100-1099/10000"), ("Transfer-Encoding", "chunked")];
        answer(206, &headers, "FFFFFFF\r\n").then(Then::Forever)
    };
    let fault = FaultRow::begins("an endless answer");
    let (result, count) = read(endless).await;
    fault.ends("cut at the range, asked for again, then an error");
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(count, 3);
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_slice_far_inside_is_refused_without_ranges() {
    let digest = Digest::of(b"");
    let headers = [("Content-Length", "1000000000000")];
    let fake = Fake::start(move |_, _| answer(200, &headers, "").then(Then::Forever)).await;
    let error = fake.open(&options()).await.blob_range(&digest, 1 << 30..(1 << 30) + 1).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("ignores byte ranges"), "{error}");
    assert_eq!(fake.count(), 1);
}

#[tokio::test]
async fn a_shorter_blob_is_corrupt() {
    let (result, count) = read(|_, _, bytes| answer(200, &[], &bytes[..500])).await;
    assert_eq!((result.unwrap_err().kind(), count), (ErrorKind::Corrupt, 1));
}

#[tokio::test]
async fn after_a_break_the_rest_is_asked_for() {
    for cut in [Then::Close, Then::Hang] {
        let (result, count) = read_with(&hasty(), move |request, number, bytes| {
            let mut whole = partial(request, bytes);
            if number == 0 {
                whole.bytes.truncate(whole.bytes.len() - 600);
                return whole.then(cut.clone());
            }
            assert_eq!(range_of(request), Some((500, 1100)));
            whole
        })
        .await;
        assert_eq!((result.unwrap(), count), (expected().into(), 2));
    }
}

#[tokio::test]
async fn a_reset_before_the_answer_is_tried_again() {
    let broken = Answer { delay: Duration::ZERO, bytes: Vec::new(), then: Then::Close };
    let (result, count) = read(move |request, number, bytes| match number {
        0 | 1 => broken.clone(),
        _ => partial(request, bytes),
    })
    .await;
    assert_eq!((result.unwrap(), count), (expected().into(), 3));
}

#[tokio::test]
async fn impossible_answers_are_refused() {
    type Headers = &'static [(&'static str, &'static str)];
    let answers: [(u16, Headers); 9] = [
        (206, &[("Content-Range", "bytes 0-999/10000")]),
        (206, &[("Content-Range", "bytes 100-1098/10000")]),
        (206, &[("Content-Range", "bytes 100-1099/50")]),
        (206, &[("Content-Range", "rubbish")]),
        (206, &[]),
        (206, &[("Content-Type", "multipart/byteranges; boundary=x")]),
        (206, &[("Content-Range", "bytes 100-1099/10000"), ("Content-Encoding", "gzip")]),
        (200, &[("Content-Encoding", "gzip")]),
        (204, &[]),
    ];
    let cases = answers.map(|(status, headers)| async move {
        let (result, count) = read(move |_, _, bytes| answer(status, headers, &bytes[100..1100])).await;
        assert_eq!((result.unwrap_err().kind(), count), (ErrorKind::Corrupt, 3), "{status} {headers:?}");
        // A proxy that restarts does it once.
        let (result, count) = read(move |request, number, bytes| match number {
            0 => answer(status, headers, &bytes[100..1100]).then(Then::Close),
            _ => partial(request, bytes),
        })
        .await;
        assert_eq!((result.unwrap(), count), (expected().into(), 2), "{status} {headers:?}");
    });
    futures_util::future::join_all(cases).await;
}

#[tokio::test]
async fn what_goes_wrong_after_the_last_byte_starts_over() {
    for rest in ["1\r\nx\r\n0\r\n\r\n", ""] {
        let (result, count) = read(move |request, number, bytes| {
            if number > 0 {
                assert_eq!(range_of(request), Some((100, 1100)));
                return partial(request, bytes);
            }
            let body = [format!("{:x}\r\n", 1000).as_bytes(), &bytes[100..1100], b"\r\n", rest.as_bytes()].concat();
            let headers = [("Content-Range", "bytes 100-1099/10000"), ("Transfer-Encoding", "chunked")];
            answer(206, &headers, body).then(Then::Close)
        })
        .await;
        assert_eq!((result.unwrap(), count), (expected().into(), 2));
    }
}

#[tokio::test]
async fn a_longer_body_than_the_range_is_refused() {
    let headers = [("Content-Range", "bytes 100-1099/10000")];
    let (result, count) = read(move |_, _, bytes| answer(206, &headers, &bytes[100..1101])).await;
    assert_eq!((result.unwrap_err().kind(), count), (ErrorKind::Corrupt, 3));
}

#[tokio::test]
async fn out_of_range_is_not_waited_for() {
    let started = Instant::now();
    // docker's registry announces the blob's length and sends 33 bytes.
    let headers = [("Content-Length", "10000")];
    let (result, count) = read(move |_, _, _| answer(416, &headers, "short").then(Then::Hang)).await;
    assert_eq!((result.unwrap_err().kind(), count), (ErrorKind::Corrupt, 1));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn overload_is_waited_out() {
    for status in [408, 429, 500, 502, 503, 504] {
        let (result, count) = read(move |request, number, bytes| match number {
            0 => answer(status, &[], "down"),
            _ => partial(request, bytes),
        })
        .await;
        assert_eq!((result.unwrap(), count), (expected().into(), 2), "{status}");
    }
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let started = Instant::now();
    let (result, _) = read(|request, number, bytes| match number {
        0 => answer(429, &[("Retry-After", "1")], ""),
        _ => partial(request, bytes),
    })
    .await;
    assert_eq!(result.unwrap(), expected());
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());

    let started = Instant::now();
    let (result, count) = read(|_, _, _| answer(503, &[("Retry-After", "99999999999")], "")).await;
    assert_eq!((result.unwrap_err().kind(), count), (ErrorKind::Unavailable, 1), "beyond the deadline");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn answers_are_not_asked_for_twice() {
    for (status, kind) in [
        (400, ErrorKind::Invalid),
        (403, ErrorKind::Unauthorized),
        (404, ErrorKind::NotFound),
        (405, ErrorKind::Invalid),
    ] {
        let error = r#"{"errors":[{"code":"X","message":"because\nof this"}]}"#;
        let (result, count) = read(move |_, _, _| answer(status, &[], error)).await;
        let error = result.unwrap_err();
        assert_eq!((error.kind(), count), (kind, 1), "{error}");
        assert_eq!(error.to_string().ends_with(": becauseof this"), status != 404, "{error}");
    }
}

#[tokio::test]
async fn an_endless_explanation_is_cut() {
    let started = Instant::now();
    let headers = [("Transfer-Encoding", "chunked")];
    let (result, _) = read(move |_, _, _| answer(400, &headers, "FFFFFFF\r\n").then(Then::Forever)).await;
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Invalid);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn silence_ends_at_the_limit() {
    let once = ClientOptions { retry_deadline: Duration::ZERO, ..hasty() };
    let started = Instant::now();
    let silent = Answer { delay: Duration::ZERO, bytes: Vec::new(), then: Then::Hang };
    let (result, _) = read_with(&once, move |_, _, _| silent.clone()).await;
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().ends_with("did not answer within 0.8 s"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_drip_does_not_hold_the_reader() {
    let once = ClientOptions { retry_deadline: Duration::ZERO, ..hasty() };
    let started = Instant::now();
    let (result, _) = read_with(&once, |request, _, bytes| {
        let mut whole = partial(request, bytes);
        let rest = whole.bytes.split_off(whole.bytes.len() - 1000);
        whole.then(Then::Drip(rest, Duration::from_millis(50)))
    })
    .await;
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().ends_with("the answer comes too slowly"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn requests_in_flight_are_bounded() {
    let (bytes, digest) = blob(LEN);
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counter, peak) = (Arc::clone(&running), Arc::clone(&most));
    let fake = Fake::start(move |request, _| {
        let now = counter.fetch_add(1, Ordering::SeqCst) + 1;
        peak.fetch_max(now, Ordering::SeqCst);
        let counter = Arc::clone(&counter);
        // From now, not from when a busy machine starts the task: it must end before the answer leaves.
        let answered_at = tokio::time::Instant::now() + Duration::from_millis(40);
        tokio::spawn(async move {
            tokio::time::sleep_until(answered_at).await;
            counter.fetch_sub(1, Ordering::SeqCst);
        });
        partial(request, &bytes).after(Duration::from_millis(50))
    })
    .await;
    // One attempt each: waiting for a slot must not count as time of the request.
    let repository = fake.open(&ClientOptions { retry_deadline: Duration::ZERO, ..options() }).await;
    let reads = (0..300).map(|_| repository.blob_range(&digest, 100..1100));
    for result in futures_util::future::join_all(reads).await {
        assert_eq!(result.unwrap(), expected());
    }
    let most = most.load(Ordering::SeqCst);
    assert!((2..=64).contains(&most), "{most}");
}
