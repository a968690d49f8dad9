//! Blob uploads: whole in one POST, POST then PUT, in chunks by PATCH, and mounting from another repository
//! (OCI distribution spec, "Pushing Blobs").

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Body;
use axum::http::header::{CONTENT_RANGE, LOCATION, RANGE};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use sha2::Digest as _;
use ublkimg_image::Sha256;

use super::answer::{ApiError, CONTENT_DIGEST};
use super::distribution::Parameters;
use super::storage::{Blob, Storage};

/// Uploads that were begun and not ended. A test that leaves more behind is wrong.
const OPEN_UPLOADS: usize = 1024;

/// What of a blob has come so far.
struct Upload {
    sink: Sink,
    hasher: sha2::Sha256,
    len_bytes: u64,
}

enum Sink {
    Memory(Vec<u8>),
    File(std::fs::File, PathBuf),
}

impl Upload {
    fn new(storage: &Storage, id: &str) -> io::Result<Self> {
        let sink = match storage.dir() {
            None => Sink::Memory(Vec::new()),
            Some(dir) => {
                let path = dir.join(format!("upload-{id}"));
                Sink::File(std::fs::File::create(&path)?, path)
            }
        };
        Ok(Self { sink, hasher: sha2::Sha256::new(), len_bytes: 0 })
    }

    async fn append(&mut self, body: Body) -> Result<(), ApiError> {
        let mut frames = body.into_data_stream();
        while let Some(frame) = frames.next().await {
            let frame = frame.map_err(io::Error::other)?;
            self.hasher.update(&frame);
            self.len_bytes += frame.len() as u64;
            match &mut self.sink {
                Sink::Memory(bytes) => bytes.extend_from_slice(&frame),
                Sink::File(file, _) => file.write_all(&frame)?,
            }
        }
        Ok(())
    }

    fn forget(self) -> io::Result<()> {
        match self.sink {
            Sink::Memory(_) => Ok(()),
            Sink::File(_, path) => std::fs::remove_file(path),
        }
    }

    fn finish(self, storage: &Storage, repository: &str, digest: &str) -> Result<Response, ApiError> {
        let wanted: Sha256 = digest.parse().map_err(|_| ApiError::bad_digest(format!("{digest:?} is not a digest")))?;
        let found = Sha256(self.hasher.clone().finalize().into());
        if found != wanted {
            self.forget()?;
            return Err(ApiError::bad_digest(format!("{found} came, not {wanted}")));
        }
        let blob = match self.sink {
            Sink::Memory(bytes) => Blob::Memory(bytes.into()),
            Sink::File(_, path) => Blob::File { path, size_bytes: self.len_bytes },
        };
        storage.add_blob(repository, found, blob)?;
        Ok(created(repository, found))
    }
}

/// The uploads under way, by their number.
#[derive(Default)]
pub(crate) struct Uploads {
    open: tokio::sync::Mutex<HashMap<String, Upload>>,
    next_id: AtomicU64,
}

impl Uploads {
    /// Answers a request to `/v2/<repository>/blobs/uploads/<id>`; a request on an upload holds it until it is done.
    pub(crate) async fn answer(
        &self,
        storage: &Storage,
        (repository, id): (&str, &str),
        parameters: &Parameters,
        request: &Parts,
        body: Body,
    ) -> Result<Response, ApiError> {
        match request.method {
            Method::POST if id.is_empty() => self.begin(storage, repository, parameters, body).await,
            Method::PATCH => {
                let mut upload = self.take(id).await?;
                let starts_at = content_start(request);
                if starts_at.is_some_and(|start| start != upload.len_bytes) {
                    let answer = accepted(StatusCode::RANGE_NOT_SATISFIABLE, repository, id, upload.len_bytes);
                    self.open.lock().await.insert(id.into(), upload);
                    return Ok(answer);
                }
                upload.append(body).await?;
                let answer = accepted(StatusCode::ACCEPTED, repository, id, upload.len_bytes);
                self.open.lock().await.insert(id.into(), upload);
                Ok(answer)
            }
            Method::PUT => {
                let mut upload = self.take(id).await?;
                upload.append(body).await?;
                let digest = parameters.get("digest").map(String::as_str).unwrap_or_default();
                upload.finish(storage, repository, digest)
            }
            Method::GET => {
                let open = self.open.lock().await;
                let upload = open.get(id).ok_or_else(|| ApiError::not_found("BLOB_UPLOAD_UNKNOWN", id))?;
                Ok(accepted(StatusCode::NO_CONTENT, repository, id, upload.len_bytes))
            }
            Method::DELETE => {
                self.take(id).await?.forget()?;
                Ok(StatusCode::NO_CONTENT.into_response())
            }
            _ => Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "not for an upload")),
        }
    }

    /// Uploads that nothing has come for yet, and those between two requests.
    pub(crate) fn count(&self) -> usize {
        loop {
            // Held for moments only.
            match self.open.try_lock() {
                Ok(open) => return open.len(),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    async fn take(&self, id: &str) -> Result<Upload, ApiError> {
        self.open.lock().await.remove(id).ok_or_else(|| ApiError::not_found("BLOB_UPLOAD_UNKNOWN", id))
    }

    async fn begin(
        &self,
        storage: &Storage,
        repository: &str,
        parameters: &Parameters,
        body: Body,
    ) -> Result<Response, ApiError> {
        if let (Some(name), Some(from)) = (parameters.get("mount"), parameters.get("from"))
            && let Ok(digest) = name.parse::<Sha256>()
            && storage.mount(repository, digest, from)?
        {
            return Ok(created(repository, digest));
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed).to_string();
        let mut upload = Upload::new(storage, &id)?;
        if let Some(digest) = parameters.get("digest") {
            upload.append(body).await?;
            return upload.finish(storage, repository, digest);
        }
        let mut open = self.open.lock().await;
        if open.len() >= OPEN_UPLOADS {
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", "too many open uploads"));
        }
        open.insert(id.clone(), upload);
        Ok(accepted(StatusCode::ACCEPTED, repository, &id, 0))
    }
}

/// The first byte's place in the blob, from a `Content-Range` as uploads have it: `start-end`, no unit.
fn content_start(request: &Parts) -> Option<u64> {
    request.headers.get(CONTENT_RANGE)?.to_str().ok()?.split_once('-')?.0.parse().ok()
}

fn accepted(status: StatusCode, repository: &str, id: &str, len_bytes: u64) -> Response {
    let location = format!("/v2/{repository}/blobs/uploads/{id}");
    (status, [(LOCATION, location), (RANGE, format!("0-{}", len_bytes.saturating_sub(1)))]).into_response()
}

fn created(repository: &str, digest: Sha256) -> Response {
    let location = format!("/v2/{repository}/blobs/{digest}");
    (StatusCode::CREATED, [(LOCATION.as_str(), location), (CONTENT_DIGEST, digest.to_string())]).into_response()
}
