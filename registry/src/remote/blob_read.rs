//! Reading blobs: exact ranges. Long reads are in `blob_stream`.
//!
//! A range is answered by `206` with exactly the `Content-Range` that was asked for; anything else is refused, except the
//! one lawful alternative, `200` with the whole blob: of that the wanted slice is cut out of the stream, as long as not too
//! much lies before it. Never more is kept than was asked for, whatever the answer's length says. After a break only the
//! missing rest is asked for. The end of a blob is never exceeded by this module; callers know its size from the manifest.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};
use tokio::time::timeout;

use super::Remote;
use crate::auth::Scope;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::retry::Failure;

/// From a registry that ignores `Range`, this much is read and thrown away for a slice, no more: reading on demand would
/// cost more than the classic pull, and the user should know.
const MAX_SKIPPED_BYTES: u64 = 64 << 20;
/// The first allocation for a range; the rest only as bytes arrive, since a manifest can claim any size.
const FIRST_CAPACITY_BYTES: u64 = 1 << 20;
pub(super) const SHORT: &str = "the answer ended early";

/// How much of an open body is wanted: after `skip_bytes`.
pub(super) struct Body {
    pub(super) response: Response,
    pub(super) skip_bytes: u64,
}

impl Remote {
    pub(crate) async fn has_blob(&self, digest: &Digest) -> Result<bool> {
        self.blob_exists(digest, &Scope::pull(self.reference.repository())).await
    }

    pub(super) async fn blob_exists(&self, digest: &Digest, scope: &Scope) -> Result<bool> {
        let mut backoff = self.backoff();
        loop {
            let slot = backoff.slot(&self.slots, self.transport.gate()).await?;
            let attempt = self.exists_attempt(digest, scope).await;
            drop(slot);
            match attempt {
                Ok(exists) => return Ok(exists),
                Err(failure) => backoff.wait(failure).await?,
            }
        }
    }

    async fn exists_attempt(&self, digest: &Digest, scope: &Scope) -> Result<bool, Failure> {
        let url = self.address(&format!("blobs/{digest}"))?;
        let mut response = self.call(Method::HEAD, &url, HeaderMap::new(), None, scope).await?;
        if response.status() == StatusCode::METHOD_NOT_ALLOWED {
            let headers = HeaderMap::from_iter([(RANGE, HeaderValue::from_static("bytes=0-0"))]);
            response = self.call(Method::GET, &url, headers, None, scope).await?;
        }
        match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            // An empty blob has no range; a redirect to the storage is given for what is there.
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(true),
            status if status.is_success() || super::is_redirect(status) => Ok(true),
            _ => Err(self.transport.refusal(response, &format!("blob {digest}")).await),
        }
    }

    pub(crate) async fn blob_range(&self, digest: &Digest, range: Range<u64>) -> Result<Bytes> {
        let Range { start, end } = range;
        let first_capacity = usize::try_from((end - start).min(FIRST_CAPACITY_BYTES)).unwrap_or_default();
        let mut bytes = BytesMut::with_capacity(first_capacity);
        let mut backoff = self.backoff();
        loop {
            let slot = backoff.slot(&self.slots, self.transport.gate()).await?;
            let attempt = self.range_attempt(digest, start + bytes.len() as u64..end, &mut bytes).await;
            drop(slot);
            match attempt {
                Ok(()) => return Ok(bytes.freeze()),
                Err(failure) => backoff.wait(failure).await?,
            }
            // An answer that went wrong after the last byte: there is no rest to ask for.
            if bytes.len() as u64 >= end - start {
                bytes.clear();
            }
        }
    }

    /// Appends the range to `bytes`, or as much of it as came.
    async fn range_attempt(&self, digest: &Digest, range: Range<u64>, bytes: &mut BytesMut) -> Result<(), Failure> {
        let mut body = self.open_range(digest, &range).await?;
        let whole = body.response.status() == StatusCode::OK;
        let limit = self.transport.time_for(body.skip_bytes + range.end - range.start);
        let target = bytes.len() as u64 + (range.end - range.start);
        let read = async {
            while let Some(mut piece) = self.next_piece(&mut body).await? {
                let missing = target - bytes.len() as u64;
                if piece.len() as u64 > missing {
                    if !whole {
                        return Err(Failure::suspect(self.odd(digest, "the answer is longer than the range")));
                    }
                    piece.truncate(usize::try_from(missing).unwrap_or(usize::MAX));
                }
                bytes.extend_from_slice(&piece);
                if whole && bytes.len() as u64 == target {
                    return Ok(());
                }
            }
            if bytes.len() as u64 == target { Ok(()) } else { Err(self.broken_off(digest, SHORT)) }
        };
        match timeout(limit, read).await {
            Ok(result) => result,
            Err(_) => Err(self.broken_off(digest, "the answer comes too slowly")),
        }
    }

    /// The answer to a range, checked as far as its head goes. A remembered storage address is tried first; when the
    /// storage no longer takes it, the registry is asked for a new one, once.
    pub(super) async fn open_range(&self, digest: &Digest, range: &Range<u64>) -> Result<Body, Failure> {
        let mut headers = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]);
        let value = HeaderValue::from_str(&format!("bytes={}-{}", range.start, range.end - 1))
            .map_err(|cause| Error::invalid("a range that HTTP does not allow").with_source(cause))?;
        headers.insert(RANGE, value);
        let response = self.open(digest, headers).await?;
        self.check_head(digest, range, &response)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => Ok(Body { response, skip_bytes: 0 }),
            StatusCode::OK if range.start > MAX_SKIPPED_BYTES => {
                let registry = self.name();
                let what = format!("registry {registry} ignores byte ranges (whole blob {digest} sent)");
                Err(Error::invalid(what).into())
            }
            StatusCode::OK => Ok(Body { response, skip_bytes: range.start }),
            _ => Err(self.transport.refusal(response, &format!("blob {digest}")).await),
        }
    }

    pub(super) async fn open(&self, digest: &Digest, headers: HeaderMap) -> Result<Response, Failure> {
        if let Some(url) = self.routes.get(digest) {
            match self.transport.send(Method::GET, &url, headers.clone(), None).await {
                Ok(response) if !is_stale(response.status()) => return Ok(response),
                Ok(_) => self.routes.forget(digest, &url),
                Err(failure) => {
                    // The storage may have moved; the next attempt asks the registry.
                    self.routes.forget(digest, &url);
                    return Err(failure);
                }
            }
        }
        let (response, url) = self.get(self.address(&format!("blobs/{digest}"))?, headers).await?;
        if response.status().is_success() && !self.transport.is_registry(&url) {
            self.routes.set(*digest, url);
        }
        Ok(response)
    }

    pub(super) fn check_head(&self, digest: &Digest, range: &Range<u64>, response: &Response) -> Result<(), Failure> {
        let headers = response.headers();
        if !response.status().is_success() {
            return Ok(());
        }
        if headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            return Err(Failure::suspect(self.odd(digest, "the answer is re-encoded")));
        }
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let stated =
                    headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).and_then(parse_content_range);
                if stated.as_ref() != Some(range) {
                    return Err(Failure::suspect(self.odd(digest, "the answer is for another range")));
                }
            }
            StatusCode::OK if response.content_length().is_some_and(|len| len < range.end) => {
                return Err(self.odd(digest, "it has fewer bytes than expected").into());
            }
            _ => {}
        }
        Ok(())
    }

    /// The next wanted piece of a body.
    pub(super) async fn next_piece(&self, body: &mut Body) -> Result<Option<Bytes>, Failure> {
        while let Some(mut piece) = self.transport.piece(&mut body.response).await? {
            let skipped = body.skip_bytes.min(piece.len() as u64);
            body.skip_bytes -= skipped;
            // Not more than the piece's own length.
            let _ = piece.split_to(usize::try_from(skipped).unwrap_or(piece.len()));
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    pub(super) fn odd(&self, digest: &Digest, what: &str) -> Error {
        Error::corrupt(format!("blob {digest} at registry {}: {what}", self.name()))
    }

    pub(super) fn broken_off(&self, digest: &Digest, what: &str) -> Failure {
        Failure::later(Error::unavailable(format!("blob {digest} at registry {}: {what}", self.name())))
    }
}

/// Storage answers to an address that has expired or moved.
fn is_stale(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410) || super::is_redirect(status)
}

/// `bytes a-b/total` as the half-open range a..b+1 (RFC 9110, section 14.4).
pub(crate) fn parse_content_range(text: &str) -> Option<Range<u64>> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let end = last.checked_add(1).filter(|end| *end > first)?;
    let total_fits = total == "*" || total.parse::<u64>().is_ok_and(|total| total >= end);
    total_fits.then_some(first..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 0-0/1"), Some(0..1));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some(5..10));
        for text in [
            "",
            "bytes",
            "bytes 0-0",
            "bytes 5-4/9",
            "bytes 0-9/9",
            "bytes */9",
            "items 0-0/1",
            "bytes -1-2/9",
            "bytes 0-18446744073709551615/*",
            "bytes 0-99999999999999999999/*",
        ] {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_content_range_is_parsed_or_refused(text in "(bytes )?[0-9*/-]{0,50}") {
            if let Some(range) = parse_content_range(&text) {
                proptest::prop_assert!(range.start < range.end);
            }
        }
    }
}
