//! `hosts.toml`, the file in which containerd keeps the mirrors of a registry and how hosts are spoken to
//! (github.com/containerd/containerd, docs/hosts.md): `DIR/HOST/hosts.toml`.
//!
//! What is in it and not here is containerd's own and ignored, except `skip_verify`, which is refused: a tag would mean what
//! anybody on the way says.

use std::io::Read;
use std::path::{Path, PathBuf};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::{Table, Value};
use url::Url;

use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use crate::options::ClientOptions;
use crate::reference::{Reference, is_loopback};

/// A longer file names no mirrors.
const MAX_BYTES: u64 = 1 << 20;

/// What the file of a registry says.
#[derive(Debug)]
pub(crate) struct Hosts {
    /// In the order in which they are asked.
    pub(crate) mirrors: Vec<Host>,
    /// The registry itself.
    pub(crate) server: Endpoint,
}

/// A mirror, and what it may be asked.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) endpoint: Endpoint,
    /// Blobs, and manifests by digest.
    pub(crate) pulls: bool,
    /// What a tag means.
    pub(crate) resolves: bool,
}

impl Hosts {
    /// The first file for the reference's registry in the directories of `options`, else no mirrors.
    pub(crate) fn of(reference: &Reference, options: &ClientOptions) -> Result<Self> {
        for directory in &options.hosts_dirs {
            for name in directory_names(reference.registry()) {
                let path = directory.join(name).join("hosts.toml");
                match read_bounded(&path) {
                    Ok(text) => return Self::parse(&path, &text, reference, options),
                    Err(error) if is_absent(&error) => {}
                    Err(error) => return Err(Error::io(format_args!("cannot read {}", path.display()), error)),
                }
            }
        }
        Ok(Self { mirrors: Vec::new(), server: Endpoint::of(reference, options)? })
    }

    fn parse(path: &Path, text: &str, reference: &Reference, options: &ClientOptions) -> Result<Self> {
        let refuse = |what: String| Error::invalid(format!("{}: {what}", path.display()));
        let file: File = toml::from_str(text).map_err(|error| refuse(error.message().replace('\n', ", ")))?;
        let own = Endpoint::of(reference, options)?;
        let server = match &file.server {
            Some(address) => file.own.endpoint(path, address).map_err(refuse)?,
            None => file.own.dress(path, own.clone()).map_err(refuse)?,
        };
        // Credentials of the registry are filed under its name, wherever it answers.
        let server = Endpoint { name: own.name, ..server };
        let mut mirrors = Vec::new();
        for (address, value) in file.host {
            let host: HostTable = value.try_into().map_err(|error: toml::de::Error| {
                refuse(format!("host {address}: {}", error.message().replace('\n', ", ")))
            })?;
            let mut endpoint = host.endpoint(path, &address).map_err(refuse)?;
            if endpoint.address.origin() != server.address.origin() {
                endpoint.namespace = Some(reference.registry().to_owned());
            }
            let may = |what: &str| host.capabilities.as_ref().is_none_or(|listed| listed.iter().any(|one| one == what));
            let (pulls, resolves) = (may("pull"), may("resolve"));
            mirrors.push(Host { endpoint, pulls, resolves });
        }
        Ok(Self { mirrors, server })
    }
}

#[derive(Deserialize)]
struct File {
    server: Option<String>,
    /// In the file's order.
    #[serde(default)]
    host: Table,
    #[serde(flatten)]
    own: HostTable,
}

/// What can be said of any host.
#[derive(Deserialize)]
struct HostTable {
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    ca: Paths,
    client: Option<Value>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    header: Table,
}

#[derive(Default, Deserialize)]
#[serde(untagged)]
enum Paths {
    #[default]
    None,
    One(PathBuf),
    Several(Vec<PathBuf>),
}

impl HostTable {
    fn endpoint(&self, path: &Path, address: &str) -> Result<Endpoint, String> {
        let text = if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
        let bad = || format!("{address:?} is no address of a host");
        let mut url = Url::parse(text.trim_end_matches('/')).map_err(|_| bad())?;
        let host = url.host_str().ok_or_else(bad)?;
        if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || !url.username().is_empty() {
            return Err(bad());
        }
        let name = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        if !address.contains("://") && is_loopback(host) {
            url = Url::parse(&format!("http://{address}")).map_err(|_| bad())?;
        }
        if !self.override_path && !url.path().ends_with("/v2") {
            url.set_path(&format!("{}/v2", url.path().trim_end_matches('/')));
        }
        self.dress(path, Endpoint::at(url, &name))
    }

    /// The endpoint with certificates and headers.
    fn dress(&self, path: &Path, mut endpoint: Endpoint) -> Result<Endpoint, String> {
        if self.skip_verify && endpoint.address.scheme() == "https" {
            return Err(format!("skip_verify is refused: name the certificate of {} with ca", endpoint.name));
        }
        let beside = |file: &Path| path.parent().unwrap_or(Path::new("/")).join(file);
        endpoint.authorities = match &self.ca {
            Paths::None => Vec::new(),
            Paths::One(file) => vec![beside(file)],
            Paths::Several(files) => files.iter().map(|file| beside(file)).collect(),
        };
        endpoint.identity = match &self.client {
            None => None,
            Some(value) => {
                let (certificate, key) = client(value).ok_or("client is neither a file nor one pair of files")?;
                Some((beside(certificate.as_ref()), key.map(|key| beside(key.as_ref()))))
            }
        };
        endpoint.headers = headers(&self.header)?;
        Ok(endpoint)
    }
}

/// `"file"`, `["file"]` or `[["certificate", "key"]]`.
fn client(value: &Value) -> Option<(&str, Option<&str>)> {
    match value {
        Value::String(file) => Some((file, None)),
        Value::Array(files) => match files.as_slice() {
            [Value::String(file)] => Some((file, None)),
            [Value::Array(pair)] => match pair.as_slice() {
                [Value::String(certificate), Value::String(key)] => {
                    Some((certificate, Some(key).filter(|key| !key.is_empty()).map(|key| &**key)))
                }
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

/// Each value is a text or a list of texts.
fn headers(table: &Table) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in table {
        let bad = || format!("header {name} is none");
        let parsed: HeaderName = name.parse().map_err(|_| bad())?;
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for value in values {
            let mut value: HeaderValue = value.as_str().and_then(|text| text.parse().ok()).ok_or_else(bad)?;
            value.set_sensitive(true);
            headers.append(&parsed, value);
        }
    }
    Ok(headers)
}

/// The names that containerd looks for.
fn directory_names(registry: &str) -> Vec<String> {
    let with_port = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    with_port.into_iter().chain([registry.to_owned(), "_default".to_owned()]).collect()
}

fn read_bounded(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
