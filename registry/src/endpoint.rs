//! Where a registry answers: itself, or a mirror of it.

use std::fmt;
use std::path::PathBuf;

use reqwest::header::HeaderMap;
use url::Url;

use crate::error::{Error, Result};
use crate::options::ClientOptions;
use crate::reference::{Reference, host_of, is_loopback};

/// An address and what it takes to speak to it.
#[derive(Clone)]
pub(crate) struct Endpoint {
    /// The root of its API, without a slash at the end: `https://registry.example/v2`.
    pub(crate) address: Url,
    /// What credentials for it are filed under, and what messages call it.
    pub(crate) name: String,
    /// The registry that a mirror is asked about, as the parameter `ns` that containerd gives to its mirrors.
    pub(crate) namespace: Option<String>,
    /// Files with certificates that are believed beside the system's.
    pub(crate) authorities: Vec<PathBuf>,
    /// A certificate to show, and its key if that is in a file of its own.
    pub(crate) identity: Option<(PathBuf, Option<PathBuf>)>,
    /// Sent with every request to this host, and to no other.
    pub(crate) headers: HeaderMap,
}

impl Endpoint {
    /// The registry that the reference names, by its own address.
    pub(crate) fn of(reference: &Reference, options: &ClientOptions) -> Result<Self> {
        let authority = reference.api_authority();
        let plain = options.plain_http || is_loopback(host_of(authority));
        let address = format!("{}://{authority}/v2", if plain { "http" } else { "https" });
        Ok(Self::at(parse(&address)?, reference.registry()))
    }

    /// Nothing but an address and a name.
    pub(crate) fn at(address: Url, name: &str) -> Self {
        let (name, headers) = (name.to_owned(), HeaderMap::new());
        Self { address, name, namespace: None, authorities: Vec::new(), identity: None, headers }
    }

    /// The root of a repository there, with a slash at the end.
    pub(crate) fn repository(&self, reference: &Reference) -> Result<Url> {
        parse(&format!("{}/{}/", self.address, reference.repository()))
    }
}

fn parse(address: &str) -> Result<Url> {
    Url::parse(address).map_err(|cause| Error::invalid(format!("{address} is no address")).with_source(cause))
}

/// Headers can be credentials.
impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("name", &self.name).finish_non_exhaustive()
    }
}
