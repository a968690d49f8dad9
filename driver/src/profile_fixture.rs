//! For tests: a profile of an image, and both in a registry on loopback.

use std::collections::BTreeMap;

use ublkimg_image::trace::TracedBlock;
use ublkimg_image::{BLOCK_SIZE, HotFrame, HotTable, Sha256, Trace, TraceEntry, TraceHeader};
use ublkimg_registry::descriptor::{Descriptor, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST};
use ublkimg_registry::profile::{HotRef, MEDIA_TYPE_HOT, ProfileManifest, add_to_index};
use ublkimg_registry::{Digest, Location};
use ublkimg_tests::registry::TestRegistry;

use crate::fixture::{Image, index_of};
use crate::trace_file;

/// A profile of an image before it is pushed, to be spoilt by tests.
pub(crate) struct Start {
    pub(crate) trace: Trace,
    pub(crate) table: HotTable,
    pub(crate) hot: Vec<u8>,
}

impl Start {
    /// The manifest of the profile, for this image.
    pub(crate) fn manifest(&self, image: &Image) -> ProfileManifest {
        let hot = (!self.hot.is_empty()).then(|| HotRef {
            blob: Descriptor::of(MEDIA_TYPE_HOT, &self.hot),
            table: self.table.encode().unwrap().into(),
        });
        ProfileManifest {
            subject: Descriptor::of(MEDIA_TYPE_MANIFEST, &image.manifest.to_bytes()),
            command: Some(Digest(self.trace.command_digest().0)),
            name: Some("run".to_owned()),
            trace: ProfileManifest::describe_trace(&trace_file::to_stored(&self.trace).unwrap(), hot.is_some()),
            hot,
            annotations: BTreeMap::new(),
        }
    }
}

impl Image {
    /// A start that reads these blocks in this order, each a layer, its first block and a number of blocks, with 10 ms
    /// between. The first `packed` of the blocks are in its hot blob, `per_frame` to a frame.
    pub(crate) fn start(&self, reads: &[(u16, u32, u16)], packed: usize, per_frame: usize) -> Start {
        let entry = |&(blob, block, blocks): &(u16, u32, u16)| TraceEntry {
            blob,
            block,
            blocks,
            since_previous_us: 10_000,
            confidence: u8::MAX,
        };
        let header = TraceHeader {
            manifest: Sha256::of(&self.manifest.to_bytes()),
            command: vec!["run".to_owned()],
            read_ahead_kb: 0,
            runs: 1,
            ready_us: None,
            lost: 0,
            blobs: self.manifest.layers.iter().map(|layer| Sha256(layer.digest.0)).collect(),
        };
        let trace = Trace { header, entries: reads.iter().map(entry).collect() };
        let blocks: Vec<_> = trace.traced_blocks().take(packed).collect();
        let (mut table, mut hot) = (HotTable::default(), Vec::new());
        for blocks in blocks.chunks(per_frame) {
            let at =
                |block: &TracedBlock| (self.layer_starts[usize::from(block.blob)] + block.block) as usize * BLOCK_SIZE;
            let raw: Vec<u8> =
                blocks.iter().flat_map(|block| &self.device[at(block)..at(block) + BLOCK_SIZE]).copied().collect();
            let stored = zstd::bulk::compress(&raw, 1).unwrap();
            table.frames.push(HotFrame {
                stored_len_bytes: u32::try_from(stored.len()).unwrap(),
                blocks: u16::try_from(blocks.len()).unwrap(),
                digest: Sha256::of(&stored),
            });
            hot.extend(stored);
        }
        Start { trace, table, hot }
    }

    /// Serves everything under `tag` of `image`, with an index that lists the manifest and the default profile `start`.
    pub(crate) fn serve(&self, registry: &TestRegistry, tag: &str, start: Option<&Start>) -> Location {
        for blob in self.blobs.values() {
            registry.put_blob("image", blob.clone()).unwrap();
        }
        let manifest = self.manifest.to_bytes();
        registry.put_manifest("image", MEDIA_TYPE_MANIFEST, manifest.clone(), None).unwrap();
        let mut index = index_of(&manifest);
        if let Some(start) = start {
            registry.put_blob("image", trace_file::to_stored(&start.trace).unwrap()).unwrap();
            registry.put_blob("image", start.hot.clone()).unwrap();
            let profile = start.manifest(self);
            let profile = profile.to_bytes().unwrap();
            registry.put_manifest("image", MEDIA_TYPE_MANIFEST, profile.clone(), None).unwrap();
            index = add_to_index(&index, &profile, true).unwrap().to_vec();
        }
        registry.put_manifest("image", MEDIA_TYPE_INDEX, index, Some(tag)).unwrap();
        registry.reference("image", tag).parse().unwrap()
    }
}
