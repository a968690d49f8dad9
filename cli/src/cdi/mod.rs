//! Devices of the host in containers, as the Container Device Interface describes them (github.com/cncf-tags/container-device-interface,
//! SPEC.md, version 1.0 and before): a vendor leaves files in `/etc/cdi` and `/var/run/cdi` that say which variables,
//! device nodes, mounts and hooks a container needs for `VENDOR/CLASS=NAME`.
//!
//! What a file asks for and a bundle cannot have is refused, not left out: a container without it would start and fail later.

mod apply;
mod find;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use self::apply::apply;
pub(crate) use self::find::find;

/// The version that the files written here need, and podman 4 knows: with the annotations of 0.6.0 it would not read them.
pub(crate) const VERSION: &str = "0.5.0";

/// One file.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Specification {
    pub(crate) cdi_version: String,
    /// `VENDOR/CLASS`.
    pub(crate) kind: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) devices: Vec<Device>,
    /// Made once for a container that has any of the devices.
    #[serde(default)]
    pub(crate) container_edits: Edits,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Device {
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) container_edits: Edits,
}

/// What changes in the configuration of a container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct Edits {
    /// `NAME=VALUE`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) env: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) device_nodes: Vec<DeviceNode>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) mounts: Vec<Mount>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) hooks: Vec<Hook>,
    #[serde(rename = "additionalGids", skip_serializing_if = "Vec::is_empty")]
    pub(crate) additional_gids: Vec<u32>,
}

/// What is not said of it is as the host's node has it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct DeviceNode {
    pub(crate) path: String,
    pub(crate) host_path: Option<PathBuf>,
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) major: Option<u32>,
    pub(crate) minor: Option<u32>,
    pub(crate) file_mode: Option<u32>,
    pub(crate) permissions: Option<String>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Mount {
    pub(crate) host_path: PathBuf,
    pub(crate) container_path: String,
    #[serde(default)]
    pub(crate) options: Vec<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Hook {
    pub(crate) hook_name: String,
    pub(crate) path: PathBuf,
    #[serde(default)]
    pub(crate) args: Vec<String>,
    #[serde(default)]
    pub(crate) env: Vec<String>,
    /// Seconds.
    pub(crate) timeout: Option<u64>,
}

/// `VENDOR/CLASS=NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DeviceName {
    pub(crate) kind: String,
    pub(crate) name: String,
}

impl std::str::FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let word = |text: &str| {
            let inside = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte);
            text.bytes().all(inside) && text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        };
        match text.split_once('=') {
            Some((kind, name))
                if word(name) && kind.split_once('/').is_some_and(|(vendor, class)| word(vendor) && word(class)) =>
            {
                Ok(Self { kind: kind.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not VENDOR/CLASS=NAME")),
        }
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.kind, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        let name: DeviceName = "vendor.com/gpu=GPU-0:1".parse().unwrap();
        assert_eq!(
            (&*name.kind, &*name.name, &*name.to_string()),
            ("vendor.com/gpu", "GPU-0:1", "vendor.com/gpu=GPU-0:1")
        );
        for text in
            ["", "gpu", "vendor.com/gpu", "gpu=0", "vendor.com/gpu=", "/gpu=0", "vendor.com/=0", "v/g=a b", "v/../g=0"]
        {
            assert!(text.parse::<DeviceName>().is_err(), "{text}");
        }
    }
}
