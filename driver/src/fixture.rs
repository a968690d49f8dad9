//! For tests: an ublkimg image in an OCI layout directory, and the device that it should become.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use ublkimg_image::zstd_frame::{SKIPPABLE_HEADER_BYTES, skippable};
use ublkimg_image::{
    BLOCK_SIZE, Bundle, BundledLayer, ChunkId, ChunkIndexBuilder, DeviceMap, DeviceSlot, MergeRecord, Meta, Sha256,
    SkippableKind, Time, Tree, flat_block0, write_merged,
};
use ublkimg_registry::descriptor::{
    Descriptor, Index, MEDIA_TYPE_CONFIG, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Platform,
};
use ublkimg_registry::erofs_manifest::{ErofsManifest, LayerRef, MetadataRef, OS_FEATURE_EROFS};
use ublkimg_registry::{BlobSource, ClientOptions, Digest, Location, Repository};

use crate::image::{Plan, Readiness, ServedImage};

/// Raw bytes of a layer blob, cut into chunks of these lengths; any bytes do, a device does not look into them.
pub(crate) struct LayerContent {
    pub(crate) raw: Vec<u8>,
    pub(crate) chunk_blocks: Vec<usize>,
}

impl LayerContent {
    /// Blocks of chunks of different lengths, filled from a seed.
    pub(crate) fn new(seed: u64, chunk_blocks: &[usize]) -> Self {
        let len_bytes = chunk_blocks.iter().sum::<usize>() * BLOCK_SIZE;
        let mut state = seed;
        let mut word = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33).to_le_bytes()
        };
        let raw = (0..len_bytes / 8).flat_map(|_| word()).collect();
        Self { raw, chunk_blocks: chunk_blocks.to_vec() }
    }

    /// Chunks one after another, each of whole blocks.
    pub(crate) fn of_chunks(chunks: &[&[u8]]) -> Self {
        let chunk_blocks = chunks.iter().map(|chunk| chunk.len() / BLOCK_SIZE).collect();
        Self { raw: chunks.concat(), chunk_blocks }
    }

    /// The bytes of each chunk.
    pub(crate) fn chunks(&self) -> Vec<&[u8]> {
        let mut rest = &self.raw[..];
        let mut next = |blocks: &usize| {
            let (chunk, others) = rest.split_at(blocks * BLOCK_SIZE);
            rest = others;
            chunk
        };
        self.chunk_blocks.iter().map(&mut next).collect()
    }

    fn frames(&self) -> Vec<Frame> {
        self.chunks().into_iter().map(Frame::new).collect()
    }
}

/// An image before it is pushed, to be spoilt by tests.
pub(crate) struct Image {
    pub(crate) manifest: ErofsManifest,
    pub(crate) blobs: BTreeMap<Digest, Vec<u8>>,
    /// Every byte of the device.
    pub(crate) device: Vec<u8>,
    /// Where each layer begins there, in blocks.
    pub(crate) layer_starts: Vec<u32>,
}

/// A stored frame and what a chunk index says of it.
pub(crate) struct Frame {
    pub(crate) stored: Vec<u8>,
    pub(crate) raw_len_bytes: u64,
    pub(crate) name: Sha256,
}

impl Frame {
    pub(crate) fn new(raw: &[u8]) -> Self {
        let stored = zstd::bulk::compress(raw, 1).unwrap();
        Self { name: Sha256::of(&stored), stored, raw_len_bytes: raw.len() as u64 }
    }
}

/// A layer blob and what the bundle says of it.
pub(crate) fn layer_blob(content: &LayerContent) -> (Vec<u8>, BundledLayer) {
    blob_of_frames(&content.frames())
}

fn blob_of_frames(frames: &[Frame]) -> (Vec<u8>, BundledLayer) {
    let record = MergeRecord { metadata_blocks: 1, ..MergeRecord::default() };
    let mut blob = skippable(SkippableKind::Ublkimg, &record.encode().unwrap()).unwrap();
    let mut index = ChunkIndexBuilder::new(blob.len() as u64);
    for frame in frames {
        index.push(frame.stored.len() as u64, frame.raw_len_bytes, ChunkId(frame.name)).unwrap();
        blob.extend(&frame.stored);
    }
    let index = index.finish();
    blob.extend(skippable(SkippableKind::ChunkIndex, &index.encode()).unwrap());
    let bundled = BundledLayer { digest: Sha256::of(&blob), blob_len_bytes: blob.len() as u64, index };
    (blob, bundled)
}

fn layer_ref(bundled: &BundledLayer, content: &LayerContent) -> LayerRef {
    LayerRef {
        digest: Digest(bundled.digest.0),
        size_bytes: bundled.blob_len_bytes,
        index_range: bundled.index.section_offset_bytes()..bundled.blob_len_bytes,
        index_digest: Digest(bundled.index.digest().0),
        uncompressed_digest: Digest::of(&content.raw),
        origin: None,
    }
}

impl Image {
    pub(crate) fn new(layers: &[LayerContent]) -> Self {
        Self::of_blobs(layers, layers.iter().map(layer_blob).collect())
    }

    /// An image whose layer blobs have these bytes and the names of another image's.
    pub(crate) fn forged(layers: &[LayerContent], victim: &Self) -> Self {
        let mut built: Vec<_> = layers.iter().map(layer_blob).collect();
        for ((_, bundled), layer) in built.iter_mut().zip(&victim.manifest.layers) {
            bundled.digest = Sha256(layer.digest.0);
        }
        Self::of_blobs(layers, built)
    }

    /// An image of one layer with these frames, true or not, that claims to be `content`.
    pub(crate) fn of_frames(content: LayerContent, frames: &[Frame]) -> Self {
        Self::of_blobs(&[content], vec![blob_of_frames(frames)])
    }

    fn of_blobs(layers: &[LayerContent], built: Vec<(Vec<u8>, BundledLayer)>) -> Self {
        let slot = |bundled: &BundledLayer| DeviceSlot { blocks: bundled.index.raw_len_blocks(), tag: bundled.digest };
        let slots: Vec<DeviceSlot> = built.iter().map(|(_, bundled)| slot(bundled)).collect();
        let time = Time { seconds: 1, nanoseconds: 2 };
        let tree = Tree::new(Meta { mode: 0o755, uid: 0, gid: 0, mtime: time, xattrs: BTreeMap::new() });
        let mut metadata = write_merged(&tree, &slots).unwrap();
        let bundle = Bundle { layers: built.iter().map(|(_, bundled)| bundled.clone()).collect() };
        let mut blob = zstd::bulk::compress(&metadata, 1).unwrap();
        let bundle_start = blob.len() as u64;
        blob.extend(skippable(SkippableKind::Ublkimg, &bundle.encode().unwrap()).unwrap());
        let reference = MetadataRef {
            digest: Digest::of(&blob),
            size_bytes: blob.len() as u64,
            bundle_range: bundle_start..blob.len() as u64,
            uncompressed_digest: Digest::of(&metadata),
        };
        let manifest = ErofsManifest {
            config: Descriptor::new(MEDIA_TYPE_CONFIG, Digest::of(b"{}"), 2),
            layers: built.iter().zip(layers).map(|((_, bundled), content)| layer_ref(bundled, content)).collect(),
            verity: None,
            metadata: reference,
            annotations: BTreeMap::new(),
        };
        let blob_blocks: Vec<u32> = slots.iter().map(|slot| slot.blocks).collect();
        let map = DeviceMap::new(u32::try_from(metadata.len() / BLOCK_SIZE).unwrap(), &blob_blocks).unwrap();
        let block0 = metadata.first_chunk_mut::<BLOCK_SIZE>().unwrap();
        *block0 = flat_block0(block0, map.total_blocks()).unwrap();
        let layer_starts = (0..).zip(layers).map(|(index, _)| map.blob_start(index)).collect();
        let mut device = metadata;
        layers.iter().for_each(|layer| device.extend(&layer.raw));
        device.resize(map.total_blocks() as usize * BLOCK_SIZE, 0);
        let named = |blob: Vec<u8>| (Digest::of(&blob), blob);
        let layer_blobs = built.into_iter().map(|(blob, bundled)| (Digest(bundled.digest.0), blob));
        let blobs = layer_blobs.chain([blob, b"{}".to_vec()].map(named)).collect();
        Self { manifest, blobs, device, layer_starts }
    }

    /// Replaces the payload of the metadata blob's bundle, and all digests above it.
    pub(crate) fn rebundle(&mut self, change: impl FnOnce(&mut Bundle)) {
        let reference = &mut self.manifest.metadata;
        let blob = &self.blobs[&reference.digest];
        let start = usize::try_from(reference.bundle_range.start).unwrap();
        let mut bundle = Bundle::decode(&blob[start + SKIPPABLE_HEADER_BYTES..]).unwrap();
        change(&mut bundle);
        let mut blob = blob[..start].to_vec();
        blob.extend(skippable(SkippableKind::Ublkimg, &bundle.encode().unwrap()).unwrap());
        reference.digest = Digest::of(&blob);
        reference.size_bytes = blob.len() as u64;
        reference.bundle_range.end = blob.len() as u64;
        self.blobs.insert(reference.digest, blob);
    }

    /// Pushes everything under `tag`, with an index that lists the manifest.
    pub(crate) async fn push(&self, dir: &Path, tag: &str) -> Location {
        let location = Location::Layout { dir: dir.to_owned(), tag: Some(tag.to_owned()) };
        let repository = Repository::open(&location, &ClientOptions::default()).await.unwrap();
        for (digest, blob) in &self.blobs {
            if Digest::of(blob) != *digest {
                // Nobody takes a forged blob. Its own registry has it.
                let path = blob_path(dir, *digest);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, blob).unwrap();
                continue;
            }
            let source = BlobSource::Bytes(Bytes::from(blob.clone()));
            repository.push_blob(digest, blob.len() as u64, source, None).await.unwrap();
        }
        let bytes = self.manifest.to_bytes();
        let index = index_of(&bytes);
        repository.push_manifest(MEDIA_TYPE_MANIFEST, bytes.into(), None).await.unwrap();
        repository.push_manifest(MEDIA_TYPE_INDEX, index.into(), Some(tag)).await.unwrap();
        location
    }
}

/// An index that lists this manifest for this machine.
pub(crate) fn index_of(manifest: &[u8]) -> Vec<u8> {
    let mut listed = Descriptor::of(MEDIA_TYPE_MANIFEST, manifest);
    let mut platform = Platform::host();
    platform.os_features = vec![OS_FEATURE_EROFS.to_owned()];
    listed.platform = Some(platform);
    let media_type = Some(MEDIA_TYPE_INDEX.to_owned());
    let index = Index { schema_version: 2, media_type, manifests: vec![listed], annotations: BTreeMap::new() };
    serde_json::to_vec(&index).unwrap()
}

/// The file of a blob in a layout directory.
pub(crate) fn blob_path(dir: &Path, digest: Digest) -> PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

/// How often a device plans one request.
pub(crate) const PLANS_PER_REQUEST_MAX: u32 = 16;

/// Reads blocks as a device does.
pub(crate) fn read(image: &Arc<ServedImage>, start_block: u32, len_blocks: u32) -> Result<Vec<u8>, i32> {
    let mut plan = Plan::new();
    let mut first = image.begin(start_block, len_blocks);
    let mut plans = 0;
    loop {
        while image.plan(start_block, len_blocks, &mut plan) == Readiness::Missing {
            plans += 1;
            let (woken, wakes) = crossbeam::channel::bounded(1);
            image.demand(&plan, image.wait(&mut first), Box::new(move |outcome| woken.send(outcome).unwrap()));
            let outcome = wakes.recv().expect("the waiter is called");
            let may_go_on = if plans > PLANS_PER_REQUEST_MAX { Err(libc::EIO) } else { outcome };
            if let Err(errno) = may_go_on {
                image.answered(&first, Err(errno));
                return Err(errno);
            }
        }
        match fill(image, &plan) {
            Ok(bytes) if image.was_there(&plan) => {
                image.answered(&first, Ok(len_blocks * 4096));
                return Ok(bytes);
            }
            Ok(_) => {}
            Err((file, offset_bytes, len_bytes)) => assert!(image.cannot_read(file, offset_bytes, len_bytes)),
        }
    }
}

/// What a plan says, or the piece that cannot be read.
fn fill(image: &Arc<ServedImage>, plan: &Plan) -> Result<Vec<u8>, (u16, u64, u32)> {
    use std::os::unix::fs::FileExt as _;

    use crate::image::Piece;

    let mut bytes = Vec::new();
    for piece in plan.pieces() {
        let start = bytes.len();
        match *piece {
            Piece::Zero { len_bytes } => bytes.resize(start + len_bytes as usize, 0),
            Piece::File { file, offset_bytes, len_bytes } => {
                bytes.resize(start + len_bytes as usize, 0xEE);
                let read = image.files()[usize::from(file)].read_exact_at(&mut bytes[start..], offset_bytes);
                read.map_err(|_| (file, offset_bytes, len_bytes))?;
            }
        }
    }
    Ok(bytes)
}
