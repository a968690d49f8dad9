//! From a metadata blob to open files: everything is checked against what names it before it is used.

use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use ublkimg_image::verity::{TREE_TAG, TreeShape};
use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{
    BLOCK_SIZE, Bundle, BundledLayer, ChunkIndex, DeviceMap, Geometry, Sha256, SkippableKind, flat_block0,
    read_geometry,
};
use ublkimg_registry::Digest;
use ublkimg_registry::erofs_manifest::{ErofsManifest, LayerRef};
use ublkimg_scheduler::ChunkEntry;

use crate::engine::entries;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{KEPT_BYTES_PER_CHUNK, METADATA_RAW_BYTES_MAX, Share};
use crate::store::{BlobFile, Store};

/// Bytes of a stored metadata image that are compared at a time.
const COMPARE_BYTES: usize = 1 << 20;

/// A checked image: its metadata open, its chunk indexes known.
#[derive(Debug)]
pub(super) struct CheckedImage {
    metadata: std::fs::File,
    map: DeviceMap,
    /// Those of the device table.
    blobs: Vec<BundledLayer>,
    kept: Share,
}

/// A checked image with all its files open.
pub(super) struct Prepared {
    pub(super) metadata: std::fs::File,
    pub(super) map: DeviceMap,
    pub(super) blobs: Vec<PreparedBlob>,
    /// The memory of their indexes.
    pub(super) kept: Share,
}

/// A layer blob.
pub(super) struct PreparedBlob {
    pub(super) file: Arc<BlobFile>,
    pub(super) index: Arc<ChunkIndex>,
    pub(super) entries: Vec<ChunkEntry>,
}

/// What became of a metadata image that was compared with its blob.
pub(super) enum Compared {
    Right,
    Mended,
}

/// What a metadata blob says.
struct Decoded {
    /// As it is served.
    metadata: Vec<u8>,
    map: DeviceMap,
    bundle: Bundle,
}

impl Decoded {
    /// `blob` is the metadata blob, which has the digest that the manifest names. There is room in memory for
    /// [`raw_len_bytes`] of it.
    fn new(manifest: &ErofsManifest, blob: &[u8]) -> Result<Self> {
        let digest = manifest.metadata.digest;
        let corrupt = |why: &str| Error::new(ErrorKind::Corrupt, format!("metadata blob {digest}: {why}"));
        let frames = part(blob, 0..manifest.metadata.bundle_range.start).ok_or_else(|| corrupt("too short"))?;
        let bundle = part(blob, manifest.metadata.bundle_range.clone()).ok_or_else(|| corrupt("too short"))?;
        let bundle = skippable_payload(SkippableKind::Ublkimg, bundle).and_then(Bundle::decode);
        let bundle = bundle.map_err(|error| bad_format(digest, error))?;
        check_bundle(&bundle, manifest)?;
        let mut metadata = decode_metadata(frames).map_err(|error| {
            Error::caused(ErrorKind::Corrupt, format!("metadata blob {digest} does not decode"), error)
        })?;
        let geometry = read_geometry(&metadata).map_err(|error| bad_format(digest, error))?;
        check_geometry(&geometry, &bundle, manifest)?;
        let blob_blocks: Vec<u32> = geometry.devices.iter().map(|device| device.blocks).collect();
        let map = DeviceMap::new(geometry.metadata_blocks, &blob_blocks);
        let map = map.map_err(|error| bad_format(digest, error))?;
        let block0 = metadata.first_chunk_mut::<BLOCK_SIZE>().ok_or_else(|| corrupt("empty"))?;
        let blocks = file_system_blocks(&map, &bundle, manifest)?;
        *block0 = flat_block0(block0, blocks).map_err(|error| bad_format(digest, error))?;
        Ok(Self { metadata, map, bundle })
    }
}

impl CheckedImage {
    /// As [`Decoded::new`].
    pub(super) fn new(store: &Store, manifest: &ErofsManifest, blob: &[u8]) -> Result<Self> {
        let Decoded { metadata, map, bundle } = Decoded::new(manifest, blob)?;
        let kept = room_for(store, &bundle)?;
        let metadata = open_metadata(store, Sha256(manifest.metadata.digest.0), &metadata)?;
        Ok(Self { metadata, map, blobs: bundle.layers, kept })
    }

    /// Opens the blob files. For the owner of the store.
    pub(super) fn open(self, store: &Store, manifest: &ErofsManifest) -> Result<Prepared> {
        let blobs = self.blobs.into_iter().zip(manifest.devices());
        let blobs = blobs.map(|(bundled, layer)| PreparedBlob::open(store, bundled, layer)).collect::<Result<_>>()?;
        Ok(Prepared { metadata: self.metadata, map: self.map, blobs, kept: self.kept })
    }
}

impl PreparedBlob {
    fn open(store: &Store, bundled: BundledLayer, layer: &LayerRef) -> Result<Self> {
        let index = bundled.index;
        let file = store.blob(Sha256(layer.index_digest.0), index.raw_len_blocks())?;
        let entries = entries(&file, &index);
        Ok(Self { file, index: Arc::new(index), entries })
    }
}

/// The bundle must be about the blobs that the manifest lists, and each index the one that the manifest vouches for.
fn check_bundle(bundle: &Bundle, manifest: &ErofsManifest) -> Result<()> {
    let (have, want) = (bundle.layers.len(), manifest.devices().count());
    if have != want {
        let what = format!("the bundle has {have} layers, the manifest {want}");
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    for (bundled, layer) in bundle.layers.iter().zip(manifest.devices()) {
        let index_start = bundled.index.section_offset_bytes();
        let same = bundled.digest.0 == layer.digest.0
            && bundled.blob_len_bytes == layer.size_bytes
            && (index_start..layer.size_bytes) == layer.index_range
            && bundled.index.digest().0 == layer.index_digest.0;
        if !same {
            let what = format!("the bundle and the manifest differ about layer blob {}", layer.digest);
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
    }
    Ok(())
}

/// The device table must be about the same blobs with the same lengths.
fn check_geometry(geometry: &Geometry, bundle: &Bundle, manifest: &ErofsManifest) -> Result<()> {
    let devices = geometry.devices.iter().map(|device| (device.tag, device.blocks));
    let layers = manifest.layers.iter().map(|layer| Sha256(layer.digest.0));
    let tags = layers.chain(manifest.verity.as_ref().map(|_| TREE_TAG));
    if devices.eq(tags.zip(bundle.layers.iter().map(|layer| layer.index.raw_len_blocks()))) {
        return Ok(());
    }
    let digest = manifest.metadata.digest;
    let what = format!("metadata blob {digest}: its device table does not fit the layer blobs");
    Err(Error::new(ErrorKind::Corrupt, what))
}

/// Length of the file system: all of the device, or all that a verity tree is over.
fn file_system_blocks(map: &DeviceMap, bundle: &Bundle, manifest: &ErofsManifest) -> Result<u32> {
    let Some(tree) = bundle.layers.get(manifest.layers.len()) else { return Ok(map.total_blocks()) };
    let covered_blocks = map.end_of(manifest.layers.len());
    let (have, want) = (tree.index.raw_len_blocks(), TreeShape::new(covered_blocks).total_blocks());
    if have == want {
        return Ok(covered_blocks);
    }
    let what = format!("verity tree {}: {have} blocks, one over this device has {want}", tree.digest);
    Err(Error::new(ErrorKind::Corrupt, what))
}

/// Length of the metadata image that a blob decodes to, as its frames say; the most it may have where they do not.
pub(super) fn raw_len_bytes(manifest: &ErofsManifest, blob: &[u8]) -> u64 {
    let frames = part(blob, 0..manifest.metadata.bundle_range.start).unwrap_or_default();
    stated_len_bytes(frames).unwrap_or(METADATA_RAW_BYTES_MAX).min(METADATA_RAW_BYTES_MAX)
}

/// The sum of what all frames say of themselves.
fn stated_len_bytes(mut frames: &[u8]) -> Option<u64> {
    let mut len_bytes = 0_u64;
    while !frames.is_empty() {
        len_bytes = len_bytes.checked_add(zstd::zstd_safe::get_frame_content_size(frames).ok()??)?;
        frames = frames.get(zstd::zstd_safe::find_frame_compressed_size(frames).ok()?..)?;
    }
    Some(len_bytes)
}

/// The share of memory for what an attached image keeps of its indexes.
fn room_for(store: &Store, bundle: &Bundle) -> Result<Share> {
    let chunks: u64 = bundle.layers.iter().map(|layer| u64::from(layer.index.len())).sum();
    store.memory().kept.try_take(chunks * KEPT_BYTES_PER_CHUNK).ok_or_else(|| {
        let what = format!("no memory is left for an image of {chunks} chunks beside those attached: remove one first");
        Error::new(ErrorKind::Busy, what)
    })
}

fn decode_metadata(frames: &[u8]) -> std::io::Result<Vec<u8>> {
    // A decoder that finds more or less in a frame than it says of itself refuses it.
    let len_bytes = stated_len_bytes(frames).unwrap_or(METADATA_RAW_BYTES_MAX).min(METADATA_RAW_BYTES_MAX);
    let mut metadata = Vec::with_capacity(usize::try_from(len_bytes).unwrap_or(0));
    let decoder = zstd::stream::read::Decoder::with_buffer(frames)?;
    decoder.take(len_bytes + 1).read_to_end(&mut metadata)?;
    if metadata.len() as u64 > len_bytes {
        return Err(std::io::Error::other(format!("longer than {len_bytes} bytes")));
    }
    Ok(metadata)
}

/// The metadata image as a file: what is there already, if it is `image` byte for byte, or `image` written now. The
/// file's name vouches for the blob that it was made from, not for what lies in it.
fn open_metadata(store: &Store, blob: Sha256, image: &[u8]) -> Result<std::fs::File> {
    if let Some(file) = store.metadata(blob)?
        && holds(&file, image)
    {
        return Ok(file);
    }
    store.put_metadata(blob, image)?;
    let gone = || Error::new(ErrorKind::Internal, format!("metadata image {blob} vanished from the store"));
    store.metadata(blob)?.ok_or_else(gone)
}

/// Looks whether the metadata image that is served is what its blob says, and writes it over the one that is there if not,
/// which a device has open. None if the store lacks one of them.
pub(super) fn mend_metadata(store: &Store, manifest: &ErofsManifest) -> Result<Option<Compared>> {
    let digest = Sha256(manifest.metadata.digest.0);
    let no_memory = || Error::new(ErrorKind::Busy, format!("no memory is left to check metadata image {digest}"));
    let _stored = store.memory().stored.try_take(manifest.metadata.size_bytes).ok_or_else(no_memory)?;
    let (Some(blob), Some(file)) = (store.object(digest)?, store.metadata(digest)?) else { return Ok(None) };
    let _raw = store.memory().raw.try_take(raw_len_bytes(manifest, &blob)).ok_or_else(no_memory)?;
    let image = Decoded::new(manifest, &blob)?.metadata;
    if holds(&file, &image) {
        return Ok(Some(Compared::Right));
    }
    store.overwrite_metadata(digest, &image)?;
    Ok(Some(Compared::Mended))
}

fn holds(file: &std::fs::File, image: &[u8]) -> bool {
    let mut part = vec![0; COMPARE_BYTES];
    let same_len = file.metadata().is_ok_and(|metadata| metadata.len() == image.len() as u64);
    let mut offset_bytes = 0;
    same_len
        && image.chunks(COMPARE_BYTES).all(|expected| {
            let part = &mut part[..expected.len()];
            let read = file.read_exact_at(part, offset_bytes);
            offset_bytes += expected.len() as u64;
            read.is_ok() && part == expected
        })
}

fn part(bytes: &[u8], range: Range<u64>) -> Option<&[u8]> {
    bytes.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

fn bad_format(digest: Digest, error: ublkimg_image::Error) -> Error {
    let kind = match error.kind() {
        ublkimg_image::ErrorKind::Unsupported => ErrorKind::NotOurs,
        _ => ErrorKind::Corrupt,
    };
    Error::caused(kind, format!("metadata blob {digest}"), error)
}
