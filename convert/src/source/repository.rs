//! An image in a registry or an OCI layout directory.

use tokio::io::AsyncReadExt as _;
use ublkimg_registry::descriptor::{Descriptor, Platform};
use ublkimg_registry::{ClientOptions, Location, Repository};

use super::manifest::{Document, INDEX_DEPTH_MAX};
use super::{Image, LayerContent, manifest};
use crate::config::Config;
use crate::error::{Error, Result};

/// Opens the image at `location`.
pub(super) async fn open(location: &Location, options: &ClientOptions, platform: &Platform) -> Result<Image> {
    let repository = Repository::open(location, options).await?;
    let resolved = repository.resolve().await?;
    let (mut media_type, mut bytes) = (resolved.media_type, resolved.bytes);
    for _ in 0..INDEX_DEPTH_MAX {
        match manifest::read(&media_type, &bytes, platform).map_err(|error| error.within(location))? {
            Document::Choice(chosen) => {
                bytes = repository.manifest(&chosen.digest).await?;
                media_type = chosen.media_type;
            }
            Document::Image(found) => {
                let config = Config::parse(&small_blob(&repository, &found.config).await?)?;
                let layers = manifest::layers(&found, &config, |_| Ok(LayerContent::Blob(repository.clone())))?;
                return Ok(Image { platform: config.platform(platform), config, layers });
            }
        }
    }
    Err(Error::bad_source(format!("{location}: more than {INDEX_DEPTH_MAX} indexes inside each other")))
}

/// A whole blob whose size was checked.
async fn small_blob(repository: &Repository, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut reader = repository.blob(&descriptor.digest, descriptor.size).await?;
    let what = || format!("reading blob {}", descriptor.digest);
    reader.read_to_end(&mut bytes).await.map_err(|error| Error::io(what(), error))?;
    Ok(bytes)
}
