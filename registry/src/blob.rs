//! Whole blobs on their way in and out.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, Stream, StreamExt, TryStreamExt};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufRead, AsyncRead, ReadBuf};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// One read of a local blob: large enough that the switch to a blocking thread does not count.
const FILE_READ_BYTES: usize = 256 << 10;

/// Where the bytes of a blob to push are. A file is read again when an upload has to start over.
#[derive(Debug, Clone)]
pub enum BlobSource {
    /// In memory.
    Bytes(Bytes),
    /// In a file, from its start to its end.
    File(PathBuf),
}

/// A whole blob as a stream of bytes, verified: the end is reported only when size and digest are right, otherwise the
/// last read fails with an [`io::Error`] that holds an [`Error`] of kind `Corrupt`.
pub struct BlobReader(StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>);

impl BlobReader {
    /// Verifies the pieces of a blob while they pass.
    pub(crate) fn verified(pieces: BoxStream<'static, Result<Bytes>>, digest: Digest, size_bytes: u64) -> Self {
        let state = Verifier { pieces, hasher: Sha256::new(), seen_bytes: 0, digest, size_bytes };
        let checked = stream::try_unfold(state, |mut state| async move {
            let piece = state.next().await?;
            Ok(piece.map(|piece| (piece, state)))
        });
        Self(StreamReader::new(checked.map_err(|error: Error| io::Error::from(error)).boxed()))
    }

    pub(crate) fn of_file(file: tokio::fs::File, digest: Digest, size_bytes: u64) -> Self {
        let pieces = ReaderStream::with_capacity(file, FILE_READ_BYTES)
            .map_err(move |cause| Error::io(format_args!("reading blob {digest}"), cause));
        Self::verified(pieces.boxed(), digest, size_bytes)
    }
}

/// One range of a blob as a stream of pieces, **not** verified against a digest. Pieces are never empty; together they
/// are exactly the range. After an error the stream is over.
pub struct RangeStream {
    pieces: BoxStream<'static, Result<Bytes>>,
    trouble: LastTrouble,
}

/// What went wrong last in a stream that goes on trying.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastTrouble(Arc<Mutex<Option<String>>>);

impl LastTrouble {
    pub(crate) fn note(&self, error: &Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }
}

impl RangeStream {
    pub(crate) fn new(pieces: BoxStream<'static, Result<Bytes>>, trouble: LastTrouble) -> Self {
        Self { pieces, trouble }
    }

    /// What went wrong last, also while the stream is still trying.
    #[must_use]
    pub fn last_trouble(&self) -> Option<String> {
        self.trouble.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next piece, `None` at the end of the range. Nothing is read before it is asked for. Safe to give up at any time;
    /// no byte is lost by that.
    ///
    /// # Errors
    /// As [`crate::Repository::blob_range`].
    pub async fn next(&mut self) -> Option<Result<Bytes>> {
        self.pieces.next().await
    }
}

impl Stream for RangeStream {
    type Item = Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.pieces.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for RangeStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeStream").finish_non_exhaustive()
    }
}

struct Verifier {
    pieces: BoxStream<'static, Result<Bytes>>,
    hasher: Sha256,
    seen_bytes: u64,
    digest: Digest,
    size_bytes: u64,
}

impl Verifier {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.pieces.next().await.transpose()?;
        let (digest, size_bytes) = (self.digest, self.size_bytes);
        if let Some(piece) = piece {
            self.seen_bytes += piece.len() as u64;
            if self.seen_bytes > size_bytes {
                return Err(Error::corrupt(format!("blob {digest} is longer than {size_bytes} bytes")));
            }
            self.hasher.update(&piece);
            return Ok(Some(piece));
        }
        if self.seen_bytes != size_bytes {
            let seen_bytes = self.seen_bytes;
            return Err(Error::corrupt(format!("blob {digest} has {seen_bytes} bytes instead of {size_bytes}")));
        }
        let actual = Digest::finish(self.hasher.clone());
        if actual != digest {
            return Err(Error::corrupt(format!("the bytes of blob {digest} have the digest {actual}")));
        }
        Ok(None)
    }
}

impl fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobReader").finish_non_exhaustive()
    }
}

impl AsyncRead for BlobReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncBufRead for BlobReader {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        Pin::new(&mut self.get_mut().0).poll_fill_buf(cx)
    }

    fn consume(mut self: Pin<&mut Self>, amount: usize) {
        Pin::new(&mut self.0).consume(amount);
    }
}
