//! The image that a trace is of, with the names of its files.

use ublkimg_convert::StoredImage;
use ublkimg_image::{Geometry, Tree, read_tree};
use ublkimg_registry::Repository;
use ublkimg_registry::descriptor::Platform;

use crate::args::RegistryOptions;
use crate::args::trace::OfImage;

/// An image and its files.
pub(in crate::commands) struct Named {
    pub(in crate::commands) stored: StoredImage,
    pub(super) tree: Tree,
    pub(super) geometry: Geometry,
}

impl Named {
    /// The image of `--image`, if it was given.
    pub(super) fn read(of: &OfImage) -> anyhow::Result<Option<Self>> {
        of.image.as_deref().map(|image| Self::fetch(image, &of.registry)).transpose()
    }

    /// The image that `reference` names.
    pub(in crate::commands) fn fetch(reference: &str, registry: &RegistryOptions) -> anyhow::Result<Self> {
        let location = crate::commands::location(reference)?;
        let options = crate::commands::client_options(registry);
        let stored = crate::commands::runtime()?.block_on(async {
            let repository = Repository::open(&location, &options).await?;
            StoredImage::read(&repository, &Platform::host()).await
        })?;
        let (tree, geometry) = read_tree(&stored.metadata)?;
        Ok(Self { stored, tree, geometry })
    }
}
