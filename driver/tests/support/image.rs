//! A test image in a test registry that can hold its answers back, and a driver that has attached it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ublkimg_driver::{AttachOptions, Engine, ServedImage, Store, attach};
use ublkimg_registry::Digest;
use ublkimg_registry::descriptor::{Descriptor, Index, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Platform};
use ublkimg_registry::erofs_manifest::OS_FEATURE_EROFS;
use ublkimg_tests::registry::{Config, Fault, TestRegistry, Toxic};

use super::{BLOCK_LEN, wait_until};
use crate::fixture::{Image, LayerContent};

/// Small chunks, so that a small image has more of them than a device has tags.
pub(crate) const CHUNK_BLOCKS: u32 = 16;
pub(crate) const CHUNKS: u32 = 150;
const BLOBS: &str = "*/blobs/*";
const REPOSITORY: &str = "image";

/// The registry, and what the device must hold.
pub(crate) struct Origin {
    registry: TestRegistry,
    image: Image,
    content: Content,
}

/// Every byte of the device.
#[derive(Clone)]
pub(crate) struct Content(Arc<Vec<u8>>);

impl Content {
    pub(crate) fn blocks(&self) -> u32 {
        u32::try_from(self.0.len() / BLOCK_LEN).unwrap()
    }

    /// Compares what was read.
    pub(crate) fn check(&self, start_block: u32, bytes: &[u8]) {
        let start = start_block as usize * BLOCK_LEN;
        for (index, (read, right)) in bytes.chunks(BLOCK_LEN).zip(self.0[start..].chunks(BLOCK_LEN)).enumerate() {
            assert!(read == right, "block {} differs", start_block as usize + index);
        }
    }
}

impl Origin {
    pub(crate) fn start() -> Self {
        let image = Image::new(&[LayerContent::new(1, &vec![CHUNK_BLOCKS as usize; CHUNKS as usize])]);
        let registry = TestRegistry::start(Config::default()).unwrap();
        for blob in image.blobs.values() {
            registry.put_blob(REPOSITORY, blob.clone()).unwrap();
        }
        let manifest = image.manifest.to_bytes();
        let mut listed = Descriptor::new(MEDIA_TYPE_MANIFEST, Digest::of(&manifest), manifest.len() as u64);
        registry.put_manifest(REPOSITORY, MEDIA_TYPE_MANIFEST, manifest, None).unwrap();
        let mut platform = Platform::host();
        platform.os_features = vec![OS_FEATURE_EROFS.to_owned()];
        listed.platform = Some(platform);
        let media_type = Some(MEDIA_TYPE_INDEX.to_owned());
        let index = Index { schema_version: 2, media_type, manifests: vec![listed], annotations: Default::default() };
        let index = serde_json::to_vec(&index).unwrap();
        registry.put_manifest(REPOSITORY, MEDIA_TYPE_INDEX, index, Some("v1")).unwrap();
        let content = Content(Arc::new(image.device.clone()));
        Self { registry, image, content }
    }

    pub(crate) fn reference(&self) -> String {
        self.registry.reference(REPOSITORY, "v1")
    }

    pub(crate) fn content(&self) -> Content {
        self.content.clone()
    }

    /// First device block of a chunk; before chunk 0 there is the metadata, which is local.
    pub(crate) fn chunk_block(&self, chunk: u32) -> u32 {
        let end = self.content.blocks() - ublkimg_image::device_map::TAIL_BLOCKS;
        end - (CHUNKS - chunk) * CHUNK_BLOCKS
    }

    /// From now on no chunk arrives.
    pub(crate) fn hold(&self) {
        self.registry.set_fault("hold", Fault::new(BLOBS, Toxic::Hang));
    }

    pub(crate) fn release(&self) {
        self.registry.clear_fault("hold");
    }

    /// From now on every chunk takes its time.
    pub(crate) fn delay(&self, latency_ms: u64) {
        self.registry.set_fault("delay", Fault::new(BLOBS, Toxic::Latency { latency_ms }));
    }

    /// From now on this chunk arrives with a wrong bit.
    pub(crate) fn spoil(&self, chunk: u32) {
        let layer = &self.image.manifest.layers[0];
        let blob = &self.image.blobs[&layer.digest];
        let index = usize::try_from(layer.index_range.start).unwrap() + 8;
        let index = ublkimg_image::ChunkIndex::decode(&blob[index..], layer.index_range.start).unwrap();
        let offset_bytes = index.chunk(chunk).stored.start + 100;
        self.registry.set_fault("spoil", Fault::new(BLOBS, Toxic::BitFlip { offset_bytes }));
    }

    pub(crate) fn mend(&self) {
        self.registry.clear_fault("spoil");
    }
}

/// A driver, with the image.
pub(crate) struct Driver {
    pub(crate) image: Arc<ServedImage>,
    /// Dropped after the image: it fetches for it.
    _engine: Engine,
    _store: Arc<Store>,
}

impl Driver {
    pub(crate) fn attach(reference: &str, store: &Path) -> Self {
        let store = Arc::new(Store::open(store).unwrap());
        let engine = Engine::start(&store).unwrap();
        let location = reference.parse().unwrap();
        let options = AttachOptions::default();
        let attached = attach(&store, &engine, &location, &options);
        let image = engine.runtime().block_on(attached).unwrap().image;
        Self { image, _engine: engine, _store: store }
    }

    /// Requests that have had to wait since the image was attached.
    pub(crate) fn waits(&self) -> u64 {
        let statistics = self.image.statistics();
        statistics.misses + statistics.late_hits
    }

    pub(crate) fn wait_for(&self, waits: u64) {
        wait_until("requests that wait", Duration::from_secs(20), || self.waits() >= waits);
    }
}
