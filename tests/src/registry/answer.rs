//! Answers of the OCI distribution API: errors as JSON, and parts of blobs.

use axum::body::{Body, HttpBody};
use axum::http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use ublkimg_image::Sha256;

use super::range::{Asked, ContentRange, asked};
use super::stats::ServedBlob;
use super::storage::Blob;

/// The header that names what was stored or served.
pub(crate) const CONTENT_DIGEST: &str = "Docker-Content-Digest";

/// An error of the distribution API (OCI distribution spec, "Error Codes").
pub(crate) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    pub(crate) fn not_found(code: &'static str, what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, format!("{what} is not here"))
    }

    pub(crate) fn bad_digest(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
    }
}

impl From<std::io::Error> for ApiError {
    fn from(error: std::io::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = serde_json::json!({"errors": [{"code": self.code, "message": self.message}]});
        (self.status, [(CONTENT_TYPE, "application/json")], error.to_string()).into_response()
    }
}

/// Writes down the length of the body, which layers that wrap the body would hide: without it the answer is chunked.
pub(crate) fn fix_length(mut response: Response) -> Response {
    if let Some(len_bytes) = response.body().size_hint().exact()
        && !response.headers().contains_key(CONTENT_LENGTH)
    {
        response.headers_mut().insert(CONTENT_LENGTH, len_bytes.into());
    }
    response
}

/// Serves `blob`, whole or the range that is asked for.
pub(crate) fn serve(
    method: &Method,
    headers: &HeaderMap,
    digest: Sha256,
    media_type: &str,
    blob: &Blob,
) -> Result<Response, ApiError> {
    let size_bytes = blob.size_bytes();
    let (status, range) = match asked(headers, size_bytes) {
        Asked::Whole => (StatusCode::OK, 0..size_bytes),
        Asked::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Asked::Unsatisfiable => {
            let whole = [(CONTENT_RANGE, format!("bytes */{size_bytes}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, whole).into_response());
        }
    };
    let mut response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, media_type)
        .header(CONTENT_LENGTH, range.end - range.start)
        .header(ACCEPT_RANGES, "bytes")
        .header(CONTENT_DIGEST, digest.to_string());
    if status == StatusCode::PARTIAL_CONTENT {
        let content_range = ContentRange { start: range.start, end: range.end, size_bytes };
        response = response.header(CONTENT_RANGE, content_range.to_string());
    }
    let body = if method == Method::HEAD { Body::empty() } else { blob.body(range.clone())? };
    let mut response = response.body(body).map_err(std::io::Error::other)?;
    response.extensions_mut().insert(ServedBlob { digest: digest.to_string(), range });
    Ok(response)
}
