//! Pushing blobs and manifests (OCI distribution spec, "Pushing blobs": POST then PUT).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{StreamExt, TryStreamExt};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Body, Method, Response, StatusCode};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::io::ReaderStream;
use url::Url;

use super::{DIGEST_HEADER, Remote};
use crate::auth::Scope;
use crate::blob::BlobSource;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::repository::Pushed;
use crate::retry::Failure;

/// An upload that broke is started again from its beginning; a blob that fails this often fails for a reason.
const UPLOAD_ATTEMPTS: u32 = 3;
/// Between the last byte and the answer the registry hashes and moves the blob: minutes for gigabytes on object storage.
const COMMIT_TIME: Duration = Duration::from_secs(300);
/// How often a running upload is looked at.
const PROGRESS_CHECK: Duration = Duration::from_millis(250);
const FILE_READ_BYTES: usize = 256 << 10;
/// An upload that failed is called off, if that takes no longer than this: registries drop what was forgotten after days.
const CALL_OFF_TIME: Duration = Duration::from_secs(2);
const CALL_OFF_PAUSE: Duration = Duration::from_millis(100);

/// A registry that keeps the referrers of a manifest's subject says so (distribution spec, "Pushing Manifests with Subject").
const SUBJECT_HEADER: HeaderName = HeaderName::from_static("oci-subject");

/// A manifest that was stored.
pub(super) struct Stored {
    pub(super) digest: Digest,
    /// Whether the registry lists it as a referrer by itself.
    pub(super) keeps_referrers: bool,
}

impl Remote {
    pub(crate) async fn push_blob(
        &self,
        digest: &Digest,
        size_bytes: u64,
        source: &BlobSource,
        mount_from: Option<&str>,
    ) -> Result<Pushed> {
        let mount_from = mount_from.filter(|from| *from != self.reference.repository());
        let scope = Scope::push(self.reference.repository(), mount_from);
        if self.blob_exists(digest, &scope).await? {
            return Ok(Pushed::Existed);
        }
        check_size(digest, size_bytes, source).await?;
        let mut backoff = self.backoff();
        let mut attempts = 0;
        loop {
            let slot = backoff.slot(&self.slots, self.transport.gate()).await?;
            let attempt = self.upload(digest, size_bytes, source, mount_from, &scope).await;
            drop(slot);
            attempts += 1;
            match attempt {
                Ok(pushed) => return Ok(pushed),
                Err(failure) if attempts == UPLOAD_ATTEMPTS => return Err(failure.error.after_attempts(attempts)),
                Err(failure) => {
                    // The upload itself may have taken longer than the deadline; what counts is their number.
                    backoff.progressed();
                    backoff.wait(failure).await?;
                }
            }
        }
    }

    /// Links a blob from another repository of this registry; `false` when there is nothing to link.
    pub(crate) async fn mount_blob(&self, digest: &Digest, from: &str) -> Result<bool> {
        let scope = Scope::push(self.reference.repository(), Some(from));
        let mut backoff = self.backoff();
        loop {
            let slot = backoff.slot(&self.slots, self.transport.gate()).await?;
            let attempt = self.begin_upload(digest, Some(from), &scope).await;
            drop(slot);
            match attempt {
                Ok(None) => return Ok(true),
                Ok(Some(place)) => {
                    self.call_off(&place, &scope).await;
                    return Ok(false);
                }
                Err(failure) => backoff.wait(failure).await?,
            }
        }
    }

    async fn upload(
        &self,
        digest: &Digest,
        size_bytes: u64,
        source: &BlobSource,
        mount_from: Option<&str>,
        scope: &Scope,
    ) -> Result<Pushed, Failure> {
        let Some(place) = self.begin_upload(digest, mount_from, scope).await? else { return Ok(Pushed::Mounted) };
        let sent = self.finish_upload(digest, size_bytes, source, &place, scope).await;
        if sent.is_err() {
            self.call_off(&place, scope).await;
        }
        sent.map(|()| Pushed::Uploaded)
    }

    /// Where to send the bytes; `None` when the registry linked the blob from `mount_from`.
    async fn begin_upload(
        &self,
        digest: &Digest,
        mount_from: Option<&str>,
        scope: &Scope,
    ) -> Result<Option<Url>, Failure> {
        let mut start = self.address("blobs/uploads/")?;
        if let Some(from) = mount_from {
            start.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        }
        let response = self.call(Method::POST, &start, empty(), Some(Bytes::new()), scope).await?;
        match response.status() {
            StatusCode::CREATED if mount_from.is_some() => Ok(None),
            StatusCode::ACCEPTED => Ok(Some(self.location(&response, &start)?)),
            _ => Err(self.transport.refusal(response, &format!("upload of blob {digest}")).await),
        }
    }

    async fn finish_upload(
        &self,
        digest: &Digest,
        size_bytes: u64,
        source: &BlobSource,
        place: &Url,
        scope: &Scope,
    ) -> Result<(), Failure> {
        let what = format!("upload of blob {digest}");
        let mut place = place.clone();
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let response = self.send_blob(&place, size_bytes, source, scope).await?;
        match response.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::ACCEPTED | StatusCode::OK => {
                self.check_stored(digest, &response, &what)
            }
            // The session went with a restart of the registry.
            StatusCode::NOT_FOUND => {
                let failure = self.transport.refusal(response, &what).await;
                Err(Failure::later(failure.error))
            }
            _ => Err(self.transport.refusal(response, &what).await),
        }
    }

    /// Tells the registry that nothing more comes. What it answers changes nothing; but a registry that refused an upload
    /// often ends the connection too, so it is told again until it answers.
    async fn call_off(&self, place: &Url, scope: &Scope) {
        if !self.transport.is_registry(place) {
            return;
        }
        let told = async {
            while self.call(Method::DELETE, place, empty(), None, scope).await.is_err() {
                sleep(CALL_OFF_PAUSE).await;
            }
        };
        let _ = timeout(CALL_OFF_TIME, told).await;
    }

    async fn send_blob(
        &self,
        place: &Url,
        size_bytes: u64,
        source: &BlobSource,
        scope: &Scope,
    ) -> Result<Response, Failure> {
        let mut headers = empty();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(size_bytes));
        let grant = match self.transport.is_registry(place) {
            true => self.auth.grant(&self.transport, scope).await?,
            false => None,
        };
        if let Some(grant) = &grant {
            grant.apply(&mut headers);
        }
        self.transport.gate().pass().await;
        let sent = Arc::new(AtomicU64::new(0));
        let body = body_of(source, Arc::clone(&sent)).await?;
        let request = self.transport.start(Method::PUT, place, headers, Some(body));
        let response = tokio::select! {
            response = request => response?,
            () = stalled(&sent, size_bytes, self.transport.options().idle_timeout) => {
                let name = self.transport.name(place);
                return Err(Failure::later(Error::unavailable(format!("{name} stopped taking an upload"))));
            }
        };
        if response.status() == StatusCode::UNAUTHORIZED && self.transport.is_registry(place) {
            // The token ended under way: the next upload has a new one.
            self.auth.renew(&self.transport, scope, response.headers(), grant.as_ref()).await?;
            return Err(Failure::later(self.auth.denied(grant.as_ref())));
        }
        Ok(response)
    }

    pub(crate) async fn push_manifest(&self, media_type: &str, bytes: Bytes, tag: Option<&str>) -> Result<Digest> {
        self.store_manifest(media_type, &bytes, tag).await.map(|stored| stored.digest)
    }

    pub(super) async fn store_manifest(&self, media_type: &str, bytes: &Bytes, tag: Option<&str>) -> Result<Stored> {
        tag.map_or(Ok(()), Self::check_tag)?;
        let digest = Digest::of(bytes);
        let name = tag.map_or_else(|| digest.to_string(), str::to_owned);
        let media_type = HeaderValue::from_str(media_type)
            .map_err(|cause| Error::invalid(format!("{media_type:?} is not a media type")).with_source(cause))?;
        let mut backoff = self.backoff();
        loop {
            let slot = backoff.slot(&self.slots, self.transport.gate()).await?;
            let attempt = self.put_manifest(&name, &media_type, bytes, &digest).await;
            drop(slot);
            match attempt {
                Ok(keeps_referrers) => return Ok(Stored { digest, keeps_referrers }),
                Err(failure) => backoff.wait(failure).await?,
            }
        }
    }

    /// Whether the registry says that it keeps the list of the subject's referrers.
    async fn put_manifest(
        &self,
        name: &str,
        media_type: &HeaderValue,
        bytes: &Bytes,
        digest: &Digest,
    ) -> Result<bool, Failure> {
        let what = format!("manifest {name}");
        let scope = Scope::push(self.reference.repository(), None);
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, media_type.clone())]);
        let url = self.address(&format!("manifests/{name}"))?;
        let response = self.call(Method::PUT, &url, headers, Some(bytes.clone()), &scope).await?;
        match response.status() {
            StatusCode::CREATED | StatusCode::OK | StatusCode::ACCEPTED => {
                self.check_stored(digest, &response, &what)?;
                Ok(response.headers().contains_key(SUBJECT_HEADER))
            }
            _ => Err(self.transport.refusal(response, &what).await),
        }
    }

    /// What the registry says that it stored must be what was sent.
    fn check_stored(&self, digest: &Digest, response: &Response, what: &str) -> Result<(), Failure> {
        let stated = response.headers().get(DIGEST_HEADER).and_then(|value| value.to_str().ok());
        match stated.and_then(|stated| stated.parse::<Digest>().ok()) {
            Some(stored) if stored != *digest => {
                let registry = self.name();
                let text = format!("registry {registry} stored {stored} instead of {digest}: {what}");
                Err(Failure::suspect(Error::corrupt(text)))
            }
            _ => Ok(()),
        }
    }
}

fn empty() -> HeaderMap {
    HeaderMap::new()
}

/// Says early, and better than the registry, that a source has another size than announced.
async fn check_size(digest: &Digest, size_bytes: u64, source: &BlobSource) -> Result<()> {
    let actual_bytes = match source {
        BlobSource::Bytes(bytes) => bytes.len() as u64,
        BlobSource::File(path) => {
            let metadata = tokio::fs::metadata(path).await;
            metadata.map_err(|cause| Error::io(format_args!("reading {}", path.display()), cause))?.len()
        }
    };
    if actual_bytes == size_bytes {
        return Ok(());
    }
    Err(Error::corrupt(format!("the source of blob {digest} has {actual_bytes} bytes instead of {size_bytes}")))
}

/// The body of an upload; `sent` counts what the connection took.
async fn body_of(source: &BlobSource, sent: Arc<AtomicU64>) -> Result<Body> {
    let pieces = match source {
        BlobSource::Bytes(bytes) => {
            let bytes = bytes.clone();
            let starts = (0..bytes.len()).step_by(FILE_READ_BYTES);
            let pieces = starts.map(move |start| Ok(bytes.slice(start..bytes.len().min(start + FILE_READ_BYTES))));
            futures_util::stream::iter(pieces.collect::<Vec<_>>()).boxed()
        }
        BlobSource::File(path) => {
            let file = tokio::fs::File::open(path).await;
            let file = file.map_err(|cause| Error::io(format_args!("reading {}", path.display()), cause))?;
            ReaderStream::with_capacity(file, FILE_READ_BYTES).boxed()
        }
    };
    let counted = pieces.inspect_ok(move |piece: &Bytes| {
        sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
    });
    Ok(Body::wrap_stream(counted))
}

/// Returns when nothing was sent for `limit`, or nothing was answered for long after the end.
async fn stalled(sent: &AtomicU64, size_bytes: u64, limit: Duration) {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        sleep(PROGRESS_CHECK.min(limit)).await;
        let now = sent.load(Ordering::Relaxed);
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        let limit = if now >= size_bytes { COMMIT_TIME.max(limit) } else { limit };
        if since.elapsed() >= limit {
            return;
        }
    }
}
