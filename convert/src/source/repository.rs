//! An image in a registry or an OCI layout directory.

use tokio::io::AsyncReadExt as _;
use ublkimg_registry::descriptor::Descriptor;
use ublkimg_registry::{ClientOptions, Location, Repository};

use super::manifest::{Document, INDEX_DEPTH_MAX};
use super::{IMAGES_MAX, Image, LayerContent, Platforms, manifest};
use crate::config::Config;
use crate::error::{Error, Result};

/// Opens the images at `location` for these platforms: one, unless all were asked for.
pub(super) async fn open(location: &Location, options: &ClientOptions, platforms: &Platforms) -> Result<Vec<Image>> {
    let repository = Repository::open(location, options).await?;
    let resolved = repository.resolve().await?;
    let named = Descriptor::new(&resolved.media_type, resolved.digest, resolved.bytes.len() as u64);
    let mut images = Vec::new();
    // Each with the number of indexes around it.
    let mut pending = vec![(named, resolved.bytes, 0)];
    while let Some((descriptor, bytes, depth)) = pending.pop() {
        if depth >= INDEX_DEPTH_MAX {
            let message = format!("{location}: more than {INDEX_DEPTH_MAX} indexes inside each other");
            return Err(Error::bad_source(message));
        }
        let document = manifest::read(&descriptor.media_type, &bytes, platforms);
        match document.map_err(|error| error.within(location))? {
            // The last is taken first.
            Document::Choice(chosen) => {
                for entry in chosen.into_iter().rev() {
                    let bytes = repository.manifest(&entry.digest).await?;
                    pending.push((entry, bytes, depth + 1));
                }
            }
            Document::Image(found) => {
                let config = small_blob(&repository, &found.config).await?;
                let parsed = Config::parse(&config)?;
                let layers = manifest::layers(&found, &parsed, |_| Ok(LayerContent::Blob(repository.clone())))?;
                images.push(Image::of_manifest(descriptor, bytes, (found.config, config), parsed, platforms, layers));
            }
        }
        if images.len() + pending.len() > IMAGES_MAX {
            return Err(Error::unsupported(format!("{location}: more than {IMAGES_MAX} images")));
        }
    }
    Ok(images)
}

/// A whole blob whose size was checked.
async fn small_blob(repository: &Repository, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut reader = repository.blob(&descriptor.digest, descriptor.size).await?;
    let what = || format!("reading blob {}", descriptor.digest);
    reader.read_to_end(&mut bytes).await.map_err(|error| Error::io(what(), error))?;
    Ok(bytes)
}
