//! What an image needs of the store, and which images are pinned: theirs is never evicted.

use std::collections::BTreeSet;
use std::fs;

use serde::{Deserialize, Serialize};
use ublkimg_image::Sha256;

use super::layout::replace_file;
use super::objects::open_if_there;
use super::{Store, disk};
use crate::error::{Error, ErrorKind, Result};

/// The longest file: some thousand digests.
const PIN_BYTES_MAX: u64 = 1 << 20;

/// Everything of one image that is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holding {
    /// What the user called it.
    pub reference: String,
    /// Digest of the image manifest.
    #[serde(with = "hex")]
    pub manifest: Sha256,
    /// The manifest, the metadata blob, what belongs to the profile.
    #[serde(with = "hexes")]
    pub objects: BTreeSet<Sha256>,
    /// Blob files, by the digest of what vouches for them.
    #[serde(with = "hexes")]
    pub blobs: BTreeSet<Sha256>,
}

impl Store {
    /// Pins an image, durably.
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn pin(&self, image: &Holding) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(image);
        let bytes = bytes.map_err(|error| Error::caused(ErrorKind::Internal, "write a pin as JSON", error))?;
        replace_file(&self.pin_path(image.manifest), true, &[&bytes])
    }

    /// Takes a pin away; one that is not there is no error.
    ///
    /// # Errors
    /// `Io`.
    pub fn unpin(&self, manifest: Sha256) -> Result<()> {
        let path = self.pin_path(manifest);
        disk::remove(&path).map_err(|error| Error::path("remove", &path, error))
    }

    /// The pinned images. A file that is no pin is logged and left alone.
    ///
    /// # Errors
    /// `Io`.
    pub fn pins(&self) -> Result<Vec<Holding>> {
        let directory = self.layout.pins();
        let failed = |error| Error::path("list", &directory, error);
        let mut pins = Vec::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Some(file) = open_if_there(&path)? else { continue };
            let is_short = file.metadata().map_err(failed)?.len() <= PIN_BYTES_MAX;
            match is_short.then(|| fs::read(&path).map(|bytes| serde_json::from_slice(&bytes))) {
                Some(Ok(Ok(pin))) => pins.push(pin),
                _ => tracing::error!("store: {} is no pin", path.display()),
            }
        }
        pins.sort_by(|a: &Holding, b| (&a.reference, a.manifest).cmp(&(&b.reference, b.manifest)));
        Ok(pins)
    }

    fn pin_path(&self, manifest: Sha256) -> std::path::PathBuf {
        self.layout.pins().join(manifest.hex())
    }
}

/// A digest as text.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use ublkimg_image::Sha256;

    pub(super) fn serialize<S: Serializer>(digest: &Sha256, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&digest.to_string())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Sha256, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// A set of digests as texts.
mod hexes {
    use std::collections::BTreeSet;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use ublkimg_image::Sha256;

    pub(super) fn serialize<S: Serializer>(digests: &BTreeSet<Sha256>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(digests.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeSet<Sha256>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}
