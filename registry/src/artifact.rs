//! A manifest that refers to another one (OCI image-spec, manifest.md, `subject`), as far as listing it needs.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::descriptor::{Descriptor, MEDIA_TYPE_MANIFEST};
use crate::{Error, ErrorKind};

/// See the module.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Artifact {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    pub(crate) subject: Descriptor,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl Artifact {
    /// # Errors
    /// `Invalid` for anything but a manifest with a subject.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let bad = |error| Error::new(ErrorKind::Invalid, format!("not a manifest that refers to another: {error}"));
        serde_json::from_slice(bytes).map_err(bad)
    }

    /// What it says that it is; a manifest without a type is what its config is (distribution-spec, "Listing Referrers").
    pub(crate) fn artifact_type(&self) -> Option<String> {
        self.artifact_type.clone().or_else(|| self.config.as_ref().map(|config| config.media_type.clone()))
    }

    /// How a list of referrers names it; `bytes` are the manifest's.
    pub(crate) fn descriptor(&self, bytes: &[u8]) -> Descriptor {
        let media_type = self.media_type.as_deref().unwrap_or(MEDIA_TYPE_MANIFEST);
        let mut descriptor = Descriptor::of(media_type, bytes);
        descriptor.artifact_type = self.artifact_type();
        descriptor.annotations = self.annotations.clone().unwrap_or_default();
        descriptor
    }
}
