//! Adding a profile to an index. Every byte that does not have to change stays: entries of others, with fields unknown
//! here, are the same text afterwards.

use bytes::Bytes;
use serde_json::Value;

use super::json_spans::array_in_object;
use super::listing::{ListedProfile, Trust};
use super::{ANNOTATION_DEFAULT, ANNOTATION_MANIFEST, ARTIFACT_TYPE, ProfileManifest};
use crate::descriptor::{Descriptor, Index, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Platform};
use crate::erofs_manifest::OS_FEATURE_EROFS;
use crate::{Error, MAX_MANIFEST_BYTES};

/// A profile manifest of up to this size travels inside its descriptor in the index, which saves the round trip before
/// its hot blob can be asked for: as base64 at 100 Mbit/s it takes 4 ms.
const PROFILE_INLINE_MAX: usize = 32 << 10;
/// An index above this size has no more inside: every start reads it.
const INLINE_INDEX_MAX: usize = 512 << 10;

/// The index `index_bytes` with this profile in it. It takes the place of the image's profile for the same command or
/// with the same name; when it `is_default`, no other of that image is. Adding it again changes nothing.
///
/// # Errors
/// `Invalid` when the index is malformed or does not list the image; `TooLarge` when the result is above 4 MiB; and what
/// [`ProfileManifest::parse`] refuses.
pub fn add_to_index(index_bytes: &[u8], profile_bytes: &[u8], is_default: bool) -> Result<Bytes, Error> {
    let manifest = ProfileManifest::parse(profile_bytes)?;
    let image = manifest.subject.digest;
    let index = Index::parse(index_bytes)?;
    if !index.manifests.iter().any(|entry| entry.digest == image) {
        return Err(Error::invalid(format!("the index does not list the image {image} that the profile is for")));
    }
    let has_room = profile_bytes.len() <= PROFILE_INLINE_MAX && index_bytes.len() <= INLINE_INDEX_MAX;
    let descriptor = describe(&manifest, profile_bytes, is_default, has_room);
    let profile =
        ListedProfile::of(&descriptor, &image, Trust::Bytes).ok_or_else(|| Error::invalid("a profile that is none"))?;
    let change = |entry: &Descriptor, text: &str| match ListedProfile::of(entry, &image, Trust::Bytes) {
        Some(other) if other.rivals(&profile) => Ok(Change::Replace),
        Some(other) if other.is_default && is_default => without_default(text).map(Change::Edit),
        _ => Ok(Change::Keep),
    };
    edit(index_bytes, &index, &descriptor, change)
}

/// An index that lists nothing but this image, for a profile to be added: the platform is the image's, with the
/// feature that says EROFS.
///
/// # Errors
/// None that a sound descriptor can cause.
pub(crate) fn index_around(image: Descriptor, platform: &Platform) -> Result<Bytes, Error> {
    let platform = Platform { os_features: vec![OS_FEATURE_EROFS.to_owned()], ..platform.clone() };
    index_of(vec![Descriptor { platform: Some(platform), data: None, ..image }])
}

/// An index without entries.
pub(crate) fn empty_index() -> Result<Bytes, Error> {
    index_of(Vec::new())
}

/// The index of referrers `index_bytes` with this one in it.
pub(crate) fn add_referrer(index_bytes: &[u8], descriptor: &Descriptor) -> Result<Bytes, Error> {
    let index = Index::parse(index_bytes)?;
    if index.manifests.iter().any(|entry| entry.digest == descriptor.digest) {
        return Ok(Bytes::copy_from_slice(index_bytes));
    }
    edit(index_bytes, &index, descriptor, |_, _| Ok(Change::Keep))
}

fn index_of(manifests: Vec<Descriptor>) -> Result<Bytes, Error> {
    let media_type = Some(MEDIA_TYPE_INDEX.to_owned());
    let index = Index { schema_version: 2, media_type, manifests, annotations: std::collections::BTreeMap::new() };
    let bytes = serde_json::to_vec(&index).map_err(|cause| Error::invalid("image index").with_source(cause))?;
    Ok(bytes.into())
}

fn describe(manifest: &ProfileManifest, bytes: &[u8], is_default: bool, inside: bool) -> Descriptor {
    let mut descriptor = match inside {
        true => Descriptor::of_inline(MEDIA_TYPE_MANIFEST, bytes),
        false => Descriptor::of(MEDIA_TYPE_MANIFEST, bytes),
    };
    descriptor.artifact_type = Some(ARTIFACT_TYPE.to_owned());
    // No runtime picks this by mistake.
    descriptor.platform = Some(Platform::new("unknown", "unknown"));
    descriptor.annotations = manifest.all_annotations();
    descriptor.annotations.insert(ANNOTATION_MANIFEST.to_owned(), manifest.subject.digest.to_string());
    if is_default {
        descriptor.annotations.insert(ANNOTATION_DEFAULT.to_owned(), "true".to_owned());
    }
    descriptor
}

/// What becomes of an entry.
enum Change {
    Keep,
    /// The new one takes its place; where several are to be replaced, that of the first.
    Replace,
    Edit(String),
}

/// The text of the index with the new entry in it: in the place of the first that is replaced, else at the end.
fn edit(
    bytes: &[u8],
    index: &Index,
    new: &Descriptor,
    change: impl Fn(&Descriptor, &str) -> Result<Change, Error>,
) -> Result<Bytes, Error> {
    let odd = || Error::invalid("image index: no list of manifests in plain JSON");
    let spans = array_in_object(bytes, "manifests").filter(|spans| spans.elements.len() == index.manifests.len());
    let spans = spans.ok_or_else(odd)?;
    let text = std::str::from_utf8(bytes).map_err(|_| odd())?;
    let new = serde_json::to_string(new).map_err(|cause| Error::invalid("descriptor").with_source(cause))?;
    // Each element stands with the text before it: separator and white space. The first one is never left out, since
    // what is left out has a new one before it.
    let mut out = text[..spans.start].to_owned();
    let (mut at, mut placed) = (spans.start, false);
    for (entry, span) in index.manifests.iter().zip(&spans.elements) {
        let (before, old) = (&text[at..span.start], &text[span.clone()]);
        at = span.end;
        match change(entry, old)? {
            Change::Keep => out.extend([before, old]),
            Change::Edit(edited) => out.extend([before, &edited]),
            Change::Replace if !placed => {
                out.extend([before, &new]);
                placed = true;
            }
            Change::Replace => {}
        }
    }
    if !placed {
        out.extend([if spans.elements.is_empty() { "" } else { "," }, &new]);
    }
    out.push_str(&text[at..]);
    if out.len() > MAX_MANIFEST_BYTES {
        return Err(Error::too_large(format!("the index would have {} bytes; the limit is 4 MiB", out.len())));
    }
    Ok(out.into())
}

/// An entry without the mark of the default; the other fields stay, in the order of their names.
fn without_default(entry: &str) -> Result<String, Error> {
    let bad = |cause| Error::invalid("image index entry").with_source(cause);
    let mut entry: Value = serde_json::from_str(entry).map_err(bad)?;
    if let Some(annotations) = entry.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.remove(ANNOTATION_DEFAULT);
    }
    serde_json::to_string(&entry).map_err(bad)
}
