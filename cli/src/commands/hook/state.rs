//! What a runtime tells a hook (OCI runtime specification, runtime.md, "State"), and what we read out of it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use ublkimg_driver::error::{Error, ErrorKind};

/// A state is a page of text; annotations may be many.
const STATE_BYTES_MAX: u64 = 4 << 20;

/// `dev.ublkimg.mount./models` = a reference: that image, mounted at `/models` in the container.
pub(in super::super) const MOUNT_PREFIX: &str = "dev.ublkimg.mount.";

/// Name of the device that the container's root is made of: it must be there, and stays as long as the container.
pub(in super::super) const ROOT: &str = "dev.ublkimg.root";

/// [`POSTSTOP`]: the root's device goes when the container has ended.
pub(in super::super) const REMOVE: &str = "dev.ublkimg.remove";

/// The phase after the end of a container.
pub(in super::super) const POSTSTOP: &str = "poststop";

/// `poststart`: the program counts as ready once it was started, which ends the start of the root's device.
const READY: &str = "dev.ublkimg.ready";

/// The state of a container.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    pub(super) id: String,
    pub(super) pid: Option<u32>,
    pub(super) bundle: PathBuf,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl State {
    /// # Errors
    /// [`ErrorKind::Invalid`] when it is none.
    pub(super) fn read(from: impl Read) -> anyhow::Result<Self> {
        let mut text = Vec::new();
        from.take(STATE_BYTES_MAX).read_to_end(&mut text)?;
        let what = "stdin holds no state of a container: hooks are called by a runtime";
        Ok(serde_json::from_slice(&text).map_err(|error| Error::caused(ErrorKind::Invalid, what, error))?)
    }

    /// Paths in the container, and the images that are to be there. Parents come before what is mounted in them.
    pub(super) fn mounts(&self) -> Vec<(&str, &str)> {
        let annotations = self.annotations.iter().flatten();
        annotations.filter_map(|(key, image)| Some((key.strip_prefix(MOUNT_PREFIX)?, image.as_str()))).collect()
    }

    /// The device of the container's root.
    pub(super) fn root_device(&self) -> Option<&str> {
        self.annotation(ROOT)
    }

    /// Whether a container that was started counts as ready.
    pub(super) fn is_ready_when_started(&self) -> bool {
        self.annotation(READY) == Some("poststart")
    }

    /// Whether the root's device was attached for this container alone.
    pub(super) fn takes_root_along(&self) -> bool {
        self.annotation(REMOVE) == Some(POSTSTOP)
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }

    /// The container's root, as its bundle names it.
    ///
    /// # Errors
    /// When the bundle's configuration cannot be read.
    pub(super) fn rootfs(&self) -> anyhow::Result<PathBuf> {
        #[derive(Deserialize)]
        struct Config {
            root: Root,
        }
        #[derive(Deserialize)]
        struct Root {
            path: PathBuf,
        }
        let path = self.bundle.join("config.json");
        let text = std::fs::read(&path).map_err(|error| Error::path("read", &path, error))?;
        let config: Config = serde_json::from_slice(&text)
            .map_err(|error| Error::caused(ErrorKind::Invalid, format!("{} names no root", path.display()), error))?;
        Ok(self.bundle.join(Path::new(&config.root.path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_say_what_to_do() {
        let text = br#"{"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7, "bundle": "/b", "annotations": {
            "dev.ublkimg.mount./models/big": "r/x:1", "dev.ublkimg.mount./models": "r/y:1", "other": "z", "dev.ublkimg.root": "web"}}"#;
        let state = State::read(&text[..]).unwrap();
        assert_eq!(state.mounts(), [("/models", "r/y:1"), ("/models/big", "r/x:1")]);
        assert_eq!((state.root_device(), state.is_ready_when_started()), (Some("web"), false));
        let state = State::read(&br#"{"id": "c1", "bundle": "/b", "annotations": null}"#[..]).unwrap();
        assert!(state.mounts().is_empty());
        assert!(State::read(&b"no"[..]).is_err());
    }
}
