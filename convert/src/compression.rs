//! Layers as they come: gzip, zstd or plain, told apart by their first bytes, because media types are often wrong.

use std::io::{self, BufReader, Cursor, Read};

use crate::error::{Error, Result};

/// Bytes read from the source at once.
const INPUT_BYTES: usize = 128 << 10;

/// Largest zstd window, as a power of two: 128 MiB, what `zstd -d` accepts without asking.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Bytes that tell the compression: the longest magic number.
const MAGIC_BYTES: usize = 6;

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, frames and skippable frames.
    Zstd,
    /// Not at all.
    None,
}

impl Compression {
    /// Tells the compression from the first [`MAGIC_BYTES`].
    ///
    /// # Errors
    /// `Unsupported` for compressions that container layers do not use.
    pub(crate) fn sniff(start: &[u8]) -> Result<Self> {
        match start {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Self::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err(Error::unsupported("compressed with xz")),
            [b'B', b'Z', b'h', ..] => Err(Error::unsupported("compressed with bzip2")),
            _ => Ok(Self::None),
        }
    }
}

/// A decompressed stream. Ends only where the input does, so whatever follows the compressed data is an error, not
/// something that nobody looked at.
pub(crate) struct Decompressor<'a> {
    compression: Compression,
    inner: Box<dyn Read + 'a>,
}

impl<'a> Decompressor<'a> {
    /// # Errors
    /// As [`Compression::sniff`], and those of `input`.
    pub(crate) fn new(input: &'a mut dyn Read) -> Result<Self> {
        let mut input = BufReader::with_capacity(INPUT_BYTES, input);
        // As many as needed: a network may deliver the first byte alone.
        let mut start = Vec::with_capacity(MAGIC_BYTES);
        let sniffed = input.by_ref().take(MAGIC_BYTES as u64).read_to_end(&mut start);
        sniffed.map_err(|error| Error::io("reading the layer", error))?;
        let compression = Compression::sniff(&start)?;
        let input = Cursor::new(start).chain(input);
        let inner: Box<dyn Read + 'a> = match compression {
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)
                    .map_err(|error| Error::io("starting zstd", error))?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(|error| Error::io("starting zstd", error))?;
                Box::new(decoder)
            }
            Compression::None => Box::new(input),
        };
        Ok(Self { compression, inner })
    }
}

impl Read for Decompressor<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let compression = self.compression;
        self.inner.read(buffer).map_err(|error| explain(compression, error))
    }
}

/// Errors of the decoder say that the source is bad; errors of the source underneath pass.
fn explain(compression: Compression, error: io::Error) -> io::Error {
    let decoders_own = error.raw_os_error().is_none()
        && !error.get_ref().is_some_and(|inner| inner.is::<Error>() || inner.is::<ublkimg_registry::Error>());
    if error.kind() == io::ErrorKind::Interrupted || compression == Compression::None || !decoders_own {
        return error;
    }
    let name = if compression == Compression::Gzip { "gzip" } else { "zstd" };
    let fault = if error.kind() == io::ErrorKind::UnexpectedEof { "truncated" } else { "damaged" };
    Error::bad_source(format!("{name} data is {fault}")).with_source(error).into()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::ErrorKind;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn decode(mut data: &[u8]) -> Result<Vec<u8>> {
        let mut decoded = Vec::new();
        let mut decompressor = Decompressor::new(&mut data)?;
        decompressor.read_to_end(&mut decoded).map_err(|error| Error::io("test", error))?;
        Ok(decoded)
    }

    #[test]
    fn all_kinds_and_several_members() {
        assert_eq!(decode(b"plain").unwrap(), b"plain");
        assert_eq!(decode(b"").unwrap(), b"");
        assert_eq!(decode(&gzip(b"one")).unwrap(), b"one");
        assert_eq!(decode(&[gzip(b"one"), gzip(b"two")].concat()).unwrap(), b"onetwo");
        let frame = |data: &[u8]| zstd::bulk::compress(data, 3).unwrap();
        let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let stream = [skippable.clone(), frame(b"one"), skippable.clone(), frame(b"two"), skippable].concat();
        assert_eq!(decode(&stream).unwrap(), b"onetwo");
    }

    #[test]
    fn the_magic_number_may_come_byte_by_byte() {
        struct Trickle<'a>(&'a [u8]);
        impl Read for Trickle<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let want = buffer.len().min(1);
                self.0.read(&mut buffer[..want])
            }
        }
        for stored in [gzip(b"data"), zstd::bulk::compress(b"data", 3).unwrap(), b"data".to_vec()] {
            let mut input = Trickle(&stored);
            let mut decoded = Vec::new();
            Decompressor::new(&mut input).unwrap().read_to_end(&mut decoded).unwrap();
            assert_eq!(decoded, b"data");
        }
    }

    #[test]
    fn truncated_and_damaged_data_is_bad_source() {
        let data: Vec<u8> = (0..100_000_u32).flat_map(|number| (number % 977).to_le_bytes()).collect();
        for whole in [gzip(&data), zstd::bulk::compress(&data, 3).unwrap()] {
            let error = decode(&whole[..whole.len() / 2]).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadSource);
            assert!(error.to_string().contains("truncated"), "{error}");
        }
        let mut damaged = gzip(&data);
        let middle = damaged.len() / 2;
        damaged[middle..middle + 8].fill(0xff);
        assert_eq!(decode(&damaged).map(|_| ()).unwrap_err().kind(), ErrorKind::BadSource);
        let garbage_after = [gzip(b"one"), b"garbage".to_vec()].concat();
        assert_eq!(decode(&garbage_after).unwrap_err().kind(), ErrorKind::BadSource);
    }

    #[test]
    fn other_compressions_are_unsupported() {
        assert_eq!(decode(b"BZh9abcdef").unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(decode(b"\xfd7zXZ\0abc").unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn errors_of_the_source_keep_their_kind() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(Error::new(ErrorKind::VerificationFailed, "wrong digest").into())
            }
        }
        let start = gzip(&[1; 1000]);
        let mut input = start[..20].chain(Failing);
        let mut decompressor = Decompressor::new(&mut input).unwrap();
        let error = decompressor.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(Error::io("test", error).kind(), ErrorKind::VerificationFailed);
    }
}
