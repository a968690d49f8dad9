//! What binds the layers of an image together: the metadata blob, the config, the manifest.

use std::sync::Arc;

use ublkimg_image::{Bundle, BundledLayer, DeviceSlot, MergeRecord, Sha256, read_tree, write_merged};
use ublkimg_registry::descriptor::{Descriptor, MEDIA_TYPE_CONFIG, MEDIA_TYPE_MANIFEST, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, MetadataRef, OS_FEATURE_EROFS};
use ublkimg_registry::{BlobSource, Digest};

use super::context::Context;
use super::{FinishedLayer, ImageSummary, LayerSummary};
use crate::background;
use crate::blob::{Blob, from_image, write_metadata_blob};
use crate::config::Config;
use crate::converted_layer::ConvertedLayer;
use crate::error::{Error, Result};
use crate::frames::Compress;
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
    let (blob, converted, metadata_raw_bytes) = background::run({
        let context = Arc::clone(context);
        move || write_metadata(&context, converted)
    })
    .await??;
    context.destination.push(&blob).await?;

    let repository = &context.destination.repository;
    let digests = converted.iter().map(|layer| Sha256(layer.reference.uncompressed_digest.0));
    let config = config.converted(&digests.chain([blob.uncompressed_digest]).collect::<Vec<_>>());
    let config_descriptor = Descriptor::of(MEDIA_TYPE_CONFIG, &config);
    let config_size = config_descriptor.size;
    let source = BlobSource::Bytes(config.into());
    repository.push_blob(&config_descriptor.digest, config_size, source, None).await?;

    let manifest = ErofsManifest {
        config: config_descriptor,
        layers: converted.into_iter().map(|layer| layer.reference).collect(),
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

/// The blocking part of [`finish`]: the merged tree as a blob. Also returns the length of the metadata image.
fn write_metadata(context: &Context, mut converted: Vec<ConvertedLayer>) -> Result<(Blob, Vec<ConvertedLayer>, u64)> {
    let mut merge = Merge::new();
    let mut devices = Vec::with_capacity(converted.len());
    let mut bundle = Bundle::default();
    for (number, layer) in converted.iter_mut().enumerate() {
        context.check_cancelled()?;
        let digest = Sha256(layer.reference.digest.0);
        let name = |error: Error| error.within(format_args!("layer {}", number + 1));
        let (tree, _) = read_tree(&layer.metadata).map_err(from_image).map_err(name)?;
        layer.metadata = Vec::new();
        let record = MergeRecord::decode(&layer.record).map_err(from_image).map_err(name)?;
        merge.apply(&tree, &record, &layer.index).map_err(name)?;
        devices.push(DeviceSlot { blocks: layer.index.raw_len_blocks(), tag: digest });
        let blob_len_bytes = layer.reference.size_bytes;
        bundle.layers.push(BundledLayer { digest, blob_len_bytes, index: layer.index.clone() });
    }
    let metadata = write_merged(&merge.into_tree(), &devices).map_err(from_image)?;
    let how = Compress { level: context.options.level, threads: context.options.threads };
    let blob = write_metadata_blob(&metadata, &bundle, &context.options.tmpdir, how)?;
    Ok((blob, converted, metadata.len() as u64))
}
