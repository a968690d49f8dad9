//! Profiles: what an earlier start of an image read, as an artifact of its own beside the image.
//!
//! A profile is an OCI manifest with `artifactType` [`ARTIFACT_TYPE`] and the image's manifest as its `subject`. Its first
//! layer is a trace. The second, if there is one, is the hot blob: the blocks of the trace, packed in its order; the
//! table that vouches for that blob's frames is the manifest's config, and always travels inside its descriptor: who has
//! the manifest can fetch and check the hot blob at once. Trace and table are opaque here.
//!
//! Where a profile is found decides what it may do, see [`Trust`]. The image's OCI index lists it beside the manifest
//! ([`profiles`], [`add_to_index`]), so that choosing one costs no request and the digest of the index covers it; or it
//! hangs on the image as a referrer ([`Repository::referrers`](crate::Repository::referrers)).
//!
//! [`ProfileManifest::parse`] is strict, and bounded like every parser of what was fetched.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::descriptor::{Descriptor, INLINE_BYTES_MAX, MEDIA_TYPE_EMPTY, MEDIA_TYPE_MANIFEST};
use crate::{Digest, Error, ErrorKind};

mod index_edit;
mod json_spans;
mod listing;

pub use index_edit::add_to_index;
pub(crate) use index_edit::{add_referrer, empty_index, index_around};
pub use listing::{ListedProfile, ProfileChoice, Trust, choose_profile, profiles};

/// Artifact type of a profile.
pub const ARTIFACT_TYPE: &str = "application/vnd.ublkimg.profile.v1";
/// Media type of a trace.
pub const MEDIA_TYPE_TRACE: &str = "application/vnd.ublkimg.trace.v1+zstd";
/// Media type of a hot blob.
pub const MEDIA_TYPE_HOT: &str = "application/vnd.ublkimg.hot.v1+zstd";
/// Media type of the table of a hot blob's frames.
pub const MEDIA_TYPE_TABLE: &str = "application/vnd.ublkimg.profile.config.v1";

/// Digest of the command that was recorded.
pub const ANNOTATION_COMMAND: &str = "vnd.ublkimg.profile.command";
/// What the user calls the profile.
pub const ANNOTATION_NAME: &str = "vnd.ublkimg.profile.name";
/// In an index: digest of the image manifest that the profile is for.
pub const ANNOTATION_MANIFEST: &str = "vnd.ublkimg.profile.manifest";
/// In an index: `true` for the profile of commands that have none of their own.
pub const ANNOTATION_DEFAULT: &str = "vnd.ublkimg.profile.default";

/// Largest stored trace: the million entries that a trace may have, at 16 bytes.
pub const TRACE_BYTES_MAX: u64 = 16 << 20;
/// Largest hot blob: above what the largest table ([`INLINE_BYTES_MAX`], 40 bytes for a frame of 256 KiB) can vouch for.
pub const HOT_BYTES_MAX: u64 = 8 << 30;
/// A trace of up to this size travels inside its descriptor when there is no hot blob to stream beside it: as base64 at
/// 100 Mbit/s it takes less than the 40 ms round trip that it saves.
const TRACE_INLINE_MAX: usize = 256 << 10;
/// Longest name of a profile; it is typed, and shown in tables.
const NAME_BYTES_MAX: usize = 64;
const EMPTY: &[u8] = b"{}";

/// A profile, as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileManifest {
    /// The manifest of the image that the profile is for.
    pub subject: Descriptor,
    /// Digest of the command that was recorded: what the profile is chosen by.
    pub command: Option<Digest>,
    /// What the user calls it.
    pub name: Option<String>,
    /// The trace; may carry it inside.
    pub trace: Descriptor,
    /// The hot blob, if the profile has one.
    pub hot: Option<HotRef>,
    /// Other annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
}

/// A hot blob and what vouches for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotRef {
    /// The blob.
    pub blob: Descriptor,
    /// The table of its frames, at most [`INLINE_BYTES_MAX`]; the manifest carries it inside.
    pub table: Bytes,
}

/// The JSON of it (OCI image-spec, manifest.md, "Guidelines for Artifact Usage").
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

impl ProfileManifest {
    /// The descriptor of a stored trace, with the trace inside where that saves a round trip.
    #[must_use]
    pub fn describe_trace(stored: &[u8], has_hot_blob: bool) -> Descriptor {
        if has_hot_blob || stored.len() > TRACE_INLINE_MAX {
            return Descriptor::of(MEDIA_TYPE_TRACE, stored);
        }
        Descriptor::of_inline(MEDIA_TYPE_TRACE, stored)
    }

    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// [`ErrorKind::NotOurs`] when it is a manifest of something else; [`ErrorKind::Invalid`] when it claims to be a
    /// profile but breaks a rule; [`ErrorKind::Corrupt`] when the table inside is not the one that is named.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let document: Document = serde_json::from_slice(bytes)
            .map_err(|error| Error::new(ErrorKind::Invalid, format!("profile manifest: {error}")))?;
        if document.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
            return Err(Error::new(ErrorKind::NotOurs, "not an ublkimg profile"));
        }
        let subject = document.subject.ok_or_else(|| invalid("no image (subject)"))?;
        let mut layers = document.layers.into_iter();
        let trace = layers.next().ok_or_else(|| invalid("no layers"))?;
        check_layer(&trace, MEDIA_TYPE_TRACE, TRACE_BYTES_MAX)?;
        let hot = match layers.next() {
            Some(blob) => {
                check_layer(&blob, MEDIA_TYPE_HOT, HOT_BYTES_MAX)?;
                Some(HotRef { blob, table: table(&document.config)? })
            }
            None => None,
        };
        if layers.next().is_some() {
            return Err(invalid("more than two layers"));
        }
        let mut annotations = document.annotations;
        let command = annotations.remove(ANNOTATION_COMMAND).map(|text| text.parse()).transpose()?;
        let name = annotations.remove(ANNOTATION_NAME);
        name.as_deref().map_or(Ok(()), check_name)?;
        Ok(Self { subject, command, name, trace, hot, annotations })
    }

    /// The manifest as JSON: same value, same bytes.
    ///
    /// # Errors
    /// What [`ProfileManifest::parse`] would refuse.
    pub fn to_bytes(&self) -> Result<Bytes, Error> {
        let mut layers = vec![self.trace.clone()];
        layers.extend(self.hot.as_ref().map(|hot| hot.blob.clone()));
        let document = Document {
            schema_version: 2,
            media_type: Some(MEDIA_TYPE_MANIFEST.to_owned()),
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            config: self.config(),
            layers,
            subject: Some(self.subject.clone()),
            annotations: self.all_annotations(),
        };
        let bytes = serde_json::to_vec(&document)
            .map_err(|cause| Error::invalid("the profile cannot be written").with_source(cause))?;
        Self::parse(&bytes)?;
        Ok(bytes.into())
    }

    /// The descriptor of the config: the table of the hot blob or, without one, `{}`; with the content inside.
    #[must_use]
    pub fn config(&self) -> Descriptor {
        match &self.hot {
            Some(hot) => Descriptor::of_inline(MEDIA_TYPE_TABLE, &hot.table),
            None => Descriptor::of_inline(MEDIA_TYPE_EMPTY, EMPTY),
        }
    }

    /// Bytes of the config, which is a blob of the repository too.
    #[must_use]
    pub fn config_bytes(&self) -> Bytes {
        self.hot.as_ref().map_or_else(|| Bytes::from_static(EMPTY), |hot| hot.table.clone())
    }

    fn all_annotations(&self) -> BTreeMap<String, String> {
        let mut annotations = self.annotations.clone();
        annotations.extend(self.command.map(|command| (ANNOTATION_COMMAND.to_owned(), command.to_string())));
        annotations.extend(self.name.clone().map(|name| (ANNOTATION_NAME.to_owned(), name)));
        annotations
    }
}

/// Refuses what cannot be the name of a profile: it is an argument, a word of `--profile` and a cell of a table.
///
/// # Errors
/// [`ErrorKind::Invalid`] unless it is 1 to 64 letters, digits, `.`, `_`, `-`, `+` that start with a letter or digit, and
/// not `auto` or `none`.
pub fn check_name(name: &str) -> Result<(), Error> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte);
    let starts_well = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    if starts_well && name.len() <= NAME_BYTES_MAX && name.bytes().all(is_word) && !matches!(name, "auto" | "none") {
        return Ok(());
    }
    let rule = "1 to 64 letters, digits, '.', '_', '-', '+', beginning with a letter or digit, not auto or none";
    Err(Error::invalid(format!("{name:?} is no name of a profile: {rule}")))
}

fn table(config: &Descriptor) -> Result<Bytes, Error> {
    if config.media_type != MEDIA_TYPE_TABLE {
        return Err(invalid("a hot blob without a table"));
    }
    if config.size > INLINE_BYTES_MAX as u64 {
        return Err(invalid("the hot blob's table is above 1 MiB"));
    }
    config.inline()?.ok_or_else(|| invalid("the hot blob's table is not inside the manifest"))
}

fn check_layer(layer: &Descriptor, media_type: &str, limit_bytes: u64) -> Result<(), Error> {
    if layer.media_type != media_type {
        return Err(invalid(&format!("a layer of type {} where {media_type} belongs", layer.media_type)));
    }
    if !(1..=limit_bytes).contains(&layer.size) {
        return Err(invalid(&format!("layer {}: size {} is not within 1..={limit_bytes}", layer.digest, layer.size)));
    }
    Ok(())
}

fn invalid(why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("bad profile manifest: {why}"))
}

#[cfg(test)]
mod tests;
