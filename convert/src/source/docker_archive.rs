//! A tar archive as `docker save` writes it: `manifest.json` names a config and the layers of each image.
//!
//! Nothing in the archive vouches for it but the config's list of uncompressed digests, which are checked.
//! Source: moby, image/tarexport; "Docker Image Specification v1.2", "Combined Image JSON + Filesystem Changeset Format".

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use ublkimg_registry::MAX_MANIFEST_BYTES;
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::erofs_manifest::{CONFIG_BYTES_MAX, LAYERS_MAX};

use super::archive::Archive;
use super::{Image, LayerContent, SourceLayer};
use crate::config::Config;
use crate::error::{Error, Result};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// Opens the image in the archive `file`.
pub(super) fn open(file: &Path, platform: &Platform) -> Result<Image> {
    let archive = Archive::open(file)?;
    let bytes = archive.read(b"manifest.json", MAX_MANIFEST_BYTES as u64)?;
    let mut images: Vec<SavedImage> =
        serde_json::from_slice(&bytes).map_err(|error| Error::bad_source(format!("manifest.json: {error}")))?;
    if images.len() > 1 {
        let tags: Vec<String> = images.into_iter().filter_map(|image| image.repo_tags).flatten().collect();
        let message = format!("the archive holds several images ({}); save one at a time", tags.join(", "));
        return Err(Error::unsupported(message));
    }
    let image = images.pop().ok_or_else(|| Error::bad_source("manifest.json lists no image"))?;
    let config = Config::parse(&archive.read(image.config.as_bytes(), CONFIG_BYTES_MAX)?)?;
    let names = image.layers.unwrap_or_default();
    if names.len() > LAYERS_MAX {
        return Err(Error::unsupported(format!("{} layers, at most {LAYERS_MAX}", names.len())));
    }
    let diff_ids = config.diff_ids(names.len())?;
    let layer = |(number, name): (usize, &String)| {
        let range = archive.member(name.as_bytes())?;
        Ok(SourceLayer {
            digest: None,
            diff_id: diff_ids.as_ref().map(|ids| ids[number]),
            size_bytes: Some(range.end - range.start),
            content: LayerContent::Member(Arc::clone(archive.file()), range),
        })
    };
    let layers = names.iter().enumerate().map(layer).collect::<Result<_>>()?;
    Ok(Image { platform: config.platform(platform), config, layers, original: None })
}
