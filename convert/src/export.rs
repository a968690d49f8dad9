//! An image as one flat file: what the block device of the image would hold.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tokio_util::io::SyncIoBridge;
use ublkimg_image::{BLOCK_SIZE, DeviceMap, flat_block0};
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{Digest, Repository};

use crate::blob::from_image;
use crate::error::{Error, ErrorKind, Result};
use crate::hashing::HashingReader;
use crate::stored_image::StoredImage;
use crate::unnamed_file::path_of;

/// Writes the image to a new file at `path`, which appears whole or not at all. Returns its length in bytes.
///
/// # Errors
/// `Usage` when `path` is there already; `Unsupported` in a file system without unnamed files; as [`export`].
pub async fn export_file(repository: &Repository, platform: &Platform, path: &Path) -> Result<u64> {
    let failed = |error: Errno| Error::open(format!("writing {}", path.display()), error.into());
    let exists = || Error::new(ErrorKind::Usage, format!("{} exists already: remove it first", path.display()));
    if path.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let unnamed = fs::open(directory, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o644));
    let file = File::from(unnamed.map_err(|error| match error {
        Errno::OPNOTSUPP => Error::unsupported(format!("{}: no unnamed files here", directory.display())),
        error => failed(error),
    })?);
    let len_bytes = export(repository, platform, &file).await?;
    match fs::linkat(fs::CWD, path_of(&file), fs::CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(len_bytes),
        Err(Errno::EXIST) => Err(exists()),
        Err(error) => Err(failed(error)),
    }
}

/// Writes the image that `repository` names to `file`, from its start: metadata with the block 0 that devices serve,
/// layer blobs decompressed, zeros. The result can be mounted through a loop device. Returns its length in bytes.
///
/// # Errors
/// `NotOurs` for an image that is not converted; `VerificationFailed` for one that is damaged; those of the registry and
/// of the file.
pub async fn export(repository: &Repository, platform: &Platform, file: &File) -> Result<u64> {
    let StoredImage { manifest, mut metadata, bundle, .. } = StoredImage::read(repository, platform).await?;
    let blob_blocks: Vec<u32> = bundle.layers.iter().map(|layer| layer.index.raw_len_blocks()).collect();
    let metadata_blocks = u32::try_from(metadata.len() / BLOCK_SIZE).unwrap_or(u32::MAX);
    let map = DeviceMap::new(metadata_blocks, &blob_blocks).map_err(from_image)?;

    let block0 =
        metadata.first_chunk_mut::<BLOCK_SIZE>().ok_or_else(|| Error::damaged("the metadata image is empty"))?;
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

/// Decompresses a layer blob into the file and checks what came out.
fn copy_blob(reader: impl Read, out: &File, offset_bytes: u64, len_bytes: u64, digest: Digest) -> Result<()> {
    let decoder = zstd::stream::read::Decoder::new(reader).map_err(|error| Error::io("starting zstd", error))?;
    // One byte more than there should be shows a blob that is too long.
    let mut raw = HashingReader::new(decoder).take(len_bytes + 1);
    io::copy(&mut raw, &mut WriterAt { out, offset_bytes }).map_err(|error| Error::io("exporting", error))?;
    let raw = raw.into_inner();
    if raw.len_bytes() != len_bytes || raw.digest().0 != digest.0 {
        return Err(Error::damaged("a layer blob decompresses to something else than the manifest says"));
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

fn write_failed(error: io::Error) -> Error {
    Error::io("writing the exported image", error)
}
