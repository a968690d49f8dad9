//! zstd *skippable* frames: bytes in a zstd stream that decoders pass over.
//!
//! A skippable frame is a magic number 0x184D2A50 to 0x184D2A5F, the length of its payload (both little endian, 32
//! bits) and the payload (RFC 8878, section 3.1.2). So a blob stays one that `zstd -d` turns into the image, whatever
//! travels in these frames.

use crate::cursor::Cursor;
use crate::{Error, Result};

/// Bytes before the payload of a skippable frame.
pub const SKIPPABLE_HEADER_BYTES: usize = 8;

const PART: &str = "zstd skippable frame";

/// Which of the skippable frames it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkippableKind {
    /// Ours: a merge record at the start of a layer blob, or a bundle at the end of the metadata blob.
    Ublkimg,
    /// The chunk index of the EROFS image layer specification.
    ChunkIndex,
}

impl SkippableKind {
    /// The magic number of the frame.
    pub const fn magic(self) -> u32 {
        match self {
            Self::Ublkimg => 0x184D_2A5E,
            Self::ChunkIndex => 0x184D_2A5F,
        }
    }
}

/// The whole frame around `payload`.
///
/// # Errors
/// `TooLarge` if the payload has 4 GiB or more.
pub fn skippable(kind: SkippableKind, payload: &[u8]) -> Result<Vec<u8>> {
    let len = u32::try_from(payload.len())
        .map_err(|_| Error::too_large(PART, format!("payload of {} bytes", payload.len())))?;
    let mut frame = Vec::with_capacity(SKIPPABLE_HEADER_BYTES + payload.len());
    frame.extend_from_slice(&kind.magic().to_le_bytes());
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Reads the header at the start of `bytes`; returns the length of the payload that follows it, in bytes. Bytes after
/// the header are not looked at.
///
/// # Errors
/// `Corrupt` if there are less than 8 bytes or the frame is not one of that kind.
pub fn skippable_header(kind: SkippableKind, bytes: &[u8]) -> Result<u32> {
    let mut cursor = Cursor::new(PART, bytes);
    let magic = cursor.u32()?;
    if magic != kind.magic() {
        return Err(Error::corrupt(PART, format!("magic {magic:#010x}, expected {:#010x}", kind.magic())));
    }
    cursor.u32()
}

/// The payload of a skippable frame that is all of `frame`.
///
/// # Errors
/// As [`skippable_header`], and `Corrupt` if the frame is longer or shorter than its header says.
pub fn skippable_payload(kind: SkippableKind, frame: &[u8]) -> Result<&[u8]> {
    let len = skippable_header(kind, frame)?;
    let payload = &frame[SKIPPABLE_HEADER_BYTES..];
    if payload.len() as u64 != u64::from(len) {
        return Err(Error::corrupt(PART, format!("header says {len} bytes, there are {}", payload.len())));
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zstd_skips_the_frames() {
        let mut blob = skippable(SkippableKind::Ublkimg, b"before").unwrap();
        blob.extend(zstd::bulk::compress(b"data", 3).unwrap());
        blob.extend(skippable(SkippableKind::ChunkIndex, &[7; 100]).unwrap());
        assert_eq!(zstd::stream::decode_all(&blob[..]).unwrap(), b"data");
    }

    #[test]
    fn payload_comes_back_and_faults_are_refused() {
        let frame = skippable(SkippableKind::Ublkimg, b"payload").unwrap();
        assert_eq!(skippable_header(SkippableKind::Ublkimg, &frame[..8]), Ok(7));
        assert_eq!(skippable_payload(SkippableKind::Ublkimg, &frame), Ok(&b"payload"[..]));
        assert!(skippable_payload(SkippableKind::ChunkIndex, &frame).is_err());
        for cut in 0..frame.len() {
            assert!(skippable_payload(SkippableKind::Ublkimg, &frame[..cut]).is_err());
        }
        let longer = [&frame[..], b"x"].concat();
        assert!(skippable_payload(SkippableKind::Ublkimg, &longer).is_err());
    }
}
