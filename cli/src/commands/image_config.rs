//! The config of an image that is attached.

use tokio::io::AsyncReadExt;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_registry::erofs_manifest::ErofsManifest;
use ublkimg_registry::{Digest, Repository};

use crate::args::RegistryOptions;
use crate::bundle::ImageConfig;

/// The config of the image `reference` whose manifest is `manifest`.
///
/// # Errors
/// Those of the registry; when the config is none.
pub(super) fn fetch(options: &RegistryOptions, reference: &str, manifest: &str) -> anyhow::Result<ImageConfig> {
    let location = super::location(reference)?;
    super::runtime()?.block_on(async {
        let repository = Repository::open(&location, &super::client_options(options)).await?;
        let digest: Digest = manifest.parse()?;
        let manifest = ErofsManifest::parse(&repository.manifest(&digest).await?)?;
        let config: Digest = manifest.config.digest.to_string().parse()?;
        let mut bytes = Vec::new();
        // The manifest bounds its size.
        repository.blob(&config, manifest.config.size).await?.read_to_end(&mut bytes).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Error::caused(ErrorKind::Corrupt, format!("the config {config} of {reference} cannot be read"), error)
                .into()
        })
    })
}
