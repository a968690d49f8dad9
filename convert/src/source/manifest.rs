//! From a manifest or index to the one image that was asked for.

use ublkimg_registry::descriptor::{
    Descriptor, Index, MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_DOCKER_MANIFEST, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST,
    Manifest, Platform,
};
use ublkimg_registry::erofs_manifest::{CONFIG_BYTES_MAX, LAYERS_MAX, OS_FEATURE_EROFS};

use super::{IMAGES_MAX, LayerContent, Platforms, SourceLayer};
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};

/// Most indexes inside indexes that are followed.
pub(super) const INDEX_DEPTH_MAX: usize = 4;

/// What some manifest bytes are.
pub(super) enum Document {
    /// An index; these are its manifests for the platforms: one, unless all were asked for.
    Choice(Vec<Descriptor>),
    /// The manifest of one image.
    Image(Box<Manifest>),
}

/// Reads a manifest or index.
///
/// # Errors
/// `BadSource` for malformed ones, `NotFound` when an index has nothing for the platforms, `Unsupported` for artifacts and
/// for formats of long ago, `Usage` for an image that is converted already.
pub(super) fn read(media_type: &str, bytes: &[u8], platforms: &Platforms) -> Result<Document> {
    let bad = |error| Error::bad_source(format!("{media_type}: {error}"));
    match media_type {
        MEDIA_TYPE_INDEX | MEDIA_TYPE_DOCKER_LIST => {
            let index: Index = serde_json::from_slice(bytes).map_err(bad)?;
            choose(&index, platforms).map(Document::Choice)
        }
        MEDIA_TYPE_MANIFEST | MEDIA_TYPE_DOCKER_MANIFEST => {
            let manifest: Manifest = serde_json::from_slice(bytes).map_err(bad)?;
            check(&manifest)?;
            Ok(Document::Image(Box::new(manifest)))
        }
        other => Err(Error::unsupported(format!("a manifest of type {other}"))),
    }
}

/// The ordinary images for the platforms.
fn choose(index: &Index, platforms: &Platforms) -> Result<Vec<Descriptor>> {
    let is_erofs = |entry: &&Descriptor| {
        entry.platform.as_ref().is_some_and(|have| have.os_features.iter().any(|feature| feature == OS_FEATURE_EROFS))
    };
    let ordinary = || index.manifests.iter().filter(|entry| !is_erofs(entry));
    let found: Vec<Descriptor> = match platforms {
        Platforms::One(platform) => ordinary().find(|entry| serves(entry, platform)).into_iter().cloned().collect(),
        Platforms::All => ordinary().filter(|entry| is_linux_image(entry)).cloned().collect(),
    };
    if found.len() > IMAGES_MAX {
        return Err(Error::unsupported(format!("{} images, at most {IMAGES_MAX}", found.len())));
    }
    if !found.is_empty() {
        return Ok(found);
    }
    if index.manifests.iter().any(|entry| is_erofs(&entry)) {
        return Err(already_converted());
    }
    let have: Vec<String> =
        index.manifests.iter().filter_map(|entry| Some(entry.platform.as_ref()?.to_string())).collect();
    let wanted = match platforms {
        Platforms::One(platform) => platform.to_string(),
        Platforms::All => "linux".to_owned(),
    };
    Err(Error::new(ErrorKind::NotFound, format!("no image for {wanted}; there are: {}", have.join(", "))))
}

/// Of those that serve, the first listed is taken, as container engines do. An entry without a platform serves all.
fn serves(entry: &Descriptor, platform: &Platform) -> bool {
    match &entry.platform {
        Some(have) => have.serves(platform),
        None => entry.artifact_type.is_none(),
    }
}

/// What is for no platform (attestations, profiles) or for another system is no image that could be converted.
fn is_linux_image(entry: &Descriptor) -> bool {
    entry.artifact_type.is_none() && entry.platform.as_ref().is_none_or(|platform| platform.os == "linux")
}

fn already_converted() -> Error {
    Error::new(ErrorKind::Usage, "the source is an ublkimg image already")
}

fn check(manifest: &Manifest) -> Result<()> {
    if manifest.layers.len() > LAYERS_MAX {
        return Err(Error::unsupported(format!("{} layers, at most {LAYERS_MAX}", manifest.layers.len())));
    }
    if manifest.config.size > CONFIG_BYTES_MAX {
        return Err(Error::unsupported(format!("an image config of {} bytes", manifest.config.size)));
    }
    if !manifest.config.media_type.contains("container.image") && !manifest.config.media_type.contains("image.config") {
        return Err(Error::unsupported(format!("an artifact, not an image ({})", manifest.config.media_type)));
    }
    for layer in &manifest.layers {
        if layer.media_type.contains("erofs") {
            return Err(already_converted());
        }
        if layer.media_type.ends_with("+encrypted") || !layer.media_type.contains("tar") {
            return Err(Error::unsupported(format!("layer {} of type {}", layer.digest, layer.media_type)));
        }
    }
    Ok(())
}

/// The layers of an image, with what manifest and config say of each.
pub(super) fn layers(
    manifest: &Manifest,
    config: &Config,
    content: impl Fn(&Descriptor) -> Result<LayerContent>,
) -> Result<Vec<SourceLayer>> {
    let diff_ids = config.diff_ids(manifest.layers.len())?;
    let layer = |(number, descriptor): (usize, &Descriptor)| {
        Ok(SourceLayer {
            digest: Some(descriptor.digest),
            diff_id: diff_ids.as_ref().map(|ids| ids[number]),
            size_bytes: Some(descriptor.size),
            content: content(descriptor)?,
        })
    };
    manifest.layers.iter().enumerate().map(layer).collect()
}
