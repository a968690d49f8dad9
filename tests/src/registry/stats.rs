//! Counters: what clients asked for, and what was sent to them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};

use super::answer::fix_length;

/// Ranges kept per blob, in the order of asking; a test that needs more needs another way of counting.
const RANGES_PER_BLOB: usize = 100_000;

/// A snapshot of the counters since the start or the last reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Requests by kind: `manifest_get`, `manifest_head`, `manifest_put`, `blob_get`, `blob_head`, `upload`, `tags`,
    /// `referrers`, `token`, `ping`, `other`.
    pub requests: BTreeMap<String, u64>,
    /// Answers by status code.
    pub statuses: BTreeMap<u16, u64>,
    /// TCP connections accepted.
    pub connections: u64,
    /// Body bytes of all answers, as far as they were given to the link.
    pub bytes_sent: u64,
    /// Bytes of blobs that were sent more than once.
    pub duplicate_bytes: u64,
    /// When the last bytes of any answer reached a client, since the start or the last reset.
    pub delivered_us: u64,
    /// The most requests that were open (body not yet sent whole) at one time.
    pub max_concurrent_requests: u64,
    /// By digest, the blobs of which bytes were asked for; manifests are not among them.
    pub blobs: BTreeMap<String, BlobStats>,
    /// By digest, the bytes that came in uploads of blobs, whether they were stored or not.
    #[serde(default)]
    pub uploads: BTreeMap<String, u64>,
}

/// The counters of one blob.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobStats {
    /// GET requests answered with 200 or 206.
    pub requests: u64,
    /// When the first of them came, since the start or the last reset.
    pub first_request_us: u64,
    /// Body bytes given to the link.
    pub bytes_sent: u64,
    /// Bytes of these that had been sent before.
    pub duplicate_bytes: u64,
    /// The ranges asked for, in order; the first 100 000.
    pub ranges: Vec<Range<u64>>,
}

impl Stats {
    /// Requests of this kind.
    pub fn requests_of(&self, kind: &str) -> u64 {
        self.requests.get(kind).copied().unwrap_or(0)
    }
}

#[derive(Debug)]
struct Counted {
    since: Instant,
    stats: Stats,
    sent: BTreeMap<String, Coverage>,
    open_requests: u64,
}

impl Default for Counted {
    fn default() -> Self {
        Self { since: Instant::now(), stats: Stats::default(), sent: BTreeMap::new(), open_requests: 0 }
    }
}

impl Counted {
    fn elapsed_us(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    state: Mutex<Counted>,
}

impl Counters {
    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn snapshot(&self) -> Stats {
        self.lock().stats.clone()
    }

    /// Forgets all but the requests that are open.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        *state = Counted { open_requests: state.open_requests, ..Counted::default() };
    }

    pub(crate) fn count_connection(&self) {
        self.lock().stats.connections += 1;
    }

    /// Bytes have been written to a client's socket.
    pub(crate) fn delivered(&self) {
        let mut state = self.lock();
        state.stats.delivered_us = state.elapsed_us();
    }

    fn begin(self: &Arc<Self>, kind: &str) -> OpenRequest {
        let mut state = self.lock();
        *state.stats.requests.entry(kind.into()).or_default() += 1;
        state.open_requests += 1;
        state.stats.max_concurrent_requests = state.stats.max_concurrent_requests.max(state.open_requests);
        OpenRequest(Arc::clone(self))
    }

    fn answered(&self, status: u16, served: Option<&ServedBlob>) {
        let mut state = self.lock();
        *state.stats.statuses.entry(status).or_default() += 1;
        if let Some(served) = served {
            let now_us = state.elapsed_us();
            let blob = state.stats.blobs.entry(served.digest.clone()).or_default();
            if blob.requests == 0 {
                blob.first_request_us = now_us;
            }
            blob.requests += 1;
            if blob.ranges.len() < RANGES_PER_BLOB {
                blob.ranges.push(served.range.clone());
            }
        }
    }

    fn received(&self, digest: &str, len_bytes: u64) {
        *self.lock().stats.uploads.entry(digest.into()).or_default() += len_bytes;
    }

    fn sent(&self, len_bytes: u64, part: Option<(&str, u64)>) {
        let mut state = self.lock();
        state.stats.bytes_sent += len_bytes;
        if let Some((digest, offset_bytes)) = part {
            let new_bytes = state.sent.entry(digest.into()).or_default().insert(offset_bytes..offset_bytes + len_bytes);
            state.stats.duplicate_bytes += len_bytes - new_bytes;
            let blob = state.stats.blobs.entry(digest.into()).or_default();
            blob.bytes_sent += len_bytes;
            blob.duplicate_bytes += len_bytes - new_bytes;
        }
    }
}

/// Counts a request as open until it is dropped.
struct OpenRequest(Arc<Counters>);

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.lock().open_requests -= 1;
    }
}

/// Put on an answer by the handler that serves bytes of a blob.
#[derive(Clone)]
pub(crate) struct ServedBlob {
    pub(crate) digest: String,
    pub(crate) range: Range<u64>,
}

/// The outermost layer: counts what the client sees, faults included.
pub(crate) async fn layer(State(counters): State<Arc<Counters>>, request: Request, next: Next) -> Response {
    let kind = kind(request.method(), request.uri().path());
    let open = counters.begin(kind);
    let response = fix_length(next.run(count_upload(&counters, request)).await);
    let served = response.extensions().get::<ServedBlob>().filter(|_| kind == "blob_get").cloned();
    counters.answered(response.status().as_u16(), served.as_ref());
    let (parts, body) = response.into_parts();
    let mut position = served.as_ref().map_or(0, |served| served.range.start);
    let frames = body.into_data_stream().inspect(move |frame| {
        if let Ok(frame) = frame {
            let len_bytes = frame.len() as u64;
            open.0.sent(len_bytes, served.as_ref().map(|served| (served.digest.as_str(), position)));
            position += len_bytes;
        }
    });
    Response::from_parts(parts, Body::from_stream(frames))
}

/// Counts the body of a request that ends the upload of a blob.
fn count_upload(counters: &Arc<Counters>, request: Request) -> Request {
    let query = request.uri().query().unwrap_or_default();
    let digest = query.split('&').find_map(|pair| pair.strip_prefix("digest="));
    let Some(digest) = digest.map(|digest| digest.replace("%3A", ":")) else { return request };
    let counters = Arc::clone(counters);
    request.map(|body| {
        Body::from_stream(body.into_data_stream().inspect(move |frame| {
            if let Ok(frame) = frame {
                counters.received(&digest, frame.len() as u64);
            }
        }))
    })
}

fn kind(method: &Method, path: &str) -> &'static str {
    let is_head = method == Method::HEAD;
    match path {
        "/v2/" => "ping",
        "/_token" => "token",
        _ if path.contains("/blobs/uploads/") => "upload",
        _ if path.contains("/blobs/") && is_head => "blob_head",
        _ if path.contains("/blobs/") && method == Method::GET => "blob_get",
        _ if path.contains("/manifests/") && is_head => "manifest_head",
        _ if path.contains("/manifests/") && method == Method::GET => "manifest_get",
        _ if path.contains("/manifests/") && method == Method::PUT => "manifest_put",
        _ if path.ends_with("/tags/list") => "tags",
        _ if path.contains("/referrers/") => "referrers",
        _ => "other",
    }
}

/// The bytes of a blob that were sent, as disjoint ranges from start to end.
#[derive(Debug, Default)]
struct Coverage(BTreeMap<u64, u64>);

impl Coverage {
    /// Adds a range; returns how many bytes of it are new.
    fn insert(&mut self, range: Range<u64>) -> u64 {
        let Range { mut start, mut end } = range;
        let mut new_bytes = end.saturating_sub(start);
        let touching: Vec<(u64, u64)> = self
            .0
            .range(..=end)
            .rev()
            .take_while(|(_, other_end)| **other_end >= start)
            .map(|(s, e)| (*s, *e))
            .collect();
        let (from, to) = (start, end);
        for (other_start, other_end) in touching {
            new_bytes -= other_end.min(to) - other_start.max(from);
            self.0.remove(&other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        if start < end {
            self.0.insert(start, end);
        }
        new_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage_counts_new_bytes() {
        let mut coverage = Coverage::default();
        assert_eq!(coverage.insert(10..20), 10);
        assert_eq!(coverage.insert(30..40), 10);
        assert_eq!(coverage.insert(15..35), 10, "the gap");
        assert_eq!(coverage.insert(0..50), 20, "both ends");
        assert_eq!(coverage.insert(5..45), 0);
        assert_eq!(coverage.insert(50..60), 10, "adjacent");
        assert_eq!(coverage.insert(7..7), 0);
        assert_eq!(coverage.0, BTreeMap::from([(0, 60)]));
    }

    #[test]
    fn an_open_request_survives_a_reset() {
        let counters = Arc::new(Counters::default());
        let open = counters.begin("ping");
        counters.reset();
        let second = counters.begin("ping");
        assert_eq!(counters.snapshot().max_concurrent_requests, 2);
        drop((open, second));
        assert_eq!(counters.lock().open_requests, 0);
    }
}
