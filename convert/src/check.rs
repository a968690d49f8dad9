//! Checks a converted image as a whole: every byte that a device could serve, against the digests that vouch for it.
//!
//! For each image that the location lists:
//! 1. config, manifest and metadata blob have their digests, and name the same layers with the same chunk indexes;
//! 2. each layer blob is read once from end to end: merge record, each chunk (before it is decompressed), what the chunks
//!    decompress to, chunk index, the blob ([`blob`]);
//! 3. the metadata image holds the tree that merging the layers gives ([`tree`]);
//! 4. its profiles have their digests;
//! 5. given the source, each of its layers is read again and compared with the layer blob, object by object ([`source`]).
//!
//! So 1 to 4 say that the image is whole, and 5 that it is the right one. The first thing that is wrong ends the check.

mod blob;
mod source;
mod tree;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::AsyncReadExt as _;
use tokio_util::io::SyncIoBridge;
use ublkimg_image::{BundledLayer, Sha256, read_tree};
use ublkimg_registry::descriptor::{Descriptor, Index, MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::{LayerRef, OS_FEATURE_EROFS, VerityRef};
use ublkimg_registry::profile::{self, profiles};
use ublkimg_registry::{ClientOptions, Digest, Location, Repository};

use crate::background;
use crate::blob::from_stored;
use crate::config::Config;
use crate::convert::verity;
use crate::error::{Error, ErrorKind, Result};
use crate::export::copy_blob;
use crate::merge::Merge;
use crate::progress::{Phase, Progress, Task};
use crate::source::{Platforms, Source};
use crate::stored_image::StoredImage;
use blob::CheckedBlob;

/// How to check.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// How to talk to registries.
    pub client: ClientOptions,
    /// What the image was converted from, to be compared with it.
    pub source: Option<Source>,
    /// Directory for temporary files without names: with a source, the largest layer twice, unpacked.
    pub tmpdir: PathBuf,
}

/// An image that is whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckedImage {
    /// Digest of the manifest.
    pub manifest: String,
    /// Number of layers.
    pub layers: usize,
    /// Chunks of all layer blobs.
    pub chunks: u64,
    /// Bytes of layer blobs and metadata blob.
    pub stored_bytes: u64,
    /// Bytes of the layer blobs decompressed.
    pub raw_bytes: u64,
    /// Names in the merged tree.
    pub objects: u64,
    /// Profiles that the index lists for it.
    pub profiles: usize,
    /// Names in the source's layers that were compared; `None` without a source.
    pub compared: Option<u64>,
}

/// Checks all converted images that `location` lists.
///
/// # Errors
/// `VerificationFailed` naming what is wrong; `NotOurs` when there is no converted image; `NotFound` for what is missing; those
/// of the registry and of `tmpdir`.
pub async fn check(
    location: &Location,
    options: &CheckOptions,
    progress: Arc<dyn Progress>,
) -> Result<Vec<CheckedImage>> {
    let repository = Repository::open(location, &options.client).await?;
    let resolved = repository.resolve().await?;
    let is_index = [MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST].contains(&resolved.media_type.as_str());
    let listed = match is_index {
        true => converted_images(&Index::parse(&resolved.bytes)?),
        false => vec![(resolved.digest, None)],
    };
    if listed.is_empty() {
        return Err(Error::new(ErrorKind::NotOurs, format!("{location}: no converted image in the index")));
    }
    let mut images = Vec::new();
    for (digest, platform) in listed {
        let bytes = repository.manifest(&digest).await?;
        let image = StoredImage::of_manifest(&repository, resolved.clone(), digest, &bytes).await?;
        let of_image = |error: Error| error.within(format_args!("{location}: image {digest}"));
        let checker = Checker { repository: &repository, options, progress: &*progress, image };
        let mut checked = checker.check(platform).await.map_err(of_image)?;
        if is_index {
            checked.profiles = check_profiles(&repository, &resolved.bytes, &digest).await.map_err(of_image)?;
        }
        images.push(checked);
    }
    Ok(images)
}

/// Manifests of ours in an index, and what they are for.
fn converted_images(index: &Index) -> Vec<(Digest, Option<Platform>)> {
    let is_ours = |entry: &&Descriptor| {
        let platform = entry.platform.as_ref();
        entry.artifact_type.as_deref() != Some(profile::ARTIFACT_TYPE)
            && platform.is_some_and(|platform| platform.os_features.iter().any(|feature| feature == OS_FEATURE_EROFS))
    };
    index.manifests.iter().filter(is_ours).map(|entry| (entry.digest, entry.platform.clone())).collect()
}

/// One image under check.
struct Checker<'a> {
    repository: &'a Repository,
    options: &'a CheckOptions,
    progress: &'a dyn Progress,
    image: StoredImage,
}

impl Checker<'_> {
    async fn check(self, platform: Option<Platform>) -> Result<CheckedImage> {
        let config = self.check_config().await?;
        let original = match &self.options.source {
            None => None,
            Some(source) => {
                let platform = platform.unwrap_or_else(Platform::host);
                Some(source::open(source, &self.options.client, &Platforms::One(platform), &self.image, &config).await?)
            }
        };
        let mut merge = Merge::new();
        let mut checked = CheckedImage {
            manifest: self.image.digest.to_string(),
            layers: self.image.manifest.layers.len(),
            stored_bytes: self.image.manifest.metadata.size_bytes,
            compared: original.as_ref().map(|_| 0),
            ..CheckedImage::default()
        };
        for (number, (layer, bundled)) in self.image.manifest.layers.iter().zip(&self.image.bundle.layers).enumerate() {
            let of_layer = |error: Error| error.within(format_args!("layer {} (blob {})", number + 1, layer.digest));
            let blob = self.read_blob(number, layer, bundled).await.map_err(of_layer)?;
            let (tree, _) = read_tree(&blob.metadata).map_err(from_stored).map_err(of_layer)?;
            merge.apply(&tree, &blob.record, &bundled.index).map_err(of_layer)?;
            checked.chunks += u64::from(bundled.index.len());
            checked.stored_bytes += layer.size_bytes;
            checked.raw_bytes += bundled.index.raw_len_bytes();
            if let (Some(layers), Some(compared)) = (&original, &mut checked.compared) {
                let source = layers[number].clone();
                let names = source::compare(source, tree, blob, self.options.tmpdir.clone()).await;
                *compared += names.map_err(of_layer)?;
            }
        }
        let (found, _) = read_tree(&self.image.metadata).map_err(from_stored)?;
        let merged = merge.into_tree();
        checked.objects = tree::compare(&merged, &found, |_, expected, _, found| Ok(expected == found))
            .map_err(|error| error.within("the metadata image is not what the layers merge to"))?;
        if let (Some(verity), Some(bundled)) = (&self.image.manifest.verity, &self.image.tree) {
            self.check_tree(verity, bundled).await.map_err(|error| error.within("the verity tree"))?;
            checked.stored_bytes += verity.tree.size_bytes;
        }
        Ok(checked)
    }

    /// Makes the tree once more, and reads the one that is stored.
    async fn check_tree(&self, verity: &VerityRef, bundled: &BundledLayer) -> Result<()> {
        let (image, tmpdir) = (&self.image, &self.options.tmpdir);
        let metadata = image.metadata.as_slice().into();
        let made =
            verity::read(self.repository, metadata, &image.bundle.layers, &image.manifest.layers, tmpdir).await?;
        if made.root.0 != verity.root.0 {
            return Err(Error::damaged("the manifest has another root than the device"));
        }
        let (stored, len_bytes) = (&verity.tree, bundled.index.raw_len_bytes());
        if bundled.index.digest().0 != stored.index_digest.0 || made.len_bytes != len_bytes {
            return Err(Error::damaged("it has another chunk index or length than it should"));
        }
        let reader = SyncIoBridge::new(self.repository.blob(&stored.digest, stored.size_bytes).await?);
        let digest = stored.uncompressed_digest;
        background::run(move || {
            if made.digest()?.0 != digest.0 {
                return Err(Error::damaged("it is not that of the device"));
            }
            copy_blob(reader, &mut std::io::sink(), len_bytes, digest)
        })
        .await?
    }

    async fn read_blob(&self, number: usize, layer: &LayerRef, bundled: &BundledLayer) -> Result<CheckedBlob> {
        if bundled.index.digest().0 != layer.index_digest.0 || bundled.blob_len_bytes != layer.size_bytes {
            return Err(Error::damaged("the metadata blob has another chunk index than the manifest names"));
        }
        let task = Task { phase: Phase::Check, layer: Some(number), layers: self.image.manifest.layers.len() };
        self.progress.start(&task, Some(layer.size_bytes));
        let reader = SyncIoBridge::new(self.repository.blob(&layer.digest, layer.size_bytes).await?);
        let (layer, index) = (layer.clone(), bundled.index.clone());
        let raw_to = self.options.source.as_ref().map(|_| self.options.tmpdir.clone());
        let size_bytes = layer.size_bytes;
        let read = background::run(move || blob::check(reader, &layer, &index, raw_to.as_deref())).await??;
        self.progress.advance(&task, size_bytes);
        self.progress.finish(&task);
        Ok(read)
    }

    /// The config, which lists the layers too.
    async fn check_config(&self) -> Result<Vec<u8>> {
        let manifest = &self.image.manifest;
        let bytes = read_whole(self.repository, &manifest.config).await?;
        let config = Config::parse(&bytes)?;
        let layers = manifest.devices().map(|layer| layer.uncompressed_digest);
        let listed: Vec<Sha256> =
            layers.chain([manifest.metadata.uncompressed_digest]).map(|digest| Sha256(digest.0)).collect();
        if config.diff_ids(listed.len())?.as_ref() != Some(&listed) {
            return Err(Error::damaged("the config names other layers than the manifest"));
        }
        Ok(bytes)
    }
}

/// Number of profiles that the index lists for the image; all of them are read.
async fn check_profiles(repository: &Repository, index: &[u8], image: &Digest) -> Result<usize> {
    let listed = profiles(index, image)?;
    for profile in &listed {
        let of_profile = |error: Error| error.within(format_args!("profile {}", profile.descriptor.digest));
        let manifest = repository.fetch_profile(profile, image).await.map_err(Error::from).map_err(of_profile)?;
        repository.fetch_trace(&manifest).await.map_err(Error::from).map_err(of_profile)?;
        if let Some(hot) = &manifest.hot {
            let mut blob = repository.blob(&hot.blob.digest, hot.blob.size).await?;
            let drained = tokio::io::copy(&mut blob, &mut tokio::io::sink()).await;
            drained.map_err(|error| Error::io("reading the hot blob", error)).map_err(of_profile)?;
        }
    }
    Ok(listed.len())
}

/// A small blob, verified.
async fn read_whole(repository: &Repository, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut reader = repository.blob(&descriptor.digest, descriptor.size).await?;
    let what = || format!("reading blob {}", descriptor.digest);
    reader.read_to_end(&mut bytes).await.map_err(|error| Error::io(what(), error))?;
    Ok(bytes)
}
