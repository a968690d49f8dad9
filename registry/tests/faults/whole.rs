//! Whole blobs: verified at the end, resumed after a break.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use ublkimg_registry::{BlobSource, ClientOptions, Digest, Error, ErrorKind, Location, Repository};

use crate::fake::{Answer, Fake, Seen, Then, answer, blob, hasty, options, partial, range_of};

const LEN: usize = 1_000_000;

/// Reads a blob of [`LEN`] bytes to its end from a registry that answers so.
async fn read(
    handler: impl Fn(&Seen, usize, &[u8]) -> Answer + Send + Sync + 'static,
) -> (Result<Vec<u8>, Error>, Fake) {
    let (bytes, digest) = blob(LEN);
    let fake = Fake::start(move |request, number| handler(request, number, &bytes)).await;
    let repository = fake.open(&hasty()).await;
    (read_from(&repository, &digest, LEN as u64).await, fake)
}

async fn read_from(repository: &Repository, digest: &Digest, size_bytes: u64) -> Result<Vec<u8>, Error> {
    let mut reader = repository.blob(digest, size_bytes).await?;
    let mut bytes = Vec::new();
    match reader.read_to_end(&mut bytes).await {
        Ok(_) => Ok(bytes),
        Err(error) => Err(error.downcast().unwrap()),
    }
}

#[tokio::test]
async fn in_one_request() {
    let (result, fake) = read(|request, _, bytes| partial(request, bytes)).await;
    assert_eq!(result.unwrap(), blob(LEN).0);
    assert_eq!(fake.count(), 1);
    assert_eq!(fake.seen()[0].header("range"), None);
    let repository = fake.open(&options()).await;
    assert_eq!(read_from(&repository, &Digest::of(b""), 0).await.unwrap(), b"");
    assert_eq!(fake.count(), 1, "nothing needs no request");
}

#[tokio::test]
async fn resumed_where_it_broke() {
    let (result, fake) = read(|request, number, bytes| {
        let mut whole = partial(request, bytes);
        if number < 3 {
            whole.bytes.truncate(whole.bytes.len() / 2);
            return whole.then(if number == 1 { Then::Hang } else { Then::Close });
        }
        whole
    })
    .await;
    assert_eq!(result.unwrap(), blob(LEN).0);
    let starts: Vec<_> = fake.seen().iter().map(|seen| range_of(seen).map_or(0, |(start, _)| start)).collect();
    assert_eq!(starts.len(), 4);
    assert!(starts.windows(2).all(|pair| pair[0] < pair[1]), "{starts:?}");
}

#[tokio::test]
async fn resumed_without_ranges() {
    let (result, _) = read(|_, number, bytes| match number {
        0 => {
            let mut whole = answer(200, &[], bytes);
            whole.bytes.truncate(LEN / 2);
            whole.then(Then::Close)
        }
        _ => answer(200, &[], bytes),
    })
    .await;
    assert_eq!(result.unwrap(), blob(LEN).0);
}

#[tokio::test]
async fn a_wrong_byte_is_an_error_at_the_end() {
    let (result, _) = read(|_, _, bytes| {
        let mut bytes = bytes.to_vec();
        bytes[LEN / 2] ^= 1;
        answer(200, &[], bytes)
    })
    .await;
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("have the digest sha256:"), "{error}");
}

#[tokio::test]
async fn another_size_is_an_error() {
    let (result, _) = read(|_, _, bytes| answer(200, &[], &bytes[1..])).await;
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt);
    let (result, _) = read(|_, _, bytes| {
        let body = [format!("{:x}\r\n", LEN + 1).as_bytes(), bytes, b"x\r\n0\r\n\r\n"].concat();
        answer(200, &[("Transfer-Encoding", "chunked")], body)
    })
    .await;
    let error = result.unwrap_err();
    assert!(error.to_string().ends_with("is longer than 1000000 bytes"), "{error}");
}

#[tokio::test]
async fn no_progress_ends_it() {
    let (bytes, digest) = blob(LEN);
    let fake = Fake::start(move |request, _| {
        let mut whole = partial(request, &bytes);
        whole.bytes.truncate(300);
        whole.then(Then::Close)
    })
    .await;
    let options = ClientOptions { retry_deadline: Duration::from_millis(500), ..options() };
    let error = read_from(&fake.open(&options).await, &digest, LEN as u64).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!((2..10).contains(&fake.count()), "{}", fake.count());
}

#[tokio::test]
async fn missing_is_said_at_once() {
    let (bytes, digest) = blob(LEN);
    drop(bytes);
    let fake = Fake::start(|_, _| answer(404, &[], "")).await;
    let error = fake.open(&options()).await.blob(&digest, LEN as u64).await.unwrap_err();
    let expected = format!("repository {}/app/web has no blob {digest}", fake.authority);
    assert_eq!((error.kind(), error.to_string(), fake.count()), (ErrorKind::NotFound, expected, 1));
}

#[tokio::test]
async fn layout_directories_read_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let location: Location = format!("oci:{}:t", dir.path().join("layout").display()).parse().unwrap();
    let repository = Repository::open(&location, &options()).await.unwrap();
    let (bytes, digest) = blob(LEN);
    repository.push_blob(&digest, LEN as u64, BlobSource::Bytes(bytes.clone().into()), None).await.unwrap();
    assert_eq!(read_from(&repository, &digest, LEN as u64).await.unwrap(), bytes);
    assert_eq!(repository.blob_range(&digest, 5..9).await.unwrap(), bytes[5..9]);
    assert_eq!(read_from(&repository, &digest, 5).await.unwrap_err().kind(), ErrorKind::Corrupt);
    std::fs::write(dir.path().join("layout/blobs/sha256").join(digest.hex()), vec![0; LEN]).unwrap();
    assert_eq!(read_from(&repository, &digest, LEN as u64).await.unwrap_err().kind(), ErrorKind::Corrupt);
}
