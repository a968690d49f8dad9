//! An image as one flat file: what the block device of the image would hold.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;

use tokio::io::AsyncReadExt as _;
use tokio_util::io::SyncIoBridge;
use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{BLOCK_SIZE, Bundle, DeviceMap, SkippableKind, flat_block0};
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, choose};
use ublkimg_registry::{Digest, Repository};

use crate::blob::from_image;
use crate::error::{Error, ErrorKind, Result};
use crate::hashing::HashingReader;

/// Longest metadata image that is read, in bytes: it is held in memory.
const METADATA_RAW_BYTES_MAX: u64 = 4 << 30;

/// Writes the image that `repository` names to `file`, from its start: metadata with the block 0 that devices serve,
/// layer blobs decompressed, zeros. The result can be mounted through a loop device. Returns its length in bytes.
///
/// # Errors
/// `Unsupported` for an image that is not ours; `VerificationFailed` for one that is damaged; those of the registry and
/// of the file.
pub async fn export(repository: &Repository, platform: &Platform, file: &File) -> Result<u64> {
    let resolved = repository.resolve().await?;
    let bytes = match resolved.media_type.as_str() {
        MEDIA_TYPE_INDEX | MEDIA_TYPE_DOCKER_LIST => {
            repository.manifest(&choose(&resolved.bytes, platform)?.digest).await?
        }
        _ => resolved.bytes,
    };
    let manifest = ErofsManifest::parse(&bytes)?;
    let (mut metadata, bundle) = read_metadata(repository, &manifest).await?;
    let blob_blocks: Vec<u32> = bundle.layers.iter().map(|layer| layer.index.raw_len_blocks()).collect();
    let metadata_blocks = u32::try_from(metadata.len() / BLOCK_SIZE).unwrap_or(u32::MAX);
    let map = DeviceMap::new(metadata_blocks, &blob_blocks).map_err(from_image)?;

    let block0 = metadata.first_chunk_mut::<BLOCK_SIZE>().ok_or_else(|| damaged("the metadata image is empty"))?;
    *block0 = flat_block0(block0, map.total_blocks()).map_err(from_image)?;
    file.write_all_at(&metadata, 0).map_err(write_failed)?;
    let mut offset_bytes = metadata.len() as u64;
    for (layer, bundled) in manifest.layers.iter().zip(&bundle.layers) {
        let reader = SyncIoBridge::new(repository.blob(&layer.digest, layer.size_bytes).await?);
        let out = file.try_clone().map_err(write_failed)?;
        let (len_bytes, digest) = (bundled.index.raw_len_bytes(), layer.uncompressed_digest);
        let copied = tokio::task::spawn_blocking(move || copy_blob(reader, &out, offset_bytes, len_bytes, digest));
        copied.await.map_err(|error| Error::new(ErrorKind::Io, "exporting").with_source(error))??;
        offset_bytes += len_bytes;
    }
    let total_bytes = u64::from(map.total_blocks()) * BLOCK_SIZE as u64;
    file.set_len(total_bytes).map_err(write_failed)?;
    Ok(total_bytes)
}

/// The metadata image and the chunk indexes of the layer blobs.
async fn read_metadata(repository: &Repository, manifest: &ErofsManifest) -> Result<(Vec<u8>, Bundle)> {
    let reference = &manifest.metadata;
    let mut blob = Vec::new();
    let mut reader = repository.blob(&reference.digest, reference.size_bytes).await?;
    reader.read_to_end(&mut blob).await.map_err(|error| Error::io("reading the metadata blob", error))?;
    let split = usize::try_from(reference.bundle_range.start).unwrap_or(usize::MAX).min(blob.len());
    let payload = skippable_payload(SkippableKind::Ublkimg, &blob[split..]).map_err(from_image)?;
    let bundle = Bundle::decode(payload).map_err(from_image)?;
    let digests = |digest: &Digest| digest.0;
    if !bundle.layers.iter().map(|layer| layer.digest.0).eq(manifest.layers.iter().map(|layer| digests(&layer.digest)))
    {
        return Err(damaged("the bundle is for other layers than the manifest"));
    }
    let mut metadata = Vec::new();
    let decoder = zstd::stream::read::Decoder::with_buffer(&blob[..split]);
    let decoder = decoder.map_err(|error| Error::io("starting zstd", error))?;
    let mut limited = HashingReader::new(decoder.take(METADATA_RAW_BYTES_MAX));
    limited.read_to_end(&mut metadata).map_err(|error| damaged("the metadata blob").with_source(error))?;
    if limited.digest().0 != reference.uncompressed_digest.0 {
        return Err(damaged("the metadata image has another digest than the manifest says"));
    }
    Ok((metadata, bundle))
}

/// Decompresses a layer blob into the file and checks what came out.
fn copy_blob(reader: impl Read, out: &File, offset_bytes: u64, len_bytes: u64, digest: Digest) -> Result<()> {
    let decoder = zstd::stream::read::Decoder::new(reader).map_err(|error| Error::io("starting zstd", error))?;
    // One byte more than there should be shows a blob that is too long.
    let mut raw = HashingReader::new(decoder).take(len_bytes + 1);
    io::copy(&mut raw, &mut WriterAt { out, offset_bytes }).map_err(|error| Error::io("exporting", error))?;
    let raw = raw.into_inner();
    if raw.len_bytes() != len_bytes || raw.digest().0 != digest.0 {
        return Err(damaged("a layer blob decompresses to something else than the manifest says"));
    }
    Ok(())
}

struct WriterAt<'a> {
    out: &'a File,
    offset_bytes: u64,
}

impl Write for WriterAt<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write_at(bytes, self.offset_bytes)?;
        self.offset_bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::VerificationFailed, what)
}

fn write_failed(error: io::Error) -> Error {
    Error::io("writing the exported image", error)
}
