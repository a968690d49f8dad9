//! A layer blob and the source layer that it should be of.

use std::collections::HashMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use ublkimg_image::{BLOCK_SIZE, FileData, FileLayout, Kind, NodeId, Sha256, Tree};
use ublkimg_registry::ClientOptions;

use super::blob::CheckedBlob;
use super::tree;
use crate::background;
use crate::chunk_size::ChunkSize;
use crate::error::{Error, Result};
use crate::frames::Compress;
use crate::read_layer::read_layer;
use crate::source::{self, Platforms, Source, SourceLayer};
use crate::spool::{Content, ContentId, PIECE_BYTES, Spool};
use crate::stored_image::StoredImage;

/// The layers of the source, as many as the image has; its config must be the image's but for what describes the layers.
///
/// # Errors
/// `VerificationFailed` when it cannot be the source of the image; those of [`source::open`].
pub(super) async fn open(
    source: &Source,
    client: &ClientOptions,
    platforms: &Platforms,
    image: &StoredImage,
    config: &[u8],
) -> Result<Vec<SourceLayer>> {
    let original = source::open(source, client, platforms).await?.into_iter().next();
    let original = original.ok_or_else(|| Error::damaged(format!("{source}: no such image")))?;
    let (have, want) = (image.manifest.layers.len(), original.layers.len());
    if have != want {
        return Err(Error::damaged(format!("{have} layers, but {source} has {want}")));
    }
    let layers = image.manifest.devices().map(|layer| layer.uncompressed_digest);
    let listed: Vec<Sha256> =
        layers.chain([image.manifest.metadata.uncompressed_digest]).map(|digest| Sha256(digest.0)).collect();
    if original.config.converted(&listed, image.manifest.verity.is_some()) != config {
        return Err(Error::damaged(format!("its config is not that of {source}")));
    }
    Ok(original.layers)
}

/// Reads a source layer and compares it with its blob. Returns the number of names.
///
/// # Errors
/// `VerificationFailed` naming the first object that differs; those of reading the layer.
pub(super) async fn compare(layer: SourceLayer, found: Tree, blob: CheckedBlob, tmpdir: PathBuf) -> Result<u64> {
    let input = layer.open().await?;
    background::run(move || {
        let mut spool = Spool::new(&tmpdir, ChunkSize::MAX, TO_COMPARE)?;
        let read = read_layer(input, &layer, &mut spool, &|_| Ok(()))?;
        let raw = blob.raw.as_ref().ok_or_else(|| Error::damaged("its raw stream was not kept"))?;
        let blob_data = BlobData { raw, data_start: u64::from(blob.record.metadata_blocks), dir: &tmpdir };
        let same = |node, _: &FileData, _, data: &FileData| match read.tree.files.get(&node) {
            Some(id) => blob_data.is(data, spool.content(*id), &spool),
            None => Ok(data.size_bytes == 0),
        };
        let record = &read.tree.record;
        if (&record.implied_directories, &record.lower_links, &record.plain_devices)
            != (&blob.record.implied_directories, &blob.record.lower_links, &blob.record.plain_devices)
        {
            return Err(Error::damaged("its merge record is not that of the source layer"));
        }
        tree::compare(&with_sizes(read.tree.tree, &read.tree.files, &spool), &found, same)
    })
    .await?
}

/// What is read once and thrown away is compressed a little.
const TO_COMPARE: Compress = Compress { level: 1, threads: NonZeroUsize::MIN };

/// The tree of a source layer has no sizes yet.
fn with_sizes(mut tree: Tree, files: &HashMap<NodeId, ContentId>, spool: &Spool) -> Tree {
    for (node, id) in files {
        let data = FileData { size_bytes: spool.content(*id).size_bytes, ..FileData::EMPTY };
        tree.node_mut(*node).kind = Kind::File(data);
    }
    tree
}

/// The data of a layer blob.
struct BlobData<'a> {
    raw: &'a File,
    /// First block of the data in the raw stream.
    data_start: u64,
    dir: &'a Path,
}

impl BlobData<'_> {
    /// Whether the file has this content, which has the same size.
    fn is(&self, data: &FileData, content: &Content, spool: &Spool) -> Result<bool> {
        let mut stored = content.stored.iter().peekable();
        let (mut want, mut have) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
        for piece in 0..content.pieces() {
            let piece = u32::try_from(piece).map_err(|_| Error::unsupported("a file of more than 1 PiB"))?;
            let len = usize::try_from(content.piece_len_bytes(piece)).unwrap_or(PIECE_BYTES);
            let (want, have) = (&mut want[..len], &mut have[..len]);
            match stored.next_if(|stored| stored.piece == piece) {
                Some(stored) => spool.read(want, stored.at)?,
                None => want.fill(0),
            }
            self.read(data, u64::from(piece) * PIECE_BYTES as u64, have)?;
            if want != have {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Bytes of the file from `offset_bytes`, a multiple of the block size.
    fn read(&self, data: &FileData, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        for (part, offset_bytes) in buffer.chunks_mut(BLOCK_SIZE).zip((offset_bytes..).step_by(BLOCK_SIZE)) {
            match block_of(data, offset_bytes / BLOCK_SIZE as u64) {
                Some(block) => {
                    let at = (self.data_start + block) * BLOCK_SIZE as u64;
                    self.raw.read_exact_at(part, at).map_err(|error| {
                        Error::io(format!("reading back from temporary directory {}", self.dir.display()), error)
                    })?;
                }
                None => part.fill(0),
            }
        }
        Ok(())
    }
}

/// Where a block of a file is among the data; `None` in a hole.
fn block_of(data: &FileData, block: u64) -> Option<u64> {
    match &data.layout {
        FileLayout::Contiguous(first) => Some(u64::from(first.block) + block),
        FileLayout::Chunked { chunk_blocks_log2, blocks } => {
            let chunk = usize::try_from(block >> chunk_blocks_log2).ok()?;
            let first = (*blocks.get(chunk)?)?;
            Some(u64::from(first.block) + (block & ((1 << chunk_blocks_log2) - 1)))
        }
    }
}
