//! The dm-verity tree of an image: over its device as it is served, whose bytes are read back from where they went.
//!
//! So it does not matter whether a layer was converted now or found, and what was read back was compared with its digest.
//! The salt is the digest of the metadata image: the same image has the same tree.

use std::fs::File;
use std::io::{self, Seek as _, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use ublkimg_image::verity::{TREE_TAG, TreeHasher, TreeShape};
use ublkimg_image::{BLOCK_SIZE, BundledLayer, DeviceSlot, Sha256, Tree, write_merged};
use ublkimg_registry::erofs_manifest::{LayerRef, VerityRef};
use ublkimg_registry::{Digest, Repository};

use super::context::Context;
use super::finish::Merged;
use crate::background;
use crate::blob::{from_image, write_tree_blob};
use crate::error::{Error, Result};
use crate::export::{Flat, layers_end};
use crate::hashing::HashingReader;

/// A tree of digests in a file without a name.
pub(crate) struct HashTree {
    file: File,
    pub(crate) len_bytes: u64,
    pub(crate) root: Sha256,
}

impl HashTree {
    /// Digest of its bytes. May block.
    pub(crate) fn digest(&self) -> Result<Sha256> {
        let failed = |error| Error::io("reading the tree back", error);
        (&self.file).rewind().map_err(failed)?;
        let mut reader = HashingReader::new(&self.file);
        io::copy(&mut reader, &mut io::sink()).map_err(failed)?;
        Ok(reader.digest())
    }
}

/// The metadata image of merged layers with a slot for a verity tree, whose length follows from that of the rest.
pub(super) fn write_metadata(merged: &Tree, mut devices: Vec<DeviceSlot>) -> Result<Vec<u8>> {
    let layer_blocks: Vec<u32> = devices.iter().map(|device| device.blocks).collect();
    devices.push(DeviceSlot { blocks: 1, tag: TREE_TAG });
    // What the slot says does not change how long the metadata is.
    let metadata = write_merged(merged, &devices).map_err(from_image)?;
    let covered_blocks = layers_end(&metadata, &layer_blocks)?;
    if let Some(slot) = devices.last_mut() {
        slot.blocks = TreeShape::new(covered_blocks).total_blocks();
    }
    write_merged(merged, &devices).map_err(from_image)
}

/// Makes the tree over merged layers and pushes it.
pub(super) async fn make(
    context: &Arc<Context>,
    merged: &Merged,
    layers: &[LayerRef],
) -> Result<(VerityRef, BundledLayer)> {
    let (repository, tmpdir) = (&context.destination.repository, &context.options.tmpdir);
    let tree = read(repository, Arc::clone(&merged.metadata), &merged.bundle.layers, layers, tmpdir).await?;
    let root = Digest(tree.root.0);
    let (blob, index) = background::run({
        let context = Arc::clone(context);
        move || write_tree_blob(&tree.file, tree.len_bytes, &context.options.tmpdir, context.compress())
    })
    .await??;
    context.destination.push(&blob).await?;
    let reference = blob.reference(&index, None);
    let bundled = BundledLayer { digest: blob.digest, blob_len_bytes: blob.size_bytes, index };
    Ok((VerityRef { tree: reference, root }, bundled))
}

/// The tree over an image, the blobs of whose layers are in `repository`.
pub(crate) async fn read(
    repository: &Repository,
    metadata: Arc<[u8]>,
    bundled: &[BundledLayer],
    layers: &[LayerRef],
    tmpdir: &Path,
) -> Result<HashTree> {
    let salt = Sha256::of(&metadata);
    let blob_blocks: Vec<u32> = bundled.iter().map(|layer| layer.index.raw_len_blocks()).collect();
    let covered_blocks = layers_end(&metadata, &blob_blocks)?;
    let shape = TreeShape::new(covered_blocks);
    let failed = |error| Error::io(format!("temporary directory {}", tmpdir.display()), error);
    let file = tempfile::tempfile_in(tmpdir).map_err(failed)?;
    let writer = TreeWriter { hasher: TreeHasher::new(&shape, salt), file, block: Vec::with_capacity(BLOCK_SIZE) };
    let flat = Flat { metadata, file_system_blocks: covered_blocks };
    let TreeWriter { hasher, file, .. } = flat.write(repository, layers.iter().zip(bundled), writer).await?;
    let root = hasher.finish(&mut |place, block| put(&file, place, block)).map_err(failed)?;
    Ok(HashTree { file, len_bytes: u64::from(shape.total_blocks()) * BLOCK_SIZE as u64, root })
}

/// Takes the bytes of a device.
struct TreeWriter {
    hasher: TreeHasher,
    file: File,
    /// The block under way.
    block: Vec<u8>,
}

impl Write for TreeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(BLOCK_SIZE - self.block.len());
        self.block.extend_from_slice(&bytes[..len]);
        if self.block.len() == BLOCK_SIZE {
            self.hasher.push(&self.block, &mut |place, block| put(&self.file, place, block))?;
            self.block.clear();
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn put(tree: &File, place: u32, block: &[u8]) -> io::Result<()> {
    tree.write_all_at(block, u64::from(place) * BLOCK_SIZE as u64)
}
