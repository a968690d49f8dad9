//! Long reads: a whole blob or one long range, as a stream that its consumer pulls.
//!
//! Nothing is read ahead of the consumer but what the HTTP library and the kernel hold for one connection (some hundred
//! kilobytes to a few megabytes), so a stream that is not pulled stands still, and the registry with it. After a break only
//! the missing rest is asked for. Time in which the consumer does not pull is nobody's fault: it counts for no time limit.
//! A request slot is held only while an answer begins.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use reqwest::StatusCode;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use tokio::time::{Duration, Instant};

use super::Remote;
use super::blob_read::{Body, SHORT};
use crate::blob::{BlobReader, LastTrouble};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::retry::{Backoff, Failure};

/// A stream that brought less than this before it broke did not get anywhere: its time and pauses run on.
const PROGRESS_BYTES: u64 = 256 << 10;

impl Remote {
    /// A stream over the whole blob; `remote` lives as long as it.
    pub(crate) async fn blob(remote: &Arc<Self>, digest: Digest, size_bytes: u64) -> Result<BlobReader> {
        let mut stream = BlobStream::new(remote, digest, 0..size_bytes, true, LastTrouble::default());
        if size_bytes > 0 {
            stream.open().await?;
        }
        Ok(BlobReader::verified(stream.pieces(), digest, size_bytes))
    }

    /// The pieces of a range, none of them empty; asks when it is first polled.
    pub(crate) fn blob_stream(
        remote: &Arc<Self>,
        digest: Digest,
        range: Range<u64>,
        trouble: LastTrouble,
    ) -> BoxStream<'static, Result<Bytes>> {
        BlobStream::new(remote, digest, range, false, trouble).pieces()
    }
}

/// A read under way.
struct BlobStream {
    remote: Arc<Remote>,
    digest: Digest,
    /// The next byte for the consumer.
    at: u64,
    end: u64,
    /// A whole blob is first asked for without a range, and its end is looked at.
    whole: bool,
    body: Option<Body>,
    backoff: Backoff,
    trouble: LastTrouble,
    /// Where the last progress was counted.
    since: u64,
    /// Time spent waiting for the present body, and where it began.
    waited: Duration,
    opened_at: u64,
}

impl BlobStream {
    fn new(remote: &Arc<Remote>, digest: Digest, range: Range<u64>, whole: bool, trouble: LastTrouble) -> Self {
        Self {
            remote: Arc::clone(remote),
            digest,
            at: range.start,
            end: range.end,
            whole,
            body: None,
            backoff: remote.backoff(),
            trouble,
            since: range.start,
            waited: Duration::ZERO,
            opened_at: range.start,
        }
    }

    fn pieces(self) -> BoxStream<'static, Result<Bytes>> {
        // Some = when the last piece was handed out.
        let state = (self, None::<Instant>);
        let pieces = stream::try_unfold(state, |(mut stream, handed_out)| async move {
            if let Some(at) = handed_out {
                stream.backoff.discount(at.elapsed());
            }
            let piece = stream.next().await?;
            Ok(piece.map(|piece| (piece, (stream, Some(Instant::now())))))
        });
        pieces.boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.at >= self.end && (self.body.is_none() || !self.whole) {
                return Ok(None);
            }
            if self.body.is_none() {
                self.open().await?;
            }
            let failure = match self.piece().await {
                Ok(Some(piece)) => {
                    self.at += piece.len() as u64;
                    return Ok(Some(piece));
                }
                Ok(None) => self.remote.broken_off(&self.digest, SHORT),
                Err(failure) => failure,
            };
            self.body = None;
            if self.at < self.end {
                self.pause(failure).await?;
            }
        }
    }

    /// The next piece of the open body, not longer than what is missing; a drip counts as broken off.
    async fn piece(&mut self) -> Result<Option<Bytes>, Failure> {
        let Some(body) = &mut self.body else { return Ok(None) };
        let (began, skipping) = (Instant::now(), body.skip_bytes);
        let piece = self.remote.next_piece(body).await?;
        self.waited += began.elapsed();
        let Some(mut piece) = piece else { return Ok(None) };
        if self.whole {
            return Ok(Some(piece));
        }
        let missing = self.end - self.at;
        if piece.len() as u64 > missing {
            if body.response.status() == StatusCode::PARTIAL_CONTENT {
                return Err(Failure::suspect(self.remote.odd(&self.digest, "the answer is longer than the range")));
            }
            piece.truncate(usize::try_from(missing).unwrap_or(usize::MAX));
        }
        let come = self.at + piece.len() as u64 - self.opened_at + skipping;
        if self.waited > self.remote.transport.time_for(come) {
            return Err(self.remote.broken_off(&self.digest, "the answer comes too slowly"));
        }
        Ok(Some(piece))
    }

    /// Opens a body at the present place.
    async fn open(&mut self) -> Result<()> {
        loop {
            let slot = self.backoff.slot(&self.remote.slots, self.remote.transport.gate()).await?;
            let attempt = self.attempt().await;
            drop(slot);
            match attempt {
                Ok(body) => {
                    self.body = Some(body);
                    (self.waited, self.opened_at) = (Duration::ZERO, self.at);
                    return Ok(());
                }
                Err(failure) => self.pause(failure).await?,
            }
        }
    }

    async fn attempt(&self) -> Result<Body, Failure> {
        let (remote, digest) = (&self.remote, &self.digest);
        if !self.whole || self.at > 0 {
            return remote.open_range(digest, &(self.at..self.end)).await;
        }
        let headers = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]);
        let response = remote.open(digest, headers).await?;
        if response.status() != StatusCode::OK {
            return Err(remote.transport.refusal(response, &format!("blob {digest}")).await);
        }
        remote.check_head(digest, &(0..self.end), &response)?;
        if response.content_length().is_some_and(|len| len != self.end) {
            return Err(remote.odd(digest, "it has another size than expected").into());
        }
        Ok(Body { response, skip_bytes: 0 })
    }

    async fn pause(&mut self, failure: Failure) -> Result<(), Error> {
        if self.at - self.since >= PROGRESS_BYTES {
            self.since = self.at;
            self.backoff.progressed();
        }
        self.trouble.note(&failure.error);
        self.backoff.wait(failure).await
    }
}
