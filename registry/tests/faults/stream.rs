//! Long ranges as streams: exact, resumed where they broke, and never read ahead of who pulls.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ublkimg_registry::{BlobSource, ClientOptions, Digest, ErrorKind, RangeStream, Repository, Result};

use crate::fake::{Answer, Fake, Seen, Then, answer, blob, hasty, options, partial, range_of};
use crate::fault_row::FaultRow;

const LEN: usize = 900_000;
const START: usize = 1000;
const END: usize = 801_000;

/// The range as it came, and how it ended.
async fn read(stream: &mut RangeStream) -> (Vec<u8>, Result<()>) {
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        match piece {
            Ok(piece) => {
                assert!(!piece.is_empty());
                bytes.extend_from_slice(&piece);
            }
            Err(error) => {
                assert!(stream.next().await.is_none(), "after an error it is over");
                return (bytes, Err(error));
            }
        }
    }
    (bytes, Ok(()))
}

/// Streams the range from a registry that answers so; also how many requests that took.
async fn stream(
    options: &ClientOptions,
    handler: impl Fn(&Seen, usize, &[u8]) -> Answer + Send + Sync + 'static,
) -> (Vec<u8>, Result<()>, usize) {
    let (bytes, digest) = blob(LEN);
    let fake = Fake::start(move |request, number| handler(request, number, &bytes)).await;
    let repository = fake.open(options).await;
    let (bytes, result) = read(&mut repository.blob_stream(&digest, START as u64..END as u64)).await;
    (bytes, result, fake.count())
}

/// Not an assertion of equality, which would print it all.
fn is_expected(bytes: &[u8]) -> bool {
    bytes == &blob(LEN).0[START..END]
}

/// The lawful answer, but for the last `less` bytes of its body.
fn cut(request: &Seen, bytes: &[u8], less: usize, then: Then) -> Answer {
    let mut whole = partial(request, bytes);
    whole.bytes.truncate(whole.bytes.len() - less);
    whole.then(then)
}

#[tokio::test]
async fn one_request_for_the_whole_range() {
    let (bytes, result, count) = stream(&options(), |request, _, bytes| {
        assert_eq!(range_of(request), Some((START, END)));
        partial(request, bytes)
    })
    .await;
    assert!(result.is_ok() && is_expected(&bytes));
    assert_eq!(count, 1);
}

#[tokio::test]
async fn nothing_is_asked_for_nothing() {
    let fake = Fake::start(|_, _| answer(500, &[], "")).await;
    let repository = fake.open(&options()).await;
    let digest = Digest::of(b"");
    drop(repository.blob_stream(&digest, 0..5));
    assert!(repository.blob_stream(&digest, 7..7).next().await.is_none());
    #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake")]
    let error = repository.blob_stream(&digest, 8..7).next().await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(fake.count(), 0);
}

#[tokio::test]
async fn after_a_break_only_the_rest_is_asked_for() {
    for then in [Then::Close, Then::Hang] {
        let asked = Arc::new(AtomicUsize::new(START));
        let next = Arc::clone(&asked);
        let (bytes, result, count) = stream(&hasty(), move |request, number, bytes| {
            assert_eq!(range_of(request), Some((next.load(Ordering::SeqCst), END)));
            if number == 2 {
                return partial(request, bytes);
            }
            next.store(if number == 0 { 301_000 } else { 501_000 }, Ordering::SeqCst);
            cut(request, bytes, if number == 0 { 500_000 } else { 300_000 }, then.clone())
        })
        .await;
        assert!(result.is_ok() && is_expected(&bytes), "{result:?}");
        assert_eq!(count, 3);
    }
}

#[tokio::test]
async fn a_whole_blob_instead_of_the_range_is_cut() {
    let (bytes, result, count) = stream(&options(), |_, number, bytes| {
        let mut whole = answer(200, &[], bytes);
        if number == 0 {
            whole.bytes.truncate(500_000);
            return whole.then(Then::Close);
        }
        whole
    })
    .await;
    assert!(result.is_ok() && is_expected(&bytes), "{result:?}");
    assert_eq!(count, 2);
    let (bytes, result, _) = stream(&options(), |_, _, bytes| answer(200, &[], &bytes[..END - 1])).await;
    assert_eq!((bytes.len(), result.unwrap_err().kind()), (0, ErrorKind::Corrupt), "a shorter blob");
}

#[tokio::test]
async fn a_range_far_inside_is_refused_without_ranges() {
    let headers = [("Content-Length", "1000000000000")];
    let fake = Fake::start(move |_, _| answer(200, &headers, "").then(Then::Forever)).await;
    let repository = fake.open(&options()).await;
    let error = repository.blob_stream(&Digest::of(b""), 1 << 30..2 << 30).next().await.unwrap().unwrap_err();
    assert_eq!((error.kind(), fake.count()), (ErrorKind::Invalid, 1));
}

#[tokio::test]
async fn an_answer_for_another_range_brings_nothing() {
    type Headers = &'static [(&'static str, &'static str)];
    let answers: [Headers; 4] = [
        &[("Content-Range", "bytes 0-799999/900000")],
        &[("Content-Range", "bytes 1000-801000/900000")],
        &[],
        &[("Content-Range", "bytes 1000-800999/900000"), ("Content-Encoding", "gzip")],
    ];
    for headers in answers {
        let (bytes, result, count) =
            stream(&options(), move |_, _, bytes| answer(206, headers, &bytes[START..END])).await;
        assert_eq!((bytes.len(), result.unwrap_err().kind(), count), (0, ErrorKind::Corrupt, 3), "{headers:?}");
    }
}

#[tokio::test]
async fn a_longer_body_is_cut_short_and_resumed() {
    let headers = [("Content-Range", "bytes 1000-800999/900000")];
    let (bytes, result, _) = stream(&options(), move |request, number, bytes| match number {
        0 => answer(206, &headers, &bytes[START..END + 5000]),
        _ => partial(request, bytes),
    })
    .await;
    assert!(result.is_ok() && is_expected(&bytes), "{result:?}");
}

#[tokio::test]
async fn trouble_is_waited_out_and_answers_are_not() {
    for status in [408, 429, 500, 503] {
        let (bytes, result, count) = stream(&options(), move |request, number, bytes| match number {
            0 => answer(status, &[], "down"),
            1 => cut(request, bytes, 400_000, Then::Close),
            2 => answer(status, &[], "down"),
            _ => partial(request, bytes),
        })
        .await;
        assert!(result.is_ok() && is_expected(&bytes), "{status} {result:?}");
        assert_eq!(count, 4);
    }
    let (_, result, count) = stream(&options(), |_, _, _| answer(404, &[], "")).await;
    assert_eq!((result.unwrap_err().kind(), count), (ErrorKind::NotFound, 1));
}

#[tokio::test]
async fn no_progress_ends_it() {
    let brief = ClientOptions { retry_deadline: Duration::from_millis(700), ..hasty() };
    let started = Instant::now();
    let (bytes, result, _) = stream(&brief, |request, _, bytes| {
        let (start, end) = range_of(request).unwrap();
        cut(request, bytes, end - start - 10, Then::Close)
    })
    .await;
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(bytes == blob(LEN).0[START..START + bytes.len()], "what came is right");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_drip_counts_as_a_break() {
    let once = ClientOptions { retry_deadline: Duration::ZERO, ..hasty() };
    let started = Instant::now();
    let fault = FaultRow::begins("a body slower than 8 KiB/s");
    let (_, result, _) = stream(&once, |request, _, bytes| {
        let mut whole = partial(request, bytes);
        let rest = whole.bytes.split_off(whole.bytes.len() - (END - START));
        whole.then(Then::Drip(rest, Duration::from_millis(50)))
    })
    .await;
    fault.ends("counts as a break");
    assert!(result.unwrap_err().to_string().ends_with("the answer comes too slowly"));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_consumer_that_takes_its_time_is_not_in_trouble() {
    // The first break comes when more time has passed than any limit allows, all of it the consumer's.
    let brief = ClientOptions { retry_deadline: Duration::from_millis(500), ..hasty() };
    let (bytes, digest) = blob(LEN);
    let fake = Fake::start(move |request, number| match number {
        0 => cut(request, &bytes, 790_000, Then::Close),
        _ => partial(request, &bytes),
    })
    .await;
    let repository = fake.open(&brief).await;
    let mut stream = repository.blob_stream(&digest, START as u64..END as u64);
    let mut bytes = stream.next().await.unwrap().unwrap().to_vec();
    tokio::time::sleep(Duration::from_millis(900)).await;
    let (rest, result) = read(&mut stream).await;
    bytes.extend(rest);
    assert!(result.is_ok() && is_expected(&bytes), "{result:?}");
    assert_eq!(fake.count(), 2);
}

/// A server of zeros that counts what it could send.
async fn endless() -> (String, Arc<AtomicUsize>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&sent);
    tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        let _ = connection.read(&mut [0; 4096]).await.unwrap();
        let head =
            "HTTP/1.1 206 X\r\nContent-Range: bytes 0-1073741823/1073741824\r\nContent-Length: 1073741824\r\n\r\n";
        connection.write_all(head.as_bytes()).await.unwrap();
        while let Ok(len) = connection.write(&[0; 1 << 16]).await {
            counter.fetch_add(len, Ordering::SeqCst);
        }
    });
    (authority, sent)
}

#[tokio::test]
async fn what_nobody_pulls_is_not_read() {
    let (authority, sent) = endless().await;
    let repository = Repository::open(&format!("{authority}/a:b").parse().unwrap(), &options()).await.unwrap();
    let mut stream = repository.blob_stream(&Digest::of(b""), 0..1 << 30);
    stream.next().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let sent = sent.load(Ordering::SeqCst);
    assert!(sent < 32 << 20, "{sent} bytes; the kernel's buffers and the client's are a few megabytes");
}

#[tokio::test]
async fn layout_directories_stream_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let repository =
        Repository::open(&format!("oci:{}", dir.path().display()).parse().unwrap(), &options()).await.unwrap();
    let (bytes, digest) = blob(3 << 20);
    repository.push_blob(&digest, bytes.len() as u64, BlobSource::Bytes(bytes.clone().into()), None).await.unwrap();
    let (read_bytes, result) = read(&mut repository.blob_stream(&digest, 5..3 << 20)).await;
    assert!(result.is_ok() && read_bytes == bytes[5..]);
    let (read_bytes, result) = read(&mut repository.blob_stream(&digest, 0..(3 << 20) + 1)).await;
    assert_eq!((read_bytes.len(), result.unwrap_err().kind()), (3 << 20, ErrorKind::Corrupt));
}
