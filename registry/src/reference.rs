//! Names of images: references to registries by docker's rules, and layout directories.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::{Error, Result};

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
/// distribution/reference: a longer name has no valid path on most registries.
const MAX_NAME_BYTES: usize = 255;
/// OCI distribution spec, "Pulling manifests": a tag is at most 128 characters.
const MAX_TAG_BYTES: usize = 128;

/// Where an image is: in a registry or in an OCI layout directory.
///
/// Text form: a [`Reference`], or `oci:DIR[:TAG]`. What follows the last `:` of the latter is the tag when it has no `/`,
/// so a directory whose name has a colon is written with a slash at its end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// An image in a registry.
    Registry(Reference),
    /// An image in an OCI layout directory.
    Layout {
        /// The directory that holds `oci-layout`, `index.json` and `blobs`.
        dir: PathBuf,
        /// `org.opencontainers.image.ref.name` of the image; `None` = the only one there.
        tag: Option<String>,
    },
}

impl Location {
    /// The tag that the text names; for a registry reference without a tag and without a digest, `latest`.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        match self {
            Self::Registry(reference) => reference.tag(),
            Self::Layout { tag, .. } => tag.as_deref(),
        }
    }
}

impl FromStr for Location {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some(rest) = text.strip_prefix("oci:") else { return text.parse().map(Self::Registry) };
        let (dir, tag) = match rest.rsplit_once(':') {
            Some((dir, tag)) if !tag.contains('/') => (dir, Some(tag)),
            _ => (rest, None),
        };
        if dir.is_empty() {
            return Err(Error::invalid(format!("{text:?} names no directory; write oci:DIR or oci:DIR:TAG")));
        }
        if let Some(tag) = tag.filter(|tag| !is_layout_tag(tag)) {
            return Err(Error::invalid(format!("{tag:?} in {text:?} is not a tag")));
        }
        Ok(Self::Layout { dir: PathBuf::from(dir), tag: tag.map(str::to_owned) })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Layout { dir, tag: Some(tag) } => write!(f, "oci:{}:{tag}", dir.display()),
            Self::Layout { dir, tag: None } => {
                let dir = dir.display().to_string();
                let ambiguous = dir.rsplit_once(':').is_some_and(|(_, end)| !end.contains('/'));
                write!(f, "oci:{dir}{}", if ambiguous { "/" } else { "" })
            }
        }
    }
}

/// The name of an image in a registry: `host[:port]/repository[:tag][@sha256:…]`.
///
/// Docker's defaults hold: without a host (a first part with `.` or `:`, or `localhost`) it is `docker.io`, and
/// `docker.io` names of one part live under `library/`; with neither tag nor digest the tag is `latest`. A digest wins over
/// a tag beside it. Displays in full.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// `host` or `host:port`, as it is written in references and in credential files.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The name inside the registry, for example `library/ubuntu`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `None` only when there is a digest.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest that the manifest must have.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository, pinned to this manifest; a tag stays for the reader.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// Host and port that answer for this registry: `docker.io` is served by another host than its name.
    pub(crate) fn api_authority(&self) -> &str {
        if self.registry == DEFAULT_REGISTRY { "registry-1.docker.io" } else { &self.registry }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |why: &str| Error::invalid(format!("{text:?} is not an image reference: {why}"));
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(digest.parse().map_err(|_| refuse("what follows @ is no sha256 digest"))?))
            }
            None => (text, None),
        };
        let (registry, path) = match rest.split_once('/') {
            Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path),
            _ => (DEFAULT_REGISTRY, rest),
        };
        let registry =
            if matches!(registry, "index.docker.io" | "registry-1.docker.io") { DEFAULT_REGISTRY } else { registry };
        if !is_authority(registry) {
            return Err(refuse("the registry's name is malformed"));
        }
        let (name, tag) = match path.rsplit_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (path, None),
        };
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(refuse(&format!("{tag:?} is not a tag")));
        }
        if !is_repository(name) {
            return Err(refuse(
                "a repository is lower-case letters, digits and single . _ - between them, in parts divided by /",
            ));
        }
        let official = registry == DEFAULT_REGISTRY && !name.contains('/');
        let repository = if official { format!("library/{name}") } else { name.to_owned() };
        if repository.len() > MAX_NAME_BYTES {
            return Err(refuse("the repository's name is longer than 255 characters"));
        }
        let tag = tag.or(if digest.is_none() { Some(DEFAULT_TAG) } else { None });
        Ok(Self { registry: registry.to_owned(), repository, tag: tag.map(str::to_owned), digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Whether `host` (no port, no brackets) is this machine, so that plain HTTP does not leave it.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The host of `host`, `host:port`, `[v6]` or `[v6]:port`.
pub(crate) fn host_of(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    }
}

fn is_authority(text: &str) -> bool {
    let port_ok = |port: &str| port.parse::<u16>().is_ok_and(|port| port != 0);
    if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        let port_fits = port.is_empty() || port.strip_prefix(':').is_some_and(port_ok);
        return address.parse::<std::net::Ipv6Addr>().is_ok() && port_fits;
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let label_ok = |label: &str| {
        let inside = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty() && label.bytes().all(inside) && !label.starts_with('-') && !label.ends_with('-')
    };
    host.split('.').all(label_ok) && port.is_none_or(port_ok)
}

/// OCI distribution spec, "Pulling manifests": `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
pub(crate) fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG_BYTES
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

/// A layout's tag may be a whole reference (image-spec, annotations.md: `org.opencontainers.image.ref.name`).
fn is_layout_tag(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// OCI distribution spec, "Pulling manifests": parts of `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`, divided by `/`.
pub(crate) fn is_repository(text: &str) -> bool {
    text.split('/').all(is_repository_part)
}

fn is_repository_part(part: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let (Some(first), Some(last)) = (part.bytes().next(), part.bytes().last()) else { return false };
    let separators_ok = part
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-'));
    word(first) && word(last) && separators_ok
}

#[cfg(test)]
mod tests;
