//! Layer blobs and the metadata blob: frames between skippable frames.
//!
//! ```text
//! layer blob:    [skippable: merge record][frame: chunk 0]..[frame: chunk n-1][skippable: chunk index]
//! verity tree:   [frame: chunk 0]..[frame: chunk n-1][skippable: chunk index]
//! metadata blob: [frame: chunk 0]..[frame: chunk n-1][skippable: bundle]
//! ```
//! The chunks of a layer blob are its metadata, cut every 256 KiB, then its data as [`place`](crate::place) planned it;
//! decompressed they are one EROFS image. Blobs are written to files without a name.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use sha2::Digest as _;
use ublkimg_image::zstd_frame::skippable;
use ublkimg_image::{
    BLOCK_SIZE, Bundle, ChunkIndex, ChunkIndexBuilder, MergeRecord, Sha256, SkippableKind, write_layer,
};
use ublkimg_registry::Digest;
use ublkimg_registry::erofs_manifest::{LayerOrigin, LayerRef};

use crate::error::{Error, Result};
use crate::frames::{Chunk, Compress, compress};
use crate::hashing::finish;
use crate::layer::Layer;
use crate::place::place;
use crate::spool::{PIECE_BYTES, Spool};
use crate::unnamed_file::{path_of, unnamed_file};

/// Bytes written to a blob's file at once.
const WRITE_BYTES: usize = 1 << 20;

/// A finished blob in a file without a name.
#[derive(Debug)]
pub(crate) struct Blob {
    file: File,
    pub(crate) digest: Sha256,
    pub(crate) size_bytes: u64,
    /// Digest of what it decompresses to.
    pub(crate) uncompressed_digest: Sha256,
    /// Where its last frame, a skippable one, is.
    pub(crate) trailer: Range<u64>,
}

impl Blob {
    /// A path under which this process can open the file, as often as it wants, while the blob lives.
    pub(crate) fn path(&self) -> PathBuf {
        path_of(&self.file)
    }

    /// What a manifest says of it, as a blob of chunks that ends with their index.
    pub(crate) fn reference(&self, index: &ChunkIndex, origin: Option<LayerOrigin>) -> LayerRef {
        LayerRef {
            digest: Digest(self.digest.0),
            size_bytes: self.size_bytes,
            index_range: self.trailer.clone(),
            index_digest: Digest(index.digest().0),
            uncompressed_digest: Digest(self.uncompressed_digest.0),
            origin,
        }
    }
}

/// A layer blob and what the image needs to know of it.
#[derive(Debug)]
pub(crate) struct LayerBlob {
    pub(crate) blob: Blob,
    pub(crate) index: ChunkIndex,
    /// The layer's metadata, as it is at the start of the decompressed blob.
    pub(crate) metadata: Vec<u8>,
    pub(crate) record: MergeRecord,
}

/// Writes the blob of a layer into a file without a name in `dir`. `advance` hears of the raw bytes and can
/// stop it.
///
/// # Errors
/// `BadSource` or `Unsupported` for what EROFS cannot hold, `DiskFull` or `Io` naming `dir`.
pub(crate) fn write_layer_blob(
    mut layer: Layer,
    spool: &Spool,
    dir: &Path,
    how: Compress,
    advance: &dyn Fn(u64) -> Result<()>,
) -> Result<LayerBlob> {
    let plan = place(&mut layer, spool)?;
    let metadata = write_layer(&layer.tree, plan.blocks).map_err(from_image)?;
    let metadata_blocks = u32::try_from(metadata.len() / BLOCK_SIZE).unwrap_or(u32::MAX);
    let record = MergeRecord { metadata_blocks, ..layer.record };
    // Memory for the tree is not needed while the data is compressed.
    drop((layer.tree, layer.files));

    let mut writer = BlobWriter::new(dir)?;
    writer.write(&skippable(SkippableKind::Ublkimg, &record.encode().map_err(from_image)?).map_err(from_image)?)?;
    let mut index = ChunkIndexBuilder::new(writer.len_bytes);
    let metadata_chunks = metadata.chunks(PIECE_BYTES).len();
    let read = |number: usize| match number.checked_sub(metadata_chunks) {
        None => Ok(piece(&metadata, number)),
        Some(number) => plan.read_chunk(number, spool),
    };
    let uncompressed_digest = compress(how, metadata_chunks + plan.chunks(), read, |frame| {
        let raw_len_bytes = frame.raw.len() as u64;
        index.push(frame.stored.len() as u64, raw_len_bytes, frame.id).map_err(from_image)?;
        advance(raw_len_bytes)?;
        writer.write(&frame.stored)
    })?;
    let index = index.finish();
    let trailer = skippable(SkippableKind::ChunkIndex, &index.encode()).map_err(from_image)?;
    let blob = writer.finish(&trailer, uncompressed_digest)?;
    Ok(LayerBlob { blob, index, metadata, record })
}

/// Writes the blob of a verity tree, which lies in `tree`, into a file without a name in `dir`: chunks and their index.
///
/// # Errors
/// As [`write_layer_blob`].
pub(crate) fn write_tree_blob(tree: &File, len_bytes: u64, dir: &Path, how: Compress) -> Result<(Blob, ChunkIndex)> {
    let piece_bytes = PIECE_BYTES as u64;
    let read = |number: usize| {
        let start = number as u64 * piece_bytes;
        let mut piece = vec![0; usize::try_from(piece_bytes.min(len_bytes - start)).unwrap_or(PIECE_BYTES)];
        tree.read_exact_at(&mut piece, start).map_err(|error| in_dir(dir, error))?;
        Ok(Chunk::Raw(piece))
    };
    let mut writer = BlobWriter::new(dir)?;
    let mut index = ChunkIndexBuilder::new(0);
    let count = usize::try_from(len_bytes.div_ceil(piece_bytes)).unwrap_or(usize::MAX);
    let uncompressed_digest = compress(how, count, read, |frame| {
        index.push(frame.stored.len() as u64, frame.raw.len() as u64, frame.id).map_err(from_image)?;
        writer.write(&frame.stored)
    })?;
    let index = index.finish();
    let trailer = skippable(SkippableKind::ChunkIndex, &index.encode()).map_err(from_image)?;
    Ok((writer.finish(&trailer, uncompressed_digest)?, index))
}

/// Writes the metadata blob into a file without a name in `dir`.
///
/// # Errors
/// As [`write_layer_blob`].
pub(crate) fn write_metadata_blob(metadata: &[u8], bundle: &Bundle, dir: &Path, how: Compress) -> Result<Blob> {
    let mut writer = BlobWriter::new(dir)?;
    let chunks = metadata.chunks(PIECE_BYTES).len();
    let uncompressed_digest =
        compress(how, chunks, |number| Ok(piece(metadata, number)), |frame| writer.write(&frame.stored))?;
    let trailer = skippable(SkippableKind::Ublkimg, &bundle.encode().map_err(from_image)?).map_err(from_image)?;
    writer.finish(&trailer, uncompressed_digest)
}

fn piece(metadata: &[u8], number: usize) -> Chunk {
    Chunk::Raw(metadata[number * PIECE_BYTES..metadata.len().min((number + 1) * PIECE_BYTES)].to_vec())
}

/// Writes and hashes.
pub(crate) struct BlobWriter<'a> {
    file: BufWriter<File>,
    dir: &'a Path,
    hasher: sha2::Sha256,
    len_bytes: u64,
}

impl<'a> BlobWriter<'a> {
    pub(crate) fn new(dir: &'a Path) -> Result<Self> {
        let file = unnamed_file(dir).map_err(|error| in_dir(dir, error))?;
        let file = BufWriter::with_capacity(WRITE_BYTES, file);
        Ok(Self { file, dir, hasher: sha2::Sha256::new(), len_bytes: 0 })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.len_bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|error| in_dir(self.dir, error))
    }

    pub(crate) fn finish(mut self, trailer: &[u8], uncompressed_digest: Sha256) -> Result<Blob> {
        let start = self.len_bytes;
        self.write(trailer)?;
        let file = self.file.into_inner().map_err(|error| in_dir(self.dir, error.into_error()))?;
        let trailer = start..self.len_bytes;
        Ok(Blob { file, digest: finish(self.hasher), size_bytes: self.len_bytes, uncompressed_digest, trailer })
    }
}

fn in_dir(dir: &Path, error: std::io::Error) -> Error {
    Error::io(format!("temporary directory {}", dir.display()), error)
}

/// What EROFS cannot hold came from the source.
#[expect(clippy::needless_pass_by_value, reason = "the form that map_err takes")]
pub(crate) fn from_image(error: ublkimg_image::Error) -> Error {
    let message = error.to_string();
    match error.kind() {
        ublkimg_image::ErrorKind::TooLarge | ublkimg_image::ErrorKind::Unsupported => Error::unsupported(message),
        _ => Error::bad_source(message),
    }
}

/// What is malformed in a converted image: it came to harm, or was never right.
#[expect(clippy::needless_pass_by_value, reason = "the form that map_err takes")]
pub(crate) fn from_stored(error: ublkimg_image::Error) -> Error {
    let message = error.to_string();
    match error.kind() {
        ublkimg_image::ErrorKind::Unsupported => Error::unsupported(message),
        _ => Error::damaged(message),
    }
}
