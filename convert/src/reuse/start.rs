//! The start of a layer blob: merge record and metadata, without its data.

use std::ops::Range;

use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{BLOCK_SIZE, Chunk, ChunkIndex, MergeRecord, SkippableKind};
use ublkimg_registry::erofs_manifest::LayerRef;
use ublkimg_registry::{Digest, Repository};

use crate::background;
use crate::blob::from_stored;
use crate::chunk::{decode_chunk, decompressor};
use crate::error::{Error, Result};

/// Longest merge record that is read, in bytes: a million directories without entries of their own.
pub(crate) const RECORD_BYTES_MAX: u64 = 64 << 20;

/// Longest metadata of one layer that is read, in bytes: five million files.
pub(crate) const METADATA_BYTES_MAX: u64 = 1 << 30;

/// Merge record and metadata of a layer blob, in two requests where its metadata has more than one chunk, else in one.
///
/// # Errors
/// `VerificationFailed` when they are not what `record_digest` and `index` say; those of the registry.
pub(super) async fn read_start(
    repository: &Repository,
    reference: &LayerRef,
    record_digest: Digest,
    index: &ChunkIndex,
) -> Result<(Vec<u8>, Vec<u8>)> {
    if index.is_empty() {
        return Err(Error::damaged("a layer blob without chunks"));
    }
    let first = index.chunk(0);
    if first.stored.start > RECORD_BYTES_MAX {
        return Err(Error::damaged(format!("a merge record of {} bytes", first.stored.start)));
    }
    let bytes = repository.blob_range(&reference.digest, 0..first.stored.end).await?;
    let (record, frame) = bytes.split_at(usize::try_from(first.stored.start).unwrap_or(usize::MAX).min(bytes.len()));
    let record = skippable_payload(SkippableKind::Ublkimg, record).map_err(from_stored)?.to_vec();
    if Digest::of(&record) != record_digest {
        return Err(Error::damaged("the merge record has another digest than the manifest says"));
    }
    let metadata_chunks = metadata_chunks(&record, index)?;
    let rest = metadata_chunks.get(1..).unwrap_or_default();
    let rest_range = stored_range(rest);
    let rest_bytes = match &rest_range {
        Some(range) => repository.blob_range(&reference.digest, range.clone()).await?,
        None => bytes::Bytes::new(),
    };
    let frame = frame.to_vec();
    let metadata = background::run(move || {
        let mut decompressor = decompressor()?;
        let mut metadata = decode_chunk(&mut decompressor, &metadata_chunks[0], &frame)?;
        let start = rest_range.map_or(0, |range| range.start);
        for chunk in &metadata_chunks[1..] {
            let part = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
            let stored = rest_bytes.get(part(chunk.stored.start)..part(chunk.stored.end));
            let stored = stored.ok_or_else(|| Error::damaged("the registry sent less than was asked for"))?;
            metadata.extend(decode_chunk(&mut decompressor, chunk, stored)?);
        }
        Ok::<_, Error>(metadata)
    });
    Ok((record, metadata.await??))
}

/// The chunks that hold the metadata: no chunk holds metadata and data.
fn metadata_chunks(record: &[u8], index: &ChunkIndex) -> Result<Vec<Chunk>> {
    let record = MergeRecord::decode(record).map_err(from_stored)?;
    let len_bytes = u64::from(record.metadata_blocks) * BLOCK_SIZE as u64;
    if len_bytes > METADATA_BYTES_MAX {
        return Err(Error::unsupported(format!("a layer with {len_bytes} bytes of metadata")));
    }
    let chunks: Vec<Chunk> = index.iter().take_while(|chunk| chunk.raw.start < len_bytes).collect();
    match chunks.last() {
        Some(last) if last.raw.end == len_bytes => Ok(chunks),
        _ => Err(Error::damaged("the metadata of a layer blob does not end with a chunk")),
    }
}

fn stored_range(chunks: &[Chunk]) -> Option<Range<u64>> {
    Some(chunks.first()?.stored.start..chunks.last()?.stored.end)
}
