//! The last step: the index, under the tag.
//!
//! The index takes the place of whatever the tag named. Profiles are all that stays of it, and only those of an image that
//! the new index lists again, byte for byte: the profile of another image could not be used. So converting a source that
//! did not change leaves the tag as it was.

use std::collections::{BTreeMap, HashSet};

use ublkimg_registry::Digest;
use ublkimg_registry::descriptor::{Descriptor, Index, MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX};
use ublkimg_registry::profile::profiles;

use crate::destination::Destination;
use crate::error::{Error, ErrorKind, Result};

/// Pushes an index of these manifests, which are in the destination, and points the tag at it. Returns its digest.
///
/// # Errors
/// Those of the registry.
pub(super) async fn publish(destination: &Destination, mut manifests: Vec<Descriptor>) -> Result<Digest> {
    let mut seen = HashSet::new();
    manifests.retain(|manifest| seen.insert(manifest.digest));
    let kept = kept_profiles(destination, &manifests).await?;
    manifests.extend(kept);
    let media_type = Some(MEDIA_TYPE_INDEX.to_owned());
    let index = Index { schema_version: 2, media_type, manifests, annotations: BTreeMap::new() };
    let bytes =
        serde_json::to_vec(&index).map_err(|error| Error::new(ErrorKind::Io, "image index").with_source(error))?;
    let tag = destination.location.tag();
    Ok(destination.repository.push_manifest(MEDIA_TYPE_INDEX, bytes.into(), tag).await?)
}

/// The profiles that the tag lists now and that stay.
async fn kept_profiles(destination: &Destination, manifests: &[Descriptor]) -> Result<Vec<Descriptor>> {
    let before = match destination.repository.resolve().await.map_err(Error::from) {
        Ok(before) => before,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    if ![MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST].contains(&before.media_type.as_str()) {
        return Ok(Vec::new());
    }
    let mut kept = Vec::new();
    for manifest in manifests {
        // An index that is malformed lists nothing worth keeping.
        let listed = profiles(&before.bytes, &manifest.digest).unwrap_or_default();
        kept.extend(listed.into_iter().map(|profile| profile.descriptor));
    }
    Ok(kept)
}
