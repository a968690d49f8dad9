//! The OCI distribution API: manifests, blobs, tags and referrers. Uploads are next door.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::header::{CONTENT_TYPE, LOCATION};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Limited};
use serde_json::json;
use ublkimg_image::Sha256;

use super::answer::{ApiError, CONTENT_DIGEST, serve};
use super::storage::Storage;
use super::uploads::Uploads;

/// The largest manifest accepted, as docker's registry has it.
const MANIFEST_MAX_BYTES: usize = 4 * 1024 * 1024;

pub(crate) type Parameters = BTreeMap<String, String>;

/// The registry behind its layers.
pub(crate) struct Distribution {
    pub(crate) storage: Arc<Storage>,
    pub(crate) uploads: Uploads,
    /// Whether it has the referrers API.
    pub(crate) has_referrers: bool,
}

/// `/v2/<name>/...`, where the name may contain slashes.
enum Route<'a> {
    Ping,
    Manifest {
        repository: &'a str,
        reference: &'a str,
    },
    Blob {
        repository: &'a str,
        digest: &'a str,
    },
    /// `id` is empty for a new one.
    Upload {
        repository: &'a str,
        id: &'a str,
    },
    Tags {
        repository: &'a str,
    },
    Referrers {
        repository: &'a str,
        digest: &'a str,
    },
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Option<Self> {
        let path = path.strip_prefix("/v2/")?;
        if path.is_empty() {
            return Some(Self::Ping);
        }
        if let Some((repository, id)) = path.rsplit_once("/blobs/uploads/") {
            return Some(Self::Upload { repository, id });
        }
        if let Some(repository) = path.strip_suffix("/tags/list") {
            return Some(Self::Tags { repository });
        }
        let (rest, last) = path.rsplit_once('/')?;
        match rest.rsplit_once('/')? {
            (repository, "manifests") => Some(Self::Manifest { repository, reference: last }),
            (repository, "blobs") => Some(Self::Blob { repository, digest: last }),
            (repository, "referrers") => Some(Self::Referrers { repository, digest: last }),
            _ => None,
        }
    }
}

/// The repository that a request is about, for the scope of a token.
pub(crate) fn repository_of(path: &str) -> Option<&str> {
    match Route::of(path)? {
        Route::Ping => None,
        Route::Manifest { repository, .. }
        | Route::Blob { repository, .. }
        | Route::Upload { repository, .. }
        | Route::Tags { repository }
        | Route::Referrers { repository, .. } => Some(repository),
    }
}

/// Answers every request under `/v2/`.
pub(crate) async fn handle(
    State(registry): State<Arc<Distribution>>,
    Query(parameters): Query<Parameters>,
    request: Request,
) -> Response {
    registry.answer(&parameters, request).await.unwrap_or_else(IntoResponse::into_response)
}

impl Distribution {
    async fn answer(&self, parameters: &Parameters, request: Request) -> Result<Response, ApiError> {
        let (parts, body) = request.into_parts();
        let (method, headers) = (&parts.method, &parts.headers);
        let route = Route::of(parts.uri.path()).ok_or_else(|| ApiError::not_found("UNSUPPORTED", parts.uri.path()))?;
        let is_read = matches!(*method, Method::GET | Method::HEAD);
        match route {
            Route::Ping if is_read => Ok(([(CONTENT_TYPE, "application/json")], "{}").into_response()),
            Route::Manifest { repository, reference } if is_read => {
                self.manifest(method, headers, repository, reference)
            }
            Route::Manifest { repository, reference } if method == Method::PUT => {
                self.put_manifest(headers, repository, reference, body).await
            }
            Route::Blob { repository, digest } if is_read => self.blob(method, headers, repository, digest),
            Route::Upload { repository, id } => {
                self.uploads.answer(&self.storage, (repository, id), parameters, &parts, body).await
            }
            Route::Tags { repository } if is_read => self.tags(repository),
            Route::Referrers { .. } if !self.has_referrers => {
                Err(ApiError::not_found("UNSUPPORTED", "the referrers API"))
            }
            Route::Referrers { repository, digest } if is_read => {
                self.referrers(repository, digest, parameters.get("artifactType").map(String::as_str))
            }
            _ => Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", format!("{method} is not for this"))),
        }
    }

    fn manifest(
        &self,
        method: &Method,
        headers: &HeaderMap,
        repository: &str,
        reference: &str,
    ) -> Result<Response, ApiError> {
        let (digest, media_type, blob) = self
            .storage
            .manifest(repository, reference)
            .ok_or_else(|| ApiError::not_found("MANIFEST_UNKNOWN", &format!("{repository}:{reference}")))?;
        serve(method, headers, digest, &media_type, &blob)
    }

    async fn put_manifest(
        &self,
        headers: &HeaderMap,
        repository: &str,
        reference: &str,
        body: Body,
    ) -> Result<Response, ApiError> {
        let bytes = Limited::new(body, MANIFEST_MAX_BYTES)
            .collect()
            .await
            .map_err(|error| ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", error.to_string()))?
            .to_bytes();
        let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let tag = match reference.parse::<Sha256>() {
            Ok(digest) if digest != Sha256::of(&bytes) => {
                return Err(ApiError::bad_digest(format!("the manifest is not {reference}")));
            }
            Ok(_) => None,
            Err(_) => Some(reference),
        };
        self.check_manifest(repository, &bytes)?;
        let subject = serde_json::from_slice::<serde_json::Value>(&bytes)
            .ok()
            .and_then(|manifest| Some(manifest.get("subject")?.get("digest")?.as_str()?.to_owned()))
            .filter(|_| self.has_referrers);
        let digest = self.storage.add_manifest(repository, bytes, media_type, tag)?;
        let location = format!("/v2/{repository}/manifests/{digest}");
        let mut response = (StatusCode::CREATED, [(LOCATION.as_str(), location), (CONTENT_DIGEST, digest.to_string())])
            .into_response();
        if let Some(value) = subject.and_then(|subject| subject.parse().ok()) {
            response.headers_mut().insert("OCI-Subject", value);
        }
        Ok(response)
    }

    /// As docker's registry: what a manifest names must be there.
    fn check_manifest(&self, repository: &str, bytes: &[u8]) -> Result<(), ApiError> {
        let invalid = |message: String| ApiError::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message);
        let manifest: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        let listed = |key: &str| manifest.get(key).and_then(|value| value.as_array()).cloned().unwrap_or_default();
        for (descriptor, code) in manifest
            .get("config")
            .into_iter()
            .cloned()
            .chain(listed("layers"))
            .map(|descriptor| (descriptor, "MANIFEST_BLOB_UNKNOWN"))
            .chain(listed("manifests").into_iter().map(|descriptor| (descriptor, "MANIFEST_UNKNOWN")))
        {
            let name = descriptor.get("digest").and_then(|digest| digest.as_str()).unwrap_or_default();
            let digest: Sha256 = name.parse().map_err(|_| invalid(format!("{name:?} is not a digest")))?;
            if self.storage.blob(repository, digest).is_none() {
                return Err(ApiError::not_found(code, name));
            }
        }
        Ok(())
    }

    fn blob(&self, method: &Method, headers: &HeaderMap, repository: &str, name: &str) -> Result<Response, ApiError> {
        let digest: Sha256 =
            name.parse().map_err(|_| ApiError::bad_digest(format!("{name:?} is not a SHA-256 digest")))?;
        let blob = self.storage.blob(repository, digest).ok_or_else(|| ApiError::not_found("BLOB_UNKNOWN", name))?;
        serve(method, headers, digest, "application/octet-stream", &blob)
    }

    fn tags(&self, repository: &str) -> Result<Response, ApiError> {
        let contents =
            self.storage.repository(repository).ok_or_else(|| ApiError::not_found("NAME_UNKNOWN", repository))?;
        let tags: Vec<&String> = contents.tags.keys().collect();
        Ok(json_answer("application/json", &json!({"name": repository, "tags": tags})))
    }

    fn referrers(&self, repository: &str, subject: &str, only: Option<&str>) -> Result<Response, ApiError> {
        let contents = self.storage.repository(repository).unwrap_or_default();
        let mut descriptors = Vec::new();
        for (name, media_type) in &contents.manifests {
            let Some((_, _, blob)) = self.storage.manifest(repository, name) else { continue };
            let Ok(manifest) = serde_json::from_slice::<serde_json::Value>(&blob.read()?) else { continue };
            if manifest.pointer("/subject/digest").and_then(|digest| digest.as_str()) == Some(subject) {
                let artifact_type = manifest.get("artifactType").or_else(|| manifest.pointer("/config/mediaType"));
                if only.is_some() && artifact_type.and_then(|kind| kind.as_str()) != only {
                    continue;
                }
                descriptors.push(json!({
                    "mediaType": media_type, "digest": name, "size": blob.size_bytes(),
                    "artifactType": artifact_type, "annotations": manifest.get("annotations"),
                }));
            }
        }
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": descriptors});
        let mut response = json_answer(media_type, &index);
        if only.is_some() {
            response.headers_mut().insert("OCI-Filters-Applied", HeaderValue::from_static("artifactType"));
        }
        Ok(response)
    }
}

fn json_answer(media_type: &'static str, value: &serde_json::Value) -> Response {
    ([(CONTENT_TYPE, media_type)], value.to_string()).into_response()
}
