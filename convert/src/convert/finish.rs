//! What binds the layers of an image together: the metadata blob, the config, the manifest.

use std::sync::Arc;

use ublkimg_image::{Bundle, BundledLayer, DeviceSlot, MergeRecord, Sha256, read_tree, write_merged};
use ublkimg_registry::descriptor::{Descriptor, MEDIA_TYPE_CONFIG, MEDIA_TYPE_MANIFEST, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, LayerRef, MetadataRef, OS_FEATURE_EROFS};
use ublkimg_registry::{BlobSource, Digest};

use super::context::Context;
use super::{FinishedLayer, ImageSummary, LayerSummary, verity};
use crate::background;
use crate::blob::{from_image, write_metadata_blob};
use crate::config::Config;
use crate::converted_layer::ConvertedLayer;
use crate::error::{Error, Result};
use crate::merge::Merge;
use crate::progress::{Phase, Task};

/// Merges the layers and pushes what makes an image of them. Returns how an index lists it.
pub(super) async fn finish(
    context: &Arc<Context>,
    config: Config,
    platform: Platform,
    finished: Vec<FinishedLayer>,
) -> Result<(Descriptor, ImageSummary)> {
    let (layers, converted): (Vec<LayerSummary>, Vec<ConvertedLayer>) =
        finished.into_iter().map(|finished| (finished.summary, finished.layer)).unzip();
    let task = Task { phase: Phase::Finish, layer: None, layers: layers.len() };
    context.progress.start(&task, None);
    let (mut merged, references) = background::run({
        let context = Arc::clone(context);
        move || merge_layers(&context, converted)
    })
    .await??;
    let metadata_raw_bytes = merged.metadata.len() as u64;
    let mut verity = None;
    if context.options.verity {
        let (tree, bundled) = verity::make(context, &merged, &references).await?;
        merged.bundle.layers.push(bundled);
        verity = Some(tree);
    }
    let blob = background::run({
        let context = Arc::clone(context);
        move || write_metadata_blob(&merged.metadata, &merged.bundle, &context.options.tmpdir, context.compress())
    })
    .await??;
    context.destination.push(&blob).await?;

    let repository = &context.destination.repository;
    let devices = references.iter().chain(verity.iter().map(|verity| &verity.tree));
    let digests = devices.map(|blob| Sha256(blob.uncompressed_digest.0)).chain([blob.uncompressed_digest]);
    let config = config.converted(&digests.collect::<Vec<_>>(), verity.is_some());
    let config_descriptor = Descriptor::of(MEDIA_TYPE_CONFIG, &config);
    let config_size = config_descriptor.size;
    let source = BlobSource::Bytes(config.into());
    repository.push_blob(&config_descriptor.digest, config_size, source, None).await?;

    let manifest = ErofsManifest {
        config: config_descriptor,
        layers: references,
        verity,
        metadata: MetadataRef {
            digest: Digest(blob.digest.0),
            size_bytes: blob.size_bytes,
            bundle_range: blob.trailer.clone(),
            uncompressed_digest: Digest(blob.uncompressed_digest.0),
        },
        annotations: std::collections::BTreeMap::new(),
    };
    let manifest = manifest.to_bytes();
    let mut listed = Descriptor::of(MEDIA_TYPE_MANIFEST, &manifest);
    listed.platform = Some(Platform { os_features: vec![OS_FEATURE_EROFS.to_owned()], ..platform.clone() });
    let manifest_digest = repository.push_manifest(MEDIA_TYPE_MANIFEST, manifest.into(), None).await?;
    context.progress.finish(&task);
    let metadata_bytes = blob.size_bytes;
    let summary = ImageSummary { manifest: manifest_digest, platform, layers, metadata_bytes, metadata_raw_bytes };
    Ok((listed, summary))
}

/// What the layers are together.
pub(super) struct Merged {
    /// The metadata image.
    pub(super) metadata: Arc<[u8]>,
    pub(super) bundle: Bundle,
}

/// The merged tree and what the manifest says of the layers.
fn merge_layers(context: &Context, converted: Vec<ConvertedLayer>) -> Result<(Merged, Vec<LayerRef>)> {
    let mut merge = Merge::new();
    let mut devices = Vec::with_capacity(converted.len());
    let mut references = Vec::with_capacity(converted.len());
    let mut bundle = Bundle::default();
    for (number, layer) in converted.into_iter().enumerate() {
        context.check_cancelled()?;
        let digest = Sha256(layer.reference.digest.0);
        let name = |error: Error| error.within(format_args!("layer {}", number + 1));
        let (tree, _) = read_tree(&layer.metadata).map_err(from_image).map_err(name)?;
        drop(layer.metadata);
        let record = MergeRecord::decode(&layer.record).map_err(from_image).map_err(name)?;
        merge.apply(&tree, &record, &layer.index).map_err(name)?;
        devices.push(DeviceSlot { blocks: layer.index.raw_len_blocks(), tag: digest });
        let blob_len_bytes = layer.reference.size_bytes;
        bundle.layers.push(BundledLayer { digest, blob_len_bytes, index: layer.index });
        references.push(layer.reference);
    }
    let tree = merge.into_tree();
    let metadata = match context.options.verity {
        true => verity::write_metadata(&tree, devices)?,
        false => write_merged(&tree, &devices).map_err(from_image)?,
    };
    Ok((Merged { metadata: metadata.into(), bundle }, references))
}
