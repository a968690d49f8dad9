//! SHA-256 of a stream on its way.

use std::io::{self, Read};

use sha2::Digest as _;
use ublkimg_image::Sha256;

/// Passes a stream on and hashes it.
pub(crate) struct HashingReader<R> {
    inner: R,
    hasher: sha2::Sha256,
    len_bytes: u64,
}

impl<R: Read> HashingReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, hasher: sha2::Sha256::new(), len_bytes: 0 }
    }

    /// Bytes passed so far.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The digest of what was passed so far.
    pub(crate) fn digest(&self) -> Sha256 {
        finish(self.hasher.clone())
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.len_bytes += count as u64;
        Ok(count)
    }
}

/// The digest of what `hasher` has seen.
pub(crate) fn finish(hasher: sha2::Sha256) -> Sha256 {
    Sha256(hasher.finalize().into())
}
