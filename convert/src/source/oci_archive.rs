//! A tar archive of an OCI layout (OCI image-spec, image-layout.md).

use std::path::Path;
use std::sync::Arc;

use ublkimg_registry::descriptor::{Descriptor, Index, MEDIA_TYPE_INDEX};
use ublkimg_registry::{Digest, MAX_MANIFEST_BYTES};

use super::archive::Archive;
use super::manifest::{self, Document, INDEX_DEPTH_MAX};
use super::{IMAGES_MAX, Image, LayerContent, Platforms};
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};

/// Opens the images in the archive `file` for these platforms: one, unless all were asked for.
pub(super) fn open(file: &Path, platforms: &Platforms) -> Result<Vec<Image>> {
    let archive = Archive::open(file)?;
    let bytes = archive.read(b"index.json", MAX_MANIFEST_BYTES as u64)?;
    let listed = serde_json::from_slice::<Index>(&bytes).map_or(0, |index| index.manifests.len());
    if listed > 1 {
        return Err(Error::unsupported(format!("the archive holds {listed} images; save one at a time")));
    }
    // Layouts often leave the type of their own index out.
    let named = Descriptor::of(MEDIA_TYPE_INDEX, &bytes);
    let mut images = Vec::new();
    let mut pending = vec![(named, bytes, 0)];
    while let Some((descriptor, bytes, depth)) = pending.pop() {
        if depth >= INDEX_DEPTH_MAX {
            return Err(Error::bad_source(format!("more than {INDEX_DEPTH_MAX} indexes inside each other")));
        }
        match manifest::read(&descriptor.media_type, &bytes, platforms)? {
            // The last is taken first.
            Document::Choice(chosen) => {
                for entry in chosen.into_iter().rev() {
                    let bytes = blob(&archive, &entry, MAX_MANIFEST_BYTES as u64)?;
                    pending.push((entry, bytes, depth + 1));
                }
            }
            Document::Image(found) => {
                let config = blob(&archive, &found.config, found.config.size)?;
                let parsed = Config::parse(&config)?;
                let layers = manifest::layers(&found, &parsed, |layer| content(&archive, layer))?;
                let config = (found.config, config);
                images.push(Image::of_manifest(descriptor, bytes.into(), config, parsed, platforms, layers));
            }
        }
        if images.len() + pending.len() > IMAGES_MAX {
            return Err(Error::unsupported(format!("more than {IMAGES_MAX} images")));
        }
    }
    Ok(images)
}

fn content(archive: &Archive, layer: &Descriptor) -> Result<LayerContent> {
    let range = archive.member(name(&layer.digest).as_bytes())?;
    let have = range.end - range.start;
    if have != layer.size {
        let message = format!("layer {} has {have} bytes, not {}", layer.digest, layer.size);
        return Err(Error::new(ErrorKind::VerificationFailed, message));
    }
    Ok(LayerContent::Member(Arc::clone(archive.file()), range))
}

/// A blob that is small enough to be read whole, verified.
fn blob(archive: &Archive, descriptor: &Descriptor, limit_bytes: u64) -> Result<Vec<u8>> {
    let bytes = archive.read(name(&descriptor.digest).as_bytes(), limit_bytes)?;
    if Digest::of(&bytes) != descriptor.digest {
        let message = format!("the bytes of blob {} have another digest", descriptor.digest);
        return Err(Error::new(ErrorKind::VerificationFailed, message));
    }
    Ok(bytes)
}

fn name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
