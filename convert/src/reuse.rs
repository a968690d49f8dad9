//! Layers that were converted before, by whom ever, and need not be again.
//!
//! A layer blob depends on its layer and the settings alone, so what was made of the same layer with the same settings *is*
//! what would be made now. It is looked for in the conversion cache of this host ([`cache`]), then among the layers of the
//! images that the destination's tag and `--reuse` name ([`published`]). Of a layer that is found, merge record and metadata
//! are read, from the cache or from the start of its blob ([`start`]), and nothing else: it is not downloaded, converted or
//! uploaded. It must be in the destination, or be linked to it from another repository of the same registry.
//!
//! What is found is checked against the digests that the manifest states; something that fails this, or cannot be read, is
//! passed over, and the layer is converted. A manifest is taken at its word that a blob was made of a layer: whoever may
//! write the destination's tag, or what `--reuse` names, could as well write the result.

mod cache;
mod entry;
mod published;
mod start;

use std::path::Path;

use ublkimg_registry::erofs_manifest::LayerRef;
use ublkimg_registry::{ClientOptions, Digest, Location};

use crate::background;
use crate::converted_layer::ConvertedLayer;
use crate::destination::Destination;
use crate::error::{ErrorKind, Result};
use crate::source::SourceLayer;
use cache::Cache;
use entry::Entry;
use published::Published;

pub(crate) use start::{METADATA_BYTES_MAX, RECORD_BYTES_MAX};

/// Where to look.
#[derive(Debug)]
pub(crate) struct Reuse {
    cache: Option<Cache>,
    published: Vec<Published>,
    settings: String,
}

impl Reuse {
    /// Opens the cache in `cache`, what the destination's tag names, and `others`. What is not there, or is something else, is
    /// no error.
    ///
    /// # Errors
    /// `Unavailable` when the destination does not answer: nothing could be pushed there either.
    pub(crate) async fn open(
        cache: Option<&Path>,
        destination: &Location,
        others: &[Location],
        client: &ClientOptions,
        settings: String,
    ) -> Result<Self> {
        let mut published = Vec::new();
        for location in std::iter::once(destination).chain(others) {
            match Published::open(location, client).await {
                Ok(found) => published.push(found),
                Err(error) if location == destination => match error.kind() {
                    ErrorKind::Unavailable => return Err(error),
                    _ => tracing::debug!("nothing to reuse in {location}: {error}"),
                },
                Err(error) => tracing::warn!("nothing to reuse in {location}: {error}"),
            }
        }
        Ok(Self { cache: cache.map(Cache::new), published, settings })
    }

    /// The layer, if it was converted before and the destination has its blob now.
    ///
    /// # Errors
    /// Those of the destination.
    pub(crate) async fn find(&self, layer: &SourceLayer, destination: &Destination) -> Result<Option<ConvertedLayer>> {
        let mut found = self.find_cached(layer, destination).await?;
        for published in &self.published {
            if found.is_none() {
                found = self.find_published(published, layer, destination).await?;
            }
        }
        if let Some(ConvertedLayer { reference: LayerRef { origin: Some(origin), .. }, .. }) = &mut found {
            // The same layer, as this image has it.
            origin.source_layer = layer.digest;
        }
        Ok(found)
    }

    async fn find_cached(&self, layer: &SourceLayer, destination: &Destination) -> Result<Option<ConvertedLayer>> {
        let (Some(cache), Some(diff_id)) = (self.cache.clone(), layer.diff_id) else { return Ok(None) };
        let settings = self.settings.clone();
        let entry = background::run(move || cache.get(&Digest(diff_id.0), &settings)).await?;
        let Some(entry) = entry else { return Ok(None) };
        let has = destination.has(&entry.layer.reference.digest, entry.repository.as_deref()).await?;
        Ok(has.then_some(entry.layer))
    }

    async fn find_published(
        &self,
        published: &Published,
        layer: &SourceLayer,
        destination: &Destination,
    ) -> Result<Option<ConvertedLayer>> {
        let Some(found) = published.find(layer, &self.settings) else { return Ok(None) };
        let blob = found.reference().digest;
        let from = Destination::name_of(&published.location);
        if !destination.has(&blob, from.as_deref()).await? {
            return Ok(None);
        }
        match found.read().await {
            Ok(converted) => Ok(Some(converted)),
            Err(error) => {
                let (layer, location) = (layer.name(), &published.location);
                tracing::warn!("{layer}: converted anew, as blob {blob} of {location} is bad: {error}");
                Ok(None)
            }
        }
    }

    /// Remembers a layer that was converted here and that the destination has. What others converted is not remembered: it
    /// is as good as the manifest that named it. A cache that cannot be written is only slower.
    pub(crate) async fn keep(&self, layer: &ConvertedLayer, destination: &Destination) {
        let (Some(cache), Some(origin)) = (self.cache.clone(), &layer.reference.origin) else { return };
        let (diff_id, settings) = (origin.diff_id, origin.settings.clone());
        let entry = Entry { layer: layer.clone(), repository: destination.name() };
        let put = background::run(move || cache.put(&diff_id, &settings, &entry)).await;
        if let Err(error) = put.and_then(|put| put) {
            tracing::warn!("{error}");
        }
    }
}
