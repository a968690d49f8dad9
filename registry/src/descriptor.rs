//! OCI descriptors, manifests and indexes as plain data.
//!
//! `oci-spec` keeps annotations in a hash map, whose order changes from run to run; what is written here must be the
//! same bytes for the same input, so annotations are sorted and unset fields are left out. Digests are SHA-256 only.
//! Source: OCI image-spec 1.1, `descriptor.md`, `manifest.md`, `image-index.md`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{Digest, Error, ErrorKind};

/// Media type of an OCI image manifest.
pub const MEDIA_TYPE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const MEDIA_TYPE_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image config.
pub const MEDIA_TYPE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of Docker's image manifest, version 2, schema 2.
pub const MEDIA_TYPE_DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Media type of Docker's manifest list.
pub const MEDIA_TYPE_DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Media type of the two bytes `{}`, which stand where an artifact has no config.
pub const MEDIA_TYPE_EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Most bytes of content inside a descriptor: as base64 a third of what registries take as a manifest.
pub const INLINE_BYTES_MAX: usize = 1 << 20;

/// A reference to content by digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the content.
    pub media_type: String,
    /// Digest of the content.
    #[serde(with = "digest_text")]
    pub digest: Digest,
    /// Size of the content in bytes.
    pub size: u64,
    /// Free-form notes, sorted by key.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// What the content needs to run on; given in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Type of the artifact that a listed manifest describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Places outside the registry to get the content from ("foreign" layers).
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// The content itself as base64, to save a request. Unchecked: [`Descriptor::inline`] reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

impl Descriptor {
    /// The descriptor of some content.
    #[must_use]
    pub fn of(media_type: &str, content: &[u8]) -> Self {
        Self::new(media_type, Digest::of(content), content.len() as u64)
    }

    /// The same with the content inside, when it is not above [`INLINE_BYTES_MAX`].
    #[must_use]
    pub fn of_inline(media_type: &str, content: &[u8]) -> Self {
        let data = (content.len() <= INLINE_BYTES_MAX).then(|| STANDARD.encode(content));
        Self { data, ..Self::of(media_type, content) }
    }

    /// The content, where the descriptor carries it: has the size and the digest that the descriptor states.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] above [`INLINE_BYTES_MAX`]; [`ErrorKind::Corrupt`] when it is something else.
    pub fn inline(&self) -> Result<Option<Bytes>, Error> {
        let Some(text) = &self.data else { return Ok(None) };
        let fail =
            |kind, why: &str| Error::new(kind, format!("the data inside the descriptor of {}: {why}", self.digest));
        if text.len() > INLINE_BYTES_MAX.div_ceil(3) * 4 || self.size > INLINE_BYTES_MAX as u64 {
            return Err(fail(ErrorKind::TooLarge, "more than 1 MiB"));
        }
        let content = STANDARD.decode(text).map_err(|_| fail(ErrorKind::Corrupt, "not base64"))?;
        if content.len() as u64 != self.size || Digest::of(&content) != self.digest {
            return Err(fail(ErrorKind::Corrupt, "other bytes than the descriptor names"));
        }
        Ok(Some(content.into()))
    }

    /// A descriptor without annotations.
    #[must_use]
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: BTreeMap::new(),
            platform: None,
            artifact_type: None,
            urls: Vec::new(),
            data: None,
        }
    }
}

/// Operating system and processor that an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Processor, as Go names it: `amd64`, `arm64`, ...
    pub architecture: String,
    /// Operating system, as Go names it.
    pub os: String,
    /// Version of the operating system (Windows).
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Features that the operating system must have; `erofs` for our images.
    #[serde(
        rename = "os.features",
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub os_features: Vec<String>,
    /// Variant of the processor: `v7`, `v8`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// A platform without version, features or variant.
    #[must_use]
    pub fn new(os: &str, architecture: &str) -> Self {
        Self {
            architecture: architecture.to_owned(),
            os: os.to_owned(),
            os_version: None,
            os_features: Vec::new(),
            variant: None,
        }
    }

    /// Linux on the processor that this program was built for.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            other => other,
        };
        Self::new("linux", architecture)
    }

    /// True when an image for `self` serves who asks for `wanted`: same system and processor, and the same variant if
    /// both name one. Features are not compared.
    #[must_use]
    pub fn serves(&self, wanted: &Self) -> bool {
        self.os == wanted.os
            && self.architecture == wanted.architecture
            && match (&self.variant, &wanted.variant) {
                (Some(have), Some(want)) => have == want,
                _ => true,
            }
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Reads `os/architecture[/variant]`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let parts: Vec<&str> = text.split('/').collect();
        if !(2..=3).contains(&parts.len()) || parts.iter().any(|part| part.is_empty()) {
            let message = format!("platform {text:?}: want OS/ARCHITECTURE[/VARIANT], for example linux/amd64");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let mut platform = Self::new(parts[0], parts[1]);
        platform.variant = parts.get(2).map(|&variant| variant.to_owned());
        Ok(platform)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(formatter, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// An image manifest: a config and layers, base first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of this document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, base first.
    pub layers: Vec<Descriptor>,
    /// Free-form notes, sorted by key.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// An image index: manifests to choose from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of this document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests, in order of preference.
    pub manifests: Vec<Descriptor>,
    /// Free-form notes, sorted by key.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for malformed JSON.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        serde_json::from_slice(bytes).map_err(|error| Error::new(ErrorKind::Invalid, format!("image index: {error}")))
    }
}

/// Some tools write `null` where the specification says to leave a field out.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A digest as its text form.
mod digest_text {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    use crate::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platform_text_round_trips_and_rejects_nonsense() {
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), text);
        }
        for text in ["linux", "linux/", "a/b/c/d", ""] {
            assert_eq!(text.parse::<Platform>().unwrap_err().kind(), ErrorKind::Invalid, "{text}");
        }
    }

    #[test]
    fn a_variant_matters_only_when_both_sides_name_it() {
        let v7: Platform = "linux/arm/v7".parse().unwrap();
        let v6: Platform = "linux/arm/v6".parse().unwrap();
        let any = Platform::new("linux", "arm");
        assert!(v7.serves(&any) && any.serves(&v7) && !v6.serves(&v7));
    }

    #[test]
    fn null_fields_are_read_as_absent() {
        let text = format!(
            r#"{{"mediaType":"m","digest":"sha256:{}","size":1,"annotations":null,"urls":null}}"#,
            "0".repeat(64)
        );
        let descriptor: Descriptor = serde_json::from_str(&text).unwrap();
        assert!(descriptor.annotations.is_empty() && descriptor.urls.is_empty());
    }

    #[test]
    fn content_inside_is_the_content_named() {
        let descriptor = Descriptor::of_inline(MEDIA_TYPE_EMPTY, b"{}");
        let text = serde_json::to_string(&descriptor).unwrap();
        assert!(text.ends_with(r#""size":2,"data":"e30="}"#), "{text}");
        let read: Descriptor = serde_json::from_str(&text).unwrap();
        assert_eq!(read.inline().unwrap().unwrap(), "{}");
        assert_eq!(Descriptor::of(MEDIA_TYPE_EMPTY, b"{}").inline().unwrap(), None);
    }

    #[test]
    fn other_content_inside_is_refused() {
        let good = Descriptor::of_inline("m", b"content");
        for data in ["", "e30=", "Y29udGVudA", "Y29udGVudA==x", "Y29udGVuVA==", "\u{e9}"] {
            let bad = Descriptor { data: Some(data.to_owned()), ..good.clone() };
            assert_eq!(bad.inline().unwrap_err().kind(), ErrorKind::Corrupt, "{data}");
        }
        assert_eq!(Descriptor { size: 8, ..good.clone() }.inline().unwrap_err().kind(), ErrorKind::Corrupt);
        let large = Descriptor { data: Some("A".repeat(2 << 20)), ..good.clone() };
        assert_eq!(large.inline().unwrap_err().kind(), ErrorKind::TooLarge);
        assert_eq!(Descriptor { size: u64::MAX, ..good }.inline().unwrap_err().kind(), ErrorKind::TooLarge);
        let most = vec![7; INLINE_BYTES_MAX];
        assert_eq!(Descriptor::of_inline("m", &most).inline().unwrap().unwrap(), most);
        assert_eq!(Descriptor::of_inline("m", &vec![7; INLINE_BYTES_MAX + 1]).data, None);
    }
}
