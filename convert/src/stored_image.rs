//! An image of ours as a registry or layout has it: what lists it, its manifest, its metadata and its chunk indexes.

use tokio::io::AsyncReadExt as _;
use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{Bundle, BundledLayer, SkippableKind};
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, MetadataRef, choose};
use ublkimg_registry::{Digest, Repository, Resolved};

use crate::blob::from_stored;
use crate::error::{Error, Result};
use crate::hashing::HashingReader;

/// Longest metadata image that is read, in bytes: it is held in memory.
const METADATA_RAW_BYTES_MAX: u64 = 4 << 30;

/// An image without its layers' bytes. Everything in it is verified against the digest of the manifest.
#[derive(Debug)]
pub struct StoredImage {
    /// What the location names: the index that lists the manifest, or the manifest itself.
    pub resolved: Resolved,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Length of the manifest in bytes.
    pub manifest_size_bytes: u64,
    /// The manifest.
    pub manifest: ErofsManifest,
    /// The metadata image, whole blocks.
    pub metadata: Vec<u8>,
    /// The chunk indexes of the layer blobs, in the order of the manifest.
    pub bundle: Bundle,
    /// That of the verity tree, if there is one.
    pub tree: Option<BundledLayer>,
}

impl StoredImage {
    /// Reads the image that `repository` names: index, manifest and metadata blob.
    ///
    /// # Errors
    /// `NotOurs` for an image that is not converted; `VerificationFailed` for one that is damaged; those of the registry.
    pub async fn read(repository: &Repository, platform: &Platform) -> Result<Self> {
        let resolved = repository.resolve().await?;
        let is_index = [MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST].contains(&resolved.media_type.as_str());
        let (digest, bytes) = if is_index {
            let digest = choose(&resolved.bytes, platform)?.digest;
            (digest, repository.manifest(&digest).await?)
        } else {
            (resolved.digest, resolved.bytes.clone())
        };
        Self::of_manifest(repository, resolved, digest, &bytes).await
    }

    /// The same for a manifest that was read: `bytes` have that digest.
    pub(crate) async fn of_manifest(
        repository: &Repository,
        resolved: Resolved,
        digest: Digest,
        bytes: &[u8],
    ) -> Result<Self> {
        let manifest = ErofsManifest::parse(bytes)?;
        let (metadata, mut bundle) = read_metadata(repository, &manifest.metadata).await?;
        let listed = manifest.devices().map(|layer| layer.digest.0);
        if !bundle.layers.iter().map(|layer| layer.digest.0).eq(listed) {
            return Err(Error::damaged("the bundle is for other layers than the manifest"));
        }
        let tree = manifest.verity.as_ref().and_then(|_| bundle.layers.pop());
        Ok(Self { resolved, digest, manifest_size_bytes: bytes.len() as u64, manifest, metadata, bundle, tree })
    }
}

/// The metadata image and the chunk indexes behind it.
async fn read_metadata(repository: &Repository, reference: &MetadataRef) -> Result<(Vec<u8>, Bundle)> {
    let mut blob = Vec::new();
    let mut reader = repository.blob(&reference.digest, reference.size_bytes).await?;
    reader.read_to_end(&mut blob).await.map_err(|error| Error::io("reading the metadata blob", error))?;
    let reference = reference.clone();
    crate::background::run(move || decode_metadata(&blob, &reference)).await?
}

fn decode_metadata(blob: &[u8], reference: &MetadataRef) -> Result<(Vec<u8>, Bundle)> {
    use std::io::Read as _;

    let split = usize::try_from(reference.bundle_range.start).unwrap_or(usize::MAX).min(blob.len());
    let payload = skippable_payload(SkippableKind::Ublkimg, &blob[split..]).map_err(from_stored)?;
    let bundle = Bundle::decode(payload).map_err(from_stored)?;
    let mut metadata = Vec::new();
    let decoder = zstd::stream::read::Decoder::with_buffer(&blob[..split]);
    let decoder = decoder.map_err(|error| Error::io("starting zstd", error))?;
    let mut limited = HashingReader::new(decoder.take(METADATA_RAW_BYTES_MAX));
    limited.read_to_end(&mut metadata).map_err(|error| Error::damaged("the metadata blob").with_source(error))?;
    if limited.digest().0 != reference.uncompressed_digest.0 {
        return Err(Error::damaged("the metadata image has another digest than the manifest says"));
    }
    Ok((metadata, bundle))
}
