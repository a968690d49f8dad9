//! A tar archive of an OCI layout (OCI image-spec, image-layout.md).

use std::path::Path;
use std::sync::Arc;

use ublkimg_registry::descriptor::{Descriptor, Index, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::{Digest, MAX_MANIFEST_BYTES};

use super::archive::Archive;
use super::manifest::{self, Document, INDEX_DEPTH_MAX};
use super::{Image, LayerContent};
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};

/// Opens the image in the archive `file`.
pub(super) fn open(file: &Path, platform: &Platform) -> Result<Image> {
    let archive = Archive::open(file)?;
    let mut bytes = archive.read(b"index.json", MAX_MANIFEST_BYTES as u64)?;
    let images = serde_json::from_slice::<Index>(&bytes).map_or(0, |index| index.manifests.len());
    if images > 1 {
        return Err(Error::unsupported(format!("the archive holds {images} images; save one at a time")));
    }
    // Layouts often leave the type of their own index out.
    let mut media_type = MEDIA_TYPE_INDEX.to_owned();
    for _ in 0..INDEX_DEPTH_MAX {
        match manifest::read(&media_type, &bytes, platform)? {
            Document::Choice(chosen) => {
                bytes = blob(&archive, &chosen, MAX_MANIFEST_BYTES as u64)?;
                media_type = chosen.media_type;
            }
            Document::Image(found) => {
                let config = Config::parse(&blob(&archive, &found.config, found.config.size)?)?;
                let layers = manifest::layers(&found, &config, |layer| {
                    let range = archive.member(name(&layer.digest).as_bytes())?;
                    if range.end - range.start != layer.size {
                        let have = range.end - range.start;
                        let message = format!("layer {} has {have} bytes, not {}", layer.digest, layer.size);
                        return Err(Error::new(ErrorKind::VerificationFailed, message));
                    }
                    Ok(LayerContent::Member(Arc::clone(archive.file()), range))
                })?;
                return Ok(Image { platform: config.platform(platform), config, layers });
            }
        }
    }
    Err(Error::bad_source(format!("more than {INDEX_DEPTH_MAX} indexes inside each other")))
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
