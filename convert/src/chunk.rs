//! One chunk: checked, then decompressed.

use ublkimg_image::{CHUNK_BYTES, Chunk, Sha256};

use crate::error::{Error, Result};

/// The raw bytes of a chunk, of whose blob `stored` is the frame. Nothing is decompressed that is not what the chunk index
/// says.
///
/// # Errors
/// `VerificationFailed` when it is not.
pub(crate) fn decode_chunk(
    decompressor: &mut zstd::bulk::Decompressor<'_>,
    chunk: &Chunk,
    stored: &[u8],
) -> Result<Vec<u8>> {
    let fault = |what: &str| Error::damaged(format!("chunk {} ({}): {what}", chunk.index, chunk.id.0));
    if Sha256::of(stored) != chunk.id.0 {
        return Err(fault("its bytes have another digest"));
    }
    #[expect(clippy::cast_possible_truncation, reason = "256 KiB")]
    let raw = decompressor.decompress(stored, CHUNK_BYTES as usize);
    let raw = raw.map_err(|error| fault("it cannot be decompressed").with_source(error))?;
    if raw.len() as u64 != chunk.raw.end - chunk.raw.start {
        return Err(fault("it decompresses to another length"));
    }
    Ok(raw)
}

/// A decompressor of chunks.
///
/// # Errors
/// `Io` when there is no memory for it.
pub(crate) fn decompressor() -> Result<zstd::bulk::Decompressor<'static>> {
    zstd::bulk::Decompressor::new().map_err(|error| Error::io("starting zstd", error))
}
