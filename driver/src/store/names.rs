//! What the name of an image meant when it was attached last, so that a host without its registry can still attach it.
//!
//! A name is a file of its own, named by the name's digest: two attaches do not meet. A file that is not what it should be
//! is taken for absent. That a tag meant something once is no promise that it still does; who wants that names a digest.

use std::io::Read as _;

use serde::{Deserialize, Serialize};
use ublkimg_image::Sha256;

use super::Store;
use super::disk;
use super::objects::open_if_there;
use crate::attach::KeptProfile;
use crate::error::{Error, ErrorKind, Result};

/// A file is some hundred bytes.
const NAME_BYTES_MAX: u64 = 64 << 10;

/// Names that are kept; the one that was attached longest ago is forgotten first.
const NAMES_MAX: usize = 4096;

/// What a name meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownName {
    /// The name, as a user gives it.
    pub reference: String,
    /// Digest of the image's manifest.
    pub manifest: String,
    /// What it was started with.
    pub profile: Option<KeptProfile>,
}

impl Store {
    /// Keeps what a name means, in place of what it meant before; durable as [`Store::put_object`].
    ///
    /// # Errors
    /// `Io` and `NoSpace`.
    pub fn put_name(&self, known: &KnownName) -> Result<()> {
        let path = self.layout.name(Sha256::of(known.reference.as_bytes()));
        let bytes = serde_json::to_vec_pretty(known);
        let bytes = bytes.map_err(|error| Error::caused(ErrorKind::Internal, "write a name as JSON", error))?;
        self.replace_and_sync_later(path, &[&bytes])?;
        self.forget_old_names()
    }

    /// What a name meant last.
    ///
    /// # Errors
    /// `Io`.
    pub fn name(&self, reference: &str) -> Result<Option<KnownName>> {
        let path = self.layout.name(Sha256::of(reference.as_bytes()));
        let Some(file) = open_if_there(&path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(NAME_BYTES_MAX).read_to_end(&mut bytes).map_err(|error| Error::path("read", &path, error))?;
        let known: Option<KnownName> = serde_json::from_slice(&bytes).ok();
        Ok(known.filter(|known| known.reference == reference))
    }

    fn forget_old_names(&self) -> Result<()> {
        let directory = self.layout.names();
        let failed = |error| Error::path("list", &directory, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // One that is gone meanwhile was forgotten by another attach.
            if let Ok(modified) = entry.metadata().and_then(|metadata| metadata.modified()) {
                names.push((modified, entry.path()));
            }
        }
        names.sort();
        let surplus = names.len().saturating_sub(NAMES_MAX);
        for (_, path) in names.into_iter().take(surplus) {
            disk::remove(&path).map_err(|error| Error::path("remove", &path, error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_what_it_meant_last() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        assert_eq!(store.name("r/a:1").unwrap(), None);
        let known =
            |manifest: &str| KnownName { reference: "r/a:1".to_owned(), manifest: manifest.to_owned(), profile: None };
        store.put_name(&known("sha256:1")).unwrap();
        store.put_name(&known("sha256:2")).unwrap();
        assert_eq!(store.name("r/a:1").unwrap(), Some(known("sha256:2")));
        assert_eq!(store.name("r/a:2").unwrap(), None);
        // What was written by halves, or is another's, counts for nothing.
        let path = store.layout.name(Sha256::of(b"r/a:1"));
        std::fs::write(&path, b"{").unwrap();
        assert_eq!(store.name("r/a:1").unwrap(), None);
        std::fs::write(&path, serde_json::to_vec(&KnownName { reference: "x".to_owned(), ..known("y") }).unwrap())
            .unwrap();
        assert_eq!(store.name("r/a:1").unwrap(), None);
    }
}
