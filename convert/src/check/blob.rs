//! One layer blob, from its first byte to its last.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::Path;

use sha2::Digest as _;
use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{BLOCK_SIZE, ChunkIndex, MergeRecord, SkippableKind};
use ublkimg_registry::Digest;
use ublkimg_registry::erofs_manifest::LayerRef;

use crate::blob::from_stored;
use crate::chunk::{decode_chunk, decompressor};
use crate::error::{Error, Result};
use crate::hashing::finish;
use crate::reuse::{METADATA_BYTES_MAX, RECORD_BYTES_MAX};

/// A blob that is what its digests say.
pub(super) struct CheckedBlob {
    pub(super) record: MergeRecord,
    /// The EROFS metadata at the start of the raw stream.
    pub(super) metadata: Vec<u8>,
    /// The raw stream in a file without a name, if it was asked for.
    pub(super) raw: Option<File>,
}

/// Reads a blob. `reader` fails at its end when the bytes do not have the blob's digest. The raw stream is kept in a file in
/// `raw_to`.
///
/// # Errors
/// `VerificationFailed` naming the chunk or part that is not what it should be.
pub(super) fn check(
    mut reader: impl Read,
    layer: &LayerRef,
    index: &ChunkIndex,
    raw_to: Option<&Path>,
) -> Result<CheckedBlob> {
    let reading = |error| Error::io("reading the blob", error);
    let record = read_record(&mut reader, layer, index)?;
    let metadata_bytes = u64::from(record.metadata_blocks) * BLOCK_SIZE as u64;
    if metadata_bytes > METADATA_BYTES_MAX.min(index.raw_len_bytes()) {
        return Err(Error::damaged(format!("{metadata_bytes} bytes of metadata in a layer")));
    }
    let temporary = |error| Error::io("writing to the temporary directory", error);
    let mut raw_file = raw_to.map(tempfile::tempfile_in).transpose().map_err(temporary)?;
    let mut metadata = Vec::new();
    let mut hasher = sha2::Sha256::new();
    let mut decompressor = decompressor()?;
    let mut stored = Vec::new();
    for chunk in index.iter() {
        stored.clear();
        (&mut reader).take(chunk.stored.end - chunk.stored.start).read_to_end(&mut stored).map_err(reading)?;
        let raw = decode_chunk(&mut decompressor, &chunk, &stored)?;
        hasher.update(&raw);
        if chunk.raw.start < metadata_bytes {
            metadata.extend_from_slice(&raw);
        }
        if let Some(file) = &mut raw_file {
            file.write_all(&raw).map_err(temporary)?;
        }
    }
    if metadata.len() as u64 != metadata_bytes {
        return Err(Error::damaged("the metadata does not end with a chunk"));
    }
    if finish(hasher).0 != layer.uncompressed_digest.0 {
        return Err(Error::damaged("it decompresses to something else than the manifest says"));
    }
    check_index(&mut reader, layer, index)?;
    Ok(CheckedBlob { record, metadata, raw: raw_file })
}

fn read_record(reader: &mut impl Read, layer: &LayerRef, index: &ChunkIndex) -> Result<MergeRecord> {
    let first = (!index.is_empty()).then(|| index.chunk(0).stored.start);
    let len_bytes = first.ok_or_else(|| Error::damaged("there are no chunks"))?;
    if len_bytes > RECORD_BYTES_MAX {
        return Err(Error::damaged(format!("a merge record of {len_bytes} bytes")));
    }
    let mut frame = Vec::new();
    reader.take(len_bytes).read_to_end(&mut frame).map_err(|error| Error::io("reading the blob", error))?;
    let payload = skippable_payload(SkippableKind::Ublkimg, &frame).map_err(from_stored)?;
    if layer.origin.as_ref().is_some_and(|origin| origin.record_digest != Digest::of(payload)) {
        return Err(Error::damaged("the merge record has another digest than the manifest says"));
    }
    MergeRecord::decode(payload).map_err(from_stored)
}

/// The rest of the blob: its chunk index, and nothing else.
fn check_index(reader: &mut impl Read, layer: &LayerRef, index: &ChunkIndex) -> Result<()> {
    let reading = |error| Error::io("reading the blob", error);
    let mut frame = Vec::new();
    reader.take(layer.index_range.end - layer.index_range.start).read_to_end(&mut frame).map_err(reading)?;
    let payload = skippable_payload(SkippableKind::ChunkIndex, &frame).map_err(from_stored)?;
    if payload != index.encode() {
        return Err(Error::damaged("its chunk index is not the one in the metadata blob"));
    }
    match io::copy(reader, &mut io::sink()).map_err(reading)? {
        0 => Ok(()),
        more => Err(Error::damaged(format!("{more} bytes after the chunk index"))),
    }
}
