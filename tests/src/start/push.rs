//! Puts a layout's image into a registry, byte for byte.

use std::path::Path;

use anyhow::{Context as _, Result};
use ublkimg_registry::descriptor::Manifest;
use ublkimg_registry::{BlobSource, ClientOptions, Location, Repository};

/// Pushes the image tagged "latest" in the layout `dir` to `destination`; returns the sum of its layers' sizes in bytes.
///
/// # Errors
///
/// There is no such image, or the registry refuses it.
pub async fn layout(dir: &Path, destination: &Location) -> Result<u64> {
    let location = Location::Layout { dir: dir.to_owned(), tag: Some("latest".to_owned()) };
    let source = Repository::open(&location, &ClientOptions::default()).await?;
    let target = Repository::open(destination, &ClientOptions::default()).await?;
    let resolved = source.resolve().await.with_context(|| format!("no image in {}", dir.display()))?;
    let manifest: Manifest = serde_json::from_slice(&resolved.bytes)?;
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        let file = dir.join("blobs/sha256").join(blob.digest.hex());
        target.push_blob(&blob.digest, blob.size, BlobSource::File(file), None).await?;
    }
    target.push_manifest(&resolved.media_type, resolved.bytes, destination.tag()).await?;
    Ok(manifest.layers.iter().map(|layer| layer.size).sum())
}
