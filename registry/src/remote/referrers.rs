//! What hangs on a manifest: the referrers API, and for registries without it an index under the tag `sha256-<hex>` that
//! clients keep (OCI distribution spec 1.1, "Listing Referrers", "Referrers Tag Schema").
//!
//! Registries without the API answer 404, but also other things: a redirect to a login page, a page in HTML. Whatever is
//! neither an index nor a refusal counts as "no API"; the tag decides then.

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, LINK};
use reqwest::{Method, Response, StatusCode};
use url::Url;

use super::Remote;
use crate::MAX_MANIFEST_BYTES;
use crate::auth::Scope;
use crate::descriptor::{Descriptor, Index, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::profile::{add_referrer, empty_index};
use crate::retry::Failure;

/// Pages of a list that are read. Registries give 100 entries and more to a page.
const PAGES_MAX: usize = 16;
/// Referrers that are kept of a list: traces of an image, with room for signatures that a registry did not filter out.
const REFERRERS_MAX: usize = 1024;
/// How often the tag's index is written when others write it at the same time.
const WRITE_ATTEMPTS: usize = 4;

/// An answer of the API.
enum Page {
    Listed { index: Index, next: Option<Url> },
    NoApi,
}

impl Remote {
    pub(crate) async fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>> {
        let mut listed = match self.referrers_of_api(subject, artifact_type).await? {
            Some(listed) => listed,
            None => self.referrers_of_tag(subject).await?.1.manifests,
        };
        // A registry need not filter.
        listed.retain(|entry| artifact_type.is_none() || entry.artifact_type.as_deref() == artifact_type);
        Ok(listed)
    }

    /// Stores a manifest with a subject, and lists it with its subject where the registry does not do that by itself.
    pub(crate) async fn push_referrer(&self, bytes: &Bytes, subject: &Digest, listed: &Descriptor) -> Result<Digest> {
        let stored = self.store_manifest(MEDIA_TYPE_MANIFEST, bytes, None).await?;
        if stored.keeps_referrers {
            return Ok(stored.digest);
        }
        // Reading and writing cannot be made one step: what was written is read again.
        for _ in 0..WRITE_ATTEMPTS {
            let (before, index) = self.referrers_of_tag(subject).await?;
            if index.manifests.iter().any(|entry| entry.digest == listed.digest) {
                return Ok(stored.digest);
            }
            let after = add_referrer(&before, listed)?;
            self.push_manifest(MEDIA_TYPE_INDEX, after, Some(&fallback_tag(subject))).await?;
        }
        let registry = self.name();
        Err(Error::unavailable(format!(
            "others keep changing the list of what refers to {subject} at registry {registry}"
        )))
    }

    /// `None` from a registry without the API.
    async fn referrers_of_api(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Option<Vec<Descriptor>>> {
        let mut url = self.address(&format!("referrers/{subject}"))?;
        if let Some(artifact_type) = artifact_type {
            url.query_pairs_mut().append_pair("artifactType", artifact_type);
        }
        let mut listed = Vec::new();
        for _ in 0..PAGES_MAX {
            match self.page(&url).await? {
                Page::NoApi if listed.is_empty() => return Ok(None),
                Page::NoApi => break,
                Page::Listed { index, next } => {
                    listed.extend(index.manifests);
                    match next {
                        Some(next) if listed.len() < REFERRERS_MAX => url = next,
                        _ => break,
                    }
                }
            }
        }
        listed.truncate(REFERRERS_MAX);
        Ok(Some(listed))
    }

    async fn page(&self, url: &Url) -> Result<Page> {
        let mut backoff = self.backoff();
        loop {
            let slot = backoff.slot(&self.slots, self.transport.gate()).await?;
            let attempt = self.page_attempt(url).await;
            drop(slot);
            match attempt {
                Ok(page) => return Ok(page),
                Err(failure) => backoff.wait(failure).await?,
            }
        }
    }

    async fn page_attempt(&self, url: &Url) -> Result<Page, Failure> {
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MEDIA_TYPE_INDEX))]);
        let scope = Scope::pull(self.reference.repository());
        let response = self.call(Method::GET, url, headers, None, &scope).await?;
        let what = "list of referrers";
        match response.status() {
            StatusCode::OK if is_index(&response) => {}
            StatusCode::FORBIDDEN | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                return Err(self.transport.refusal(response, what).await);
            }
            StatusCode::NOT_IMPLEMENTED => return Ok(Page::NoApi),
            status if status.is_server_error() => return Err(self.transport.refusal(response, what).await),
            _ => return Ok(Page::NoApi),
        }
        let next = self.next_page(url, response.headers())?;
        let bytes = self.transport.body(response, MAX_MANIFEST_BYTES, what).await?;
        let registry = self.name();
        let index = Index::parse(&bytes)
            .map_err(|error| Failure::suspect(Error::corrupt(format!("{what} from registry {registry}: {error}"))))?;
        Ok(Page::Listed { index, next })
    }

    /// The rest of the list, which must be at the registry itself.
    fn next_page(&self, url: &Url, headers: &HeaderMap) -> Result<Option<Url>> {
        let Some(target) = next_target(headers) else { return Ok(None) };
        let next = url.join(target).ok().filter(|next| self.transport.is_registry(next));
        let elsewhere = || Error::corrupt(format!("registry {} continues a list elsewhere", self.name()));
        next.map(Some).ok_or_else(elsewhere)
    }

    /// The index under the tag, empty when there is none; as bytes and read.
    async fn referrers_of_tag(&self, subject: &Digest) -> Result<(Bytes, Index)> {
        let tag = fallback_tag(subject);
        let bytes = match self.fetch_manifest(&tag, &format!("tag {tag}"), None).await {
            Ok((bytes, _)) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => empty_index()?,
            Err(error) => return Err(error),
        };
        let index = Index::parse(&bytes)?;
        Ok((bytes, index))
    }
}

/// The address in `Link: <address>; rel="next"`.
pub(crate) fn next_target(headers: &HeaderMap) -> Option<&str> {
    let link = headers.get(LINK)?.to_str().ok()?.strip_prefix('<')?;
    link.split_once('>').filter(|(_, rest)| rest.contains("next")).map(|(target, _)| target)
}

fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

fn is_index(response: &Response) -> bool {
    let stated = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    stated.split(';').next().is_some_and(|stated| stated.trim() == MEDIA_TYPE_INDEX)
}
