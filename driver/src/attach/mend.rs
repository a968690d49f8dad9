//! What attached images need to be attached again, looked at and mended while they are served.

use std::sync::Arc;

use ublkimg_image::Sha256;
use ublkimg_registry::{Digest, Location};

use super::prepare::{Compared, mend_metadata};
use super::{AttachOptions, blocking, fetch_blob, open, parse, stored};
use crate::error::{Error, ErrorKind, Result};
use crate::kept_chunks::image_manifest;
use crate::store::{Checked, Store};

/// Compares the metadata images that are served with what the store's metadata blobs say: what is damaged is written anew in
/// its place, and counted.
pub(crate) fn check_metadata(store: &Store, checked: &mut Checked) -> Result<()> {
    for object in store.object_digests()? {
        let Some(manifest) = image_manifest(store, object)? else { continue };
        match mend_metadata(store, &manifest) {
            Ok(None) => {}
            Ok(Some(Compared::Right)) => checked.objects += 1,
            Ok(Some(Compared::Mended)) => {
                tracing::error!("store: metadata image {} was damaged, and is mended", manifest.metadata.digest);
                checked.damaged_objects += 1;
            }
            // A manifest that does not fit its metadata blob was never attached.
            Err(error) if error.kind() == ErrorKind::Corrupt => tracing::debug!("store: {}", error.chain()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fetches the manifest of an image and its metadata blob where the store has lost them; whether it had.
pub(crate) async fn refetch(
    store: &Arc<Store>,
    location: &Location,
    manifest_digest: Digest,
    options: &AttachOptions,
) -> Result<bool> {
    let repository = open(location, options).await?;
    let (_held, manifest) = stored(store, manifest_digest).await?;
    let manifest_was_here = manifest.is_some();
    let manifest = match manifest {
        Some(manifest) => manifest,
        None => {
            let fetched = repository.manifest(&manifest_digest).await;
            let what = || format!("fetch manifest {manifest_digest}");
            let manifest = fetched.map_err(|error| Error::registry(what(), error))?;
            keep(store, manifest_digest, manifest.clone()).await?;
            manifest
        }
    };
    let metadata = parse(manifest_digest, &manifest)?.metadata;
    let _share = store.memory().stored.take(metadata.size_bytes).await?;
    let (_held, blob) = stored(store, metadata.digest).await?;
    if blob.is_some() {
        return Ok(!manifest_was_here);
    }
    let what = format!("fetch metadata blob {}", metadata.digest);
    let blob = fetch_blob(&repository, &what, metadata.digest, metadata.size_bytes, &|_, _, _| ()).await?;
    keep(store, metadata.digest, blob).await?;
    Ok(true)
}

async fn keep(store: &Arc<Store>, digest: Digest, bytes: bytes::Bytes) -> Result<()> {
    let store = Arc::clone(store);
    blocking(move || store.put_object(Sha256(digest.0), &bytes)).await
}
