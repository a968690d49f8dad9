//! Images that were converted before, as places to find layer blobs in.

use tokio::sync::OnceCell;
use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{Bundle, ChunkIndex, SkippableKind};
use ublkimg_registry::descriptor::{Index, MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX};
use ublkimg_registry::erofs_manifest::{ErofsManifest, LayerRef, OS_FEATURE_EROFS};
use ublkimg_registry::profile;
use ublkimg_registry::{ClientOptions, Location, Repository};

use super::start::read_start;
use crate::blob::from_image;
use crate::converted_layer::ConvertedLayer;
use crate::error::{Error, Result};
use crate::source::SourceLayer;

/// Most manifests of one index that are looked at: more platforms than there are.
const MANIFESTS_MAX: usize = 32;

/// What a location named when the conversion began.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) location: Location,
    repository: Repository,
    images: Vec<PublishedImage>,
}

#[derive(Debug)]
struct PublishedImage {
    manifest: ErofsManifest,
    /// Its chunk indexes: read when the first layer is found here.
    bundle: OnceCell<Bundle>,
}

impl Published {
    /// Reads the manifests that `location` names, directly or in an index.
    ///
    /// # Errors
    /// `NotFound` where there is nothing, `NotOurs` for an ordinary image, and those of the registry.
    pub(super) async fn open(location: &Location, client: &ClientOptions) -> Result<Self> {
        let repository = Repository::open(location, client).await?.without_mirrors();
        let resolved = repository.resolve().await?;
        let mut images = Vec::new();
        let mut add = |bytes: &[u8]| {
            images.push(PublishedImage { manifest: ErofsManifest::parse(bytes)?, bundle: OnceCell::new() });
            Ok::<(), Error>(())
        };
        if [MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST].contains(&resolved.media_type.as_str()) {
            let is_ours = |features: &[String]| features.iter().any(|feature| feature == OS_FEATURE_EROFS);
            let listed = Index::parse(&resolved.bytes)?.manifests.into_iter().filter(|entry| {
                entry.artifact_type.as_deref() != Some(profile::ARTIFACT_TYPE)
                    && entry.platform.as_ref().is_some_and(|platform| is_ours(&platform.os_features))
            });
            for entry in listed.take(MANIFESTS_MAX) {
                add(&repository.manifest(&entry.digest).await?)?;
            }
        } else {
            add(&resolved.bytes)?;
        }
        Ok(Self { location: location.clone(), repository, images })
    }

    /// The blob made of this layer with these settings, if an image here has it.
    pub(super) fn find(&self, layer: &SourceLayer, settings: &str) -> Option<Found<'_>> {
        self.images.iter().find_map(|image| {
            let number = image.manifest.layers.iter().position(|made| layer.became(made, settings))?;
            Some(Found { published: self, image, number })
        })
    }
}

/// A layer blob of an image.
pub(super) struct Found<'a> {
    published: &'a Published,
    image: &'a PublishedImage,
    number: usize,
}

impl Found<'_> {
    pub(super) fn reference(&self) -> &LayerRef {
        &self.image.manifest.layers[self.number]
    }

    /// Reads what merging needs, and nothing else of the blob.
    ///
    /// # Errors
    /// `VerificationFailed` when it is not what the manifest says; those of the registry.
    pub(super) async fn read(&self) -> Result<ConvertedLayer> {
        let reference = self.reference().clone();
        let origin = reference.origin.as_ref().ok_or_else(|| Error::damaged("a layer blob of unknown origin"))?;
        let index = self.index().await?;
        let (record, metadata) =
            read_start(&self.published.repository, &reference, origin.record_digest, &index).await?;
        Ok(ConvertedLayer { reference, index, metadata, record })
    }

    /// The chunk index: out of the bundle, so that there is one request for all layers.
    async fn index(&self) -> Result<ChunkIndex> {
        let reference = &self.image.manifest.metadata;
        let bundle = self.image.bundle.get_or_try_init(|| async {
            let range = reference.bundle_range.clone();
            let frame = self.published.repository.blob_range(&reference.digest, range).await?;
            let payload = skippable_payload(SkippableKind::Ublkimg, &frame).map_err(from_image)?;
            Bundle::decode(payload).map_err(from_image)
        });
        let bundled = bundle.await?.layers.get(self.number);
        let wanted = self.reference();
        // The range was not checked as a whole; this is what vouches for the index.
        let index = bundled.map(|bundled| &bundled.index).filter(|index| index.digest().0 == wanted.index_digest.0);
        let index = index.filter(|index| index.section_offset_bytes() == wanted.index_range.start);
        index.cloned().ok_or_else(|| Error::damaged("its chunk index is not the one that the manifest names"))
    }
}
