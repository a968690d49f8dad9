//! Which chunks earlier processes left in the store: the images that they attached are kept beside the blocks, and the
//! metadata blob of each has the chunk indexes of its layers.

use std::collections::BTreeSet;

use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{Bundle, Sha256, SkippableKind};
use ublkimg_registry::erofs_manifest::ErofsManifest;

use crate::error::Result;
use crate::store::Store;

/// Notes them, so that images that come find what they share with those that were. It reads the indexes of all images that
/// are kept: not to be waited for.
///
/// # Errors
/// `Io` and `NoSpace`.
pub fn learn(store: &Store) -> Result<()> {
    let mut learnt = BTreeSet::new();
    for object in store.object_digests()? {
        let Some(manifest) = image_manifest(store, object)? else { continue };
        let metadata = &manifest.metadata;
        let Some(bundle) = store.object_part(Sha256(metadata.digest.0), metadata.bundle_range.clone())? else {
            continue;
        };
        let bundle = skippable_payload(SkippableKind::Ublkimg, &bundle).and_then(Bundle::decode);
        let Ok(bundle) = bundle else { continue };
        for (bundled, layer) in bundle.layers.iter().zip(&manifest.layers) {
            let digest = Sha256(layer.index_digest.0);
            // The blob file is named by the index that vouches for it: that and no other says what lies where.
            if bundled.index.digest() == digest && learnt.insert(digest) {
                store.note_chunks(digest, &bundled.index)?;
            }
        }
    }
    Ok(())
}

/// The manifest of an image that an object is, if it is one.
pub(crate) fn image_manifest(store: &Store, object: Sha256) -> Result<Option<ErofsManifest>> {
    // Metadata blobs are no JSON, and may be long.
    if store.object_part(object, 0..1)?.is_none_or(|first| first != b"{") {
        return Ok(None);
    }
    // Manifests of profiles lie there too.
    Ok(store.object(object)?.and_then(|object| ErofsManifest::parse(&object).ok()))
}
