//! Traces as files and blobs: the encoded trace in one zstd frame, media type `application/vnd.ublkimg.trace.v1+zstd`.

use ublkimg_image::trace::{TRACE_BYTES_MAX, Trace};

use crate::error::{Error, ErrorKind, Result};

/// zstd level of traces. They are some 100 KiB, so time does not count.
const LEVEL: i32 = 19;

/// The trace as it is stored: the same trace gives the same bytes.
///
/// # Errors
/// `Usage` when it is out of the bounds of a trace.
pub fn store_trace(trace: &Trace) -> Result<Vec<u8>> {
    let encoded = trace.encode().map_err(|error| Error::new(ErrorKind::Usage, error.to_string()))?;
    zstd::bulk::compress(&encoded, LEVEL).map_err(|error| Error::io("compressing the trace", error))
}

/// Reads a stored trace. Takes at most [`TRACE_BYTES_MAX`] bytes of memory for what it decompresses to.
///
/// # Errors
/// `Usage` for anything else.
pub fn load_trace(stored: &[u8]) -> Result<Trace> {
    let not_one = |why: String| Error::new(ErrorKind::Usage, format!("not a trace ({why})"));
    let encoded = zstd::bulk::decompress(stored, TRACE_BYTES_MAX).map_err(|error| not_one(error.to_string()))?;
    Trace::decode(&encoded).map_err(|error| not_one(error.to_string()))
}
