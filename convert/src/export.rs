//! An image as one flat file: what the block device of the image would hold.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tokio_util::io::SyncIoBridge;
use ublkimg_image::{BLOCK_SIZE, BundledLayer, DeviceMap, TAIL_BLOCKS, flat_block0};
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::erofs_manifest::LayerRef;
use ublkimg_registry::{Digest, Repository};

use crate::background;
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
    let StoredImage { manifest, metadata, bundle, tree, .. } = StoredImage::read(repository, platform).await?;
    let mut blob_blocks: Vec<u32> = bundle.layers.iter().map(|layer| layer.index.raw_len_blocks()).collect();
    let mut file_system_blocks = layers_end(&metadata, &blob_blocks)?;
    blob_blocks.extend(tree.as_ref().map(|tree| tree.index.raw_len_blocks()));
    let total_blocks = layers_end(&metadata, &blob_blocks)? + TAIL_BLOCKS;
    if tree.is_none() {
        file_system_blocks = total_blocks;
    }
    let out = WriterAt { out: file.try_clone().map_err(write_failed)?, offset_bytes: 0 };
    let flat = Flat { metadata: metadata.into(), file_system_blocks };
    flat.write(repository, manifest.devices().zip(bundle.layers.iter().chain(&tree)), out).await?;
    let total_bytes = u64::from(total_blocks) * BLOCK_SIZE as u64;
    file.set_len(total_bytes).map_err(write_failed)?;
    Ok(total_bytes)
}

/// Where the last of these blobs ends on the device of an image.
pub(crate) fn layers_end(metadata: &[u8], blob_blocks: &[u32]) -> Result<u32> {
    let metadata_blocks = u32::try_from(metadata.len() / BLOCK_SIZE).unwrap_or(u32::MAX);
    Ok(DeviceMap::new(metadata_blocks, blob_blocks).map_err(from_image)?.end_of(blob_blocks.len()))
}

/// The device of an image, byte by byte.
pub(crate) struct Flat {
    /// The metadata image as it is stored.
    pub(crate) metadata: Arc<[u8]>,
    /// What block 0 says: where the verity tree starts, without one the length of the device.
    pub(crate) file_system_blocks: u32,
}

impl Flat {
    /// Writes metadata and blobs, which are in `repository`, one after another, without the zeros at the end.
    pub(crate) async fn write<'a, W: Write + Send + 'static>(
        self,
        repository: &Repository,
        blobs: impl Iterator<Item = (&'a LayerRef, &'a BundledLayer)>,
        mut out: W,
    ) -> Result<W> {
        let Self { metadata, file_system_blocks } = self;
        out = background::run(move || {
            let block0 = metadata.first_chunk().ok_or_else(|| Error::damaged("the metadata image is empty"))?;
            let block0 = flat_block0(block0, file_system_blocks).map_err(from_image)?;
            out.write_all(&block0).and_then(|()| out.write_all(&metadata[BLOCK_SIZE..])).map_err(write_failed)?;
            Ok::<_, Error>(out)
        })
        .await??;
        for (blob, bundled) in blobs {
            let reader = SyncIoBridge::new(repository.blob(&blob.digest, blob.size_bytes).await?);
            let (len_bytes, digest) = (bundled.index.raw_len_bytes(), blob.uncompressed_digest);
            let copied = background::run(move || copy_blob(reader, &mut out, len_bytes, digest).map(|()| out));
            out = copied.await??;
        }
        Ok(out)
    }
}

/// Decompresses a blob of chunks and checks what came out.
pub(crate) fn copy_blob(reader: impl Read, out: &mut impl Write, len_bytes: u64, digest: Digest) -> Result<()> {
    let decoder = zstd::stream::read::Decoder::new(reader).map_err(|error| Error::io("starting zstd", error))?;
    // One byte more than there should be shows a blob that is too long.
    let mut raw = HashingReader::new(decoder).take(len_bytes + 1);
    io::copy(&mut raw, out).map_err(|error| Error::io("reading a blob back", error))?;
    let raw = raw.into_inner();
    if raw.len_bytes() != len_bytes || raw.digest().0 != digest.0 {
        return Err(Error::damaged("a blob decompresses to something else than the manifest says"));
    }
    Ok(())
}

struct WriterAt {
    out: File,
    offset_bytes: u64,
}

impl Write for WriterAt {
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
