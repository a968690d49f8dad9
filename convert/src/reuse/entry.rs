//! A file of the conversion cache.
//!
//! zstd over: a line of JSON (the layer blob's reference, lengths of what follows, the repository that has it), then
//! merge record, chunk index, metadata.

use std::io::{BufRead as _, Read};

use serde::{Deserialize, Serialize};
use ublkimg_image::ChunkIndex;
use ublkimg_registry::Digest;
use ublkimg_registry::erofs_manifest::{LayerOrigin, LayerRef};

use super::start::{METADATA_BYTES_MAX, RECORD_BYTES_MAX};
use crate::blob::from_image;
use crate::converted_layer::ConvertedLayer;
use crate::error::{Error, Result};

/// zstd level of the files: they are written often and read seldom.
const LEVEL: i32 = 3;

/// Longest first line.
const HEAD_BYTES_MAX: u64 = 64 << 10;

/// Longest chunk index that is read, in bytes: a blob of 16 TiB.
const INDEX_BYTES_MAX: u64 = 4 << 30;

/// What is known of a layer blob.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) layer: ConvertedLayer,
    /// `HOST/NAME` of a repository that had the blob; none if it went to a layout directory.
    pub(super) repository: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    digest: String,
    size_bytes: u64,
    index_start: u64,
    index_digest: String,
    uncompressed_digest: String,
    source_layer: Option<String>,
    diff_id: String,
    settings: String,
    record_digest: String,
    repository: Option<String>,
    record_len_bytes: u64,
    index_len_bytes: u64,
    metadata_len_bytes: u64,
}

impl Entry {
    pub(super) fn is_of(&self, diff_id: &Digest, settings: &str) -> bool {
        let origin = self.layer.reference.origin.as_ref();
        origin.is_some_and(|origin| origin.diff_id == *diff_id && origin.settings == settings)
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let LayerRef { digest, size_bytes, index_range, index_digest, uncompressed_digest, origin } =
            &self.layer.reference;
        let origin = origin.as_ref().ok_or_else(|| Error::damaged("a layer of unknown origin"))?;
        let index = self.layer.index.encode();
        let head = Head {
            digest: digest.to_string(),
            size_bytes: *size_bytes,
            index_start: index_range.start,
            index_digest: index_digest.to_string(),
            uncompressed_digest: uncompressed_digest.to_string(),
            source_layer: origin.source_layer.map(|digest| digest.to_string()),
            diff_id: origin.diff_id.to_string(),
            settings: origin.settings.clone(),
            record_digest: origin.record_digest.to_string(),
            repository: self.repository.clone(),
            record_len_bytes: self.layer.record.len() as u64,
            index_len_bytes: index.len() as u64,
            metadata_len_bytes: self.layer.metadata.len() as u64,
        };
        let head = serde_json::to_vec(&head).map_err(|error| Error::damaged("cache entry").with_source(error))?;
        let bytes = [&head, &b"\n"[..], &self.layer.record, &index, &self.layer.metadata].concat();
        zstd::bulk::compress(&bytes, LEVEL).map_err(|error| Error::io("compressing a cache entry", error))
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let malformed = |error| Error::damaged("malformed").with_source(error);
        let mut decoder = std::io::BufReader::new(zstd::stream::read::Decoder::new(bytes).map_err(malformed)?);
        let mut line = Vec::new();
        (&mut decoder).take(HEAD_BYTES_MAX).read_until(b'\n', &mut line).map_err(malformed)?;
        let head: Head =
            serde_json::from_slice(&line).map_err(|error| Error::damaged("malformed").with_source(error))?;
        let record = part(&mut decoder, head.record_len_bytes, RECORD_BYTES_MAX)?;
        let index = part(&mut decoder, head.index_len_bytes, INDEX_BYTES_MAX)?;
        let metadata = part(&mut decoder, head.metadata_len_bytes, METADATA_BYTES_MAX)?;
        let origin = LayerOrigin {
            source_layer: head.source_layer.map(|digest| digest.parse()).transpose()?,
            diff_id: head.diff_id.parse()?,
            settings: head.settings,
            record_digest: head.record_digest.parse()?,
        };
        let reference = LayerRef {
            digest: head.digest.parse()?,
            size_bytes: head.size_bytes,
            index_range: head.index_start..head.size_bytes,
            index_digest: head.index_digest.parse()?,
            uncompressed_digest: head.uncompressed_digest.parse()?,
            origin: Some(origin),
        };
        let index = ChunkIndex::decode(&index, head.index_start).map_err(from_image)?;
        Ok(Self { layer: ConvertedLayer { reference, index, metadata, record }, repository: head.repository })
    }
}

fn part(from: &mut impl Read, len_bytes: u64, limit_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(len_bytes.min(limit_bytes))
        .read_to_end(&mut bytes)
        .map_err(|error| Error::damaged("malformed").with_source(error))?;
    if bytes.len() as u64 == len_bytes { Ok(bytes) } else { Err(Error::damaged("too short")) }
}

#[cfg(test)]
pub(super) mod tests {
    use ublkimg_image::{ChunkId, ChunkIndexBuilder, Sha256};

    use super::*;

    pub(in crate::reuse) fn entry() -> Entry {
        let mut index = ChunkIndexBuilder::new(40);
        index.push(100, 4096, ChunkId(Sha256::of(b"frame"))).unwrap();
        let index = index.finish();
        let reference = LayerRef {
            digest: Digest::of(b"blob"),
            size_bytes: 228,
            index_range: 140..228,
            index_digest: Digest(index.digest().0),
            uncompressed_digest: Digest::of(b"raw"),
            origin: Some(LayerOrigin {
                source_layer: Some(Digest::of(b"layer.gz")),
                diff_id: Digest::of(b"layer"),
                settings: "1 level-3".to_owned(),
                record_digest: Digest::of(b"record"),
            }),
        };
        let layer = ConvertedLayer { reference, index, metadata: vec![7; 4096], record: b"record".to_vec() };
        Entry { layer, repository: Some("host:5000/a/b".to_owned()) }
    }

    #[test]
    fn reads_back() {
        let bytes = entry().encode().unwrap();
        let read = Entry::decode(&bytes).unwrap();
        assert_eq!(read.layer.reference, entry().layer.reference);
        assert_eq!(read.layer.index, entry().layer.index);
        assert_eq!((read.layer.metadata, read.layer.record), (entry().layer.metadata, entry().layer.record));
        assert_eq!(read.repository, entry().repository);
        assert!(Entry::decode(&bytes[..bytes.len() / 2]).is_err());
        assert!(Entry::decode(b"").is_err());
    }
}
