//! A trace as one zstd frame: how it is stored, pushed, and written to a file.

use ublkimg_image::trace::{TRACE_BYTES_MAX, Trace};

use crate::error::{Error, ErrorKind, Result};

/// A few 100 KiB at most, written once and sent often.
const LEVEL: i32 = 9;

/// The trace as it is stored.
///
/// # Errors
/// `Invalid` for a trace that is out of its bounds.
pub fn to_stored(trace: &Trace) -> Result<Vec<u8>> {
    let encoded = trace.encode().map_err(|error| Error::caused(ErrorKind::Invalid, "encode a trace", error))?;
    zstd::bulk::compress(&encoded, LEVEL).map_err(|error| Error::io("compress a trace", error))
}

/// Reads a stored trace, whoever wrote it.
///
/// # Errors
/// `Corrupt` if it is not one within the bounds.
pub fn from_stored(stored: &[u8]) -> Result<Trace> {
    let decoded = zstd::bulk::decompress(stored, TRACE_BYTES_MAX);
    let decoded = decoded.map_err(|error| Error::caused(ErrorKind::Corrupt, "decompress a trace", error))?;
    Trace::decode(&decoded).map_err(|error| Error::caused(ErrorKind::Corrupt, "decode a trace", error))
}
