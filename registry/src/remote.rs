//! A repository in an OCI distribution registry, or in a mirror of it (OCI distribution spec 1.1).
//!
//! `call` sends a request to the registry's own host with its authorization; `get` also follows redirects, without it;
//! everything else is built on the two. Reads of blobs are in `blob_read` and `blob_stream`, pushes in `push`.

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::Semaphore;
use url::Url;

use crate::MAX_MANIFEST_BYTES;
use crate::auth::{Authenticator, Scope};
use crate::digest::Digest;
use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use crate::options::ClientOptions;
use crate::reference::{Reference, is_tag};
use crate::repository::Resolved;
use crate::retry::{Backoff, Failure};
use crate::transport::Transport;

pub(crate) mod blob_read;
mod blob_stream;
mod push;
pub(crate) mod referrers;
mod routes;

use routes::Routes;

/// Requests of one repository at the same time. A link of 1 Gbit/s and 50 ms holds 6 MB, 24 chunks of 256 KiB; twice that and
/// some for the rest is all that a link can use, and registries start to refuse far above it.
pub(crate) const MAX_REQUESTS: usize = 64;
/// A blob's address is one or two redirects away; more is a circle.
const MAX_REDIRECTS: usize = 5;
/// What a manifest may be: OCI's types first, docker's older ones for images that were never pushed again.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const DIGEST_HEADER: HeaderName = HeaderName::from_static("docker-content-digest");

#[derive(Debug)]
pub(crate) struct Remote {
    reference: Reference,
    base: Url,
    transport: Transport,
    auth: Authenticator,
    slots: Semaphore,
    routes: Routes,
}

impl Remote {
    pub(crate) fn new(reference: &Reference, endpoint: Endpoint, options: &ClientOptions) -> Result<Self> {
        let base = endpoint.repository(reference)?;
        Ok(Self {
            auth: Authenticator::new(&endpoint.name, reference.repository(), options),
            transport: Transport::new(reference, endpoint, options)?,
            slots: Semaphore::new(MAX_REQUESTS),
            routes: Routes::default(),
            reference: reference.clone(),
            base,
        })
    }

    /// What messages call the registry or the mirror.
    fn name(&self) -> &str {
        &self.transport.endpoint().name
    }

    /// The digest of the reference.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.reference.digest()
    }

    /// Whether it said that it wants to be asked later.
    pub(crate) fn is_held(&self) -> bool {
        self.transport.gate().closed_until().is_some()
    }

    /// The tag that a push goes to, as long as the reference is not pinned to a digest.
    pub(crate) fn tag(&self) -> Option<&str> {
        self.reference.tag().filter(|_| self.reference.digest().is_none())
    }

    pub(crate) async fn resolve(&self) -> Result<Resolved> {
        let (name, what) = match (self.reference.digest(), self.reference.tag()) {
            (Some(digest), _) => (digest.to_string(), format!("manifest {digest}")),
            (None, tag) => {
                let tag = tag.unwrap_or_default();
                (tag.to_owned(), format!("tag {tag}"))
            }
        };
        let (bytes, headers) = self.fetch_manifest(&name, &what, self.reference.digest()).await?;
        let digest = Digest::of(&bytes);
        let media_type = media_type(&headers, &bytes);
        Ok(Resolved { digest, media_type, bytes })
    }

    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<Bytes> {
        let (bytes, _) = self.fetch_manifest(&digest.to_string(), &format!("manifest {digest}"), Some(*digest)).await?;
        Ok(bytes)
    }

    async fn fetch_manifest(&self, name: &str, what: &str, expected: Option<Digest>) -> Result<(Bytes, HeaderMap)> {
        let mut backoff = self.backoff();
        loop {
            let slot = backoff.slot(&self.slots, self.transport.gate()).await?;
            let attempt = self.manifest_attempt(name, what, expected).await;
            drop(slot);
            match attempt {
                Ok(manifest) => return Ok(manifest),
                Err(failure) => backoff.wait(failure).await?,
            }
        }
    }

    async fn manifest_attempt(
        &self,
        name: &str,
        what: &str,
        expected: Option<Digest>,
    ) -> Result<(Bytes, HeaderMap), Failure> {
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES))]);
        let (response, _) = self.get(self.address(&format!("manifests/{name}"))?, headers).await?;
        if response.status() != StatusCode::OK {
            return Err(self.transport.refusal(response, what).await);
        }
        let headers = response.headers().clone();
        let bytes = self.transport.body(response, MAX_MANIFEST_BYTES, what).await?;
        let actual = Digest::of(&bytes);
        let stated = headers.get(DIGEST_HEADER).and_then(|value| value.to_str().ok()).filter(|_| expected.is_none());
        // A digest of another algorithm says nothing about ours.
        let stated = stated.and_then(|stated| stated.parse().ok());
        match expected.or(stated) {
            Some(digest) if digest != actual => Err(Failure::suspect(Error::corrupt(format!(
                "registry {} sends other bytes for {what}: digest {actual} instead of {digest}",
                self.name()
            )))),
            _ => Ok((bytes, headers)),
        }
    }

    /// Follows redirects; returns the answer and the address that gave it.
    async fn get(&self, url: Url, headers: HeaderMap) -> Result<(Response, Url), Failure> {
        let scope = Scope::pull(self.reference.repository());
        let mut at = url;
        let mut response = self.call(Method::GET, &at, headers.clone(), None, &scope).await?;
        for _ in 0..MAX_REDIRECTS {
            if !is_redirect(response.status()) {
                return Ok((response, at));
            }
            at = self.location(&response, &at)?;
            response = if self.transport.is_registry(&at) {
                self.call(Method::GET, &at, headers.clone(), None, &scope).await?
            } else {
                self.transport.send(Method::GET, &at, headers.clone(), None).await?
            };
        }
        let registry = self.name();
        Err(Failure::suspect(Error::corrupt(format!("registry {registry} redirects in circles"))))
    }

    /// One request to the registry's own host, with what it wants to see; once more when that was refused.
    async fn call(
        &self,
        method: Method,
        url: &Url,
        headers: HeaderMap,
        body: Option<Bytes>,
        scope: &Scope,
    ) -> Result<Response, Failure> {
        let mut grant = self.auth.grant(&self.transport, scope).await?;
        let mut renewed = false;
        loop {
            let mut headers = headers.clone();
            if let Some(grant) = &grant {
                grant.apply(&mut headers);
            }
            let response = self.transport.send(method.clone(), url, headers, body.clone()).await?;
            let fresh = match (response.status(), &grant) {
                (StatusCode::UNAUTHORIZED, _) if renewed => return Err(self.auth.denied(grant.as_ref()).into()),
                (StatusCode::UNAUTHORIZED, refused) => {
                    Some(self.auth.renew(&self.transport, scope, response.headers(), refused.as_ref()).await?)
                }
                // Some registries say so of a token that has ended.
                (StatusCode::FORBIDDEN, Some(refused)) if !renewed => {
                    self.auth.renew_token(&self.transport, scope, refused).await?
                }
                _ => None,
            };
            if fresh.is_none() {
                return Ok(response);
            }
            (grant, renewed) = (fresh, true);
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(self.transport.options().retry_deadline)
    }

    fn address(&self, path: &str) -> Result<Url> {
        let address = self.base.join(path);
        let mut url = address.map_err(|cause| Error::invalid(format!("{path} is no address")).with_source(cause))?;
        if let Some(registry) = &self.transport.endpoint().namespace {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        Ok(url)
    }

    /// Where an answer points to.
    fn location(&self, response: &Response, from: &Url) -> Result<Url> {
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        location.and_then(|location| from.join(location).ok()).ok_or_else(|| {
            Error::corrupt(format!("{} answers {} without an address", self.transport.name(from), response.status()))
        })
    }

    fn check_tag(tag: &str) -> Result<()> {
        if is_tag(tag) { Ok(()) } else { Err(Error::invalid(format!("{tag:?} is not a tag"))) }
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The media type that the answer states; where it states none of use, the one inside the document.
fn media_type(headers: &HeaderMap, bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Typed {
        media_type: Option<String>,
    }
    let stated = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let stated = stated.split(';').next().unwrap_or_default().trim();
    if stated.starts_with("application/vnd.") {
        return stated.to_owned();
    }
    let inside = serde_json::from_slice::<Typed>(bytes).ok().and_then(|document| document.media_type);
    inside.unwrap_or_else(|| stated.to_owned())
}
