//! `index.json` of a layout directory. Entries of others, and fields unknown here, are kept as they are.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::artifact::Artifact;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};

/// image-spec, annotations.md: the name of a manifest inside its layout.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// image-spec, descriptor.md: set on an entry that is an artifact.
const ARTIFACT_TYPE: &str = "artifactType";
/// More tags than this are not listed in an error: it is one line.
const LISTED_TAGS: usize = 8;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    schema_version: u32,
    #[serde(default)]
    manifests: Vec<Entry>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// The manifest that a location means.
#[derive(Debug)]
pub(super) struct Selected {
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) tag: Option<String>,
}

/// Why there is none, still without the directory's name.
#[derive(Debug)]
pub(super) struct NotSelected(ErrorKind, String);

impl NotSelected {
    pub(super) fn within(self, dir: &Path) -> Error {
        Error::new(self.0, format!("{} {}", dir.display(), self.1))
    }
}

impl Default for Index {
    fn default() -> Self {
        let media_type = Value::from("application/vnd.oci.image.index.v1+json");
        let rest = Map::from_iter([("mediaType".to_owned(), media_type)]);
        Self { schema_version: 2, manifests: Vec::new(), rest }
    }
}

impl Index {
    pub(super) fn decode(bytes: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(bytes)
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|cause| Error::invalid("index.json cannot be written").with_source(cause))
    }

    /// The manifest with this tag; without a tag, the only one. What hangs on an image does not make it ambiguous.
    pub(super) fn select(&self, tag: Option<&str>) -> Result<Selected, NotSelected> {
        let entry = match tag {
            Some(tag) => self
                .manifests
                .iter()
                .find(|entry| entry.tag() == Some(tag))
                .ok_or_else(|| NotSelected(ErrorKind::NotFound, format!("has no tag {tag}{}", self.tag_list())))?,
            None => {
                let images: Vec<_> = self.manifests.iter().filter(|entry| !entry.is_referrer()).collect();
                let mut digests: Vec<_> = images.iter().map(|entry| &entry.digest).collect();
                digests.sort_unstable();
                digests.dedup();
                match (digests.len(), images.first().copied()) {
                    (1, Some(entry)) => entry,
                    (0, _) | (_, None) => {
                        return Err(NotSelected(ErrorKind::NotFound, "holds no manifest".to_owned()));
                    }
                    (count, _) => {
                        let why = format!("holds {count} manifests; name one as oci:DIR:TAG{}", self.tag_list());
                        return Err(NotSelected(ErrorKind::Invalid, why));
                    }
                }
            }
        };
        let digest = entry.digest.parse().map_err(|error: Error| {
            NotSelected(ErrorKind::Corrupt, format!("has a manifest whose digest is malformed: {error}"))
        })?;
        Ok(Selected { digest, media_type: entry.media_type.clone(), tag: entry.tag().map(str::to_owned) })
    }

    /// Digests of the entries, as far as they are SHA-256.
    pub(super) fn digests(&self) -> Vec<Digest> {
        self.manifests.iter().filter_map(|entry| entry.digest.parse().ok()).collect()
    }

    /// Lists a manifest; `tag` moves to it from wherever it was. Untagged entries that it lists itself go away: they are
    /// reached through it.
    pub(super) fn insert(&mut self, media_type: &str, digest: &Digest, manifest: &[u8], tag: Option<&str>) {
        let listed = digest.to_string();
        let children = children(manifest);
        self.manifests.retain(|entry| match entry.tag() {
            Some(other) => Some(other) != tag,
            None => entry.digest != listed && !children.contains(&entry.digest),
        });
        if tag.is_none() && self.manifests.iter().any(|entry| entry.digest == listed) {
            return;
        }
        let annotations = tag.map(|tag| (REF_NAME.to_owned(), tag.to_owned())).into_iter().collect();
        let artifact_type = Artifact::parse(manifest).ok().and_then(|artifact| artifact.artifact_type());
        let artifact_type = artifact_type.map(|kind| (ARTIFACT_TYPE.to_owned(), kind.into()));
        self.manifests.push(Entry {
            media_type: media_type.to_owned(),
            digest: listed,
            size: manifest.len() as u64,
            annotations,
            rest: artifact_type.into_iter().collect(),
        });
    }

    /// Takes away the entry without a tag for this manifest.
    pub(super) fn remove_untagged(&mut self, digest: &Digest) {
        let digest = digest.to_string();
        self.manifests.retain(|entry| entry.tag().is_some() || entry.digest != digest);
    }

    fn tag_list(&self) -> String {
        let tags: Vec<_> = self.manifests.iter().filter_map(Entry::tag).collect();
        match tags.len() {
            0 => String::new(),
            count if count > LISTED_TAGS => format!(" (tags: {}, ... {count} in all)", tags[..LISTED_TAGS].join(", ")),
            _ => format!(" (tags: {})", tags.join(", ")),
        }
    }
}

impl Entry {
    fn tag(&self) -> Option<&str> {
        self.annotations.get(REF_NAME).map(String::as_str)
    }

    /// Whether it was listed for what it refers to: no image by itself.
    fn is_referrer(&self) -> bool {
        self.tag().is_none() && self.rest.contains_key(ARTIFACT_TYPE)
    }
}

/// Digests of the manifests that an index lists; none for a manifest.
fn children(manifest: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Lists {
        #[serde(default)]
        manifests: Vec<Child>,
    }
    #[derive(Deserialize)]
    struct Child {
        digest: String,
    }
    let lists = serde_json::from_slice(manifest).unwrap_or(Lists { manifests: Vec::new() });
    lists.manifests.into_iter().map(|child| child.digest).collect()
}
