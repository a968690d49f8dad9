//! One HTTP request and its answer, with time limits, and the words for what can go wrong with it.
//!
//! Two HTTP clients: the one for `http:` knows no root certificates, so a registry on loopback works on a machine that has
//! none; the one for `https:` is made when it is first needed. Neither follows redirects, retries or decompresses.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Body, Certificate, Client, ClientBuilder, Identity, Method, Response, StatusCode};
use tokio::time::timeout;
use url::Url;

use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::gate::Gate;
use crate::options::ClientOptions;
use crate::reference::{Reference, is_loopback};
use crate::retry::{Failure, Retry};
use crate::tls;

/// Idle connections kept for one host: as many as there can be requests.
const IDLE_CONNECTIONS: usize = crate::remote::MAX_REQUESTS;
/// A body slower than this is treated as standing still: one byte a second must not hold a reader for hours.
const SLOWEST_BYTES_PER_SECOND: u64 = 8 << 10;
/// An explanation of an error is not longer than this.
const MAX_ERROR_BYTES: usize = 8 << 10;
/// What of it fits in one line.
const MAX_REASON_CHARS: usize = 200;

pub(crate) struct Transport {
    endpoint: Endpoint,
    /// For messages.
    repository: String,
    plain: Client,
    tls: OnceLock<Client>,
    options: ClientOptions,
    gate: Arc<Gate>,
}

impl Transport {
    pub(crate) fn new(reference: &Reference, endpoint: Endpoint, options: &ClientOptions) -> Result<Self> {
        // Err = somebody chose a provider before: theirs is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain = client(options, &endpoint)
            .tls_certs_only([])
            .build()
            .map_err(|cause| Error::invalid("cannot set up HTTP").with_source(cause))?;
        let (tls, gate) = (OnceLock::new(), Gate::of(&endpoint.address));
        let repository = reference.repository().to_owned();
        Ok(Self { endpoint, repository, plain, tls, options: options.clone(), gate })
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        &self.options
    }

    /// Whether requests to `url` may carry the registry's `Authorization`.
    pub(crate) fn is_registry(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.address.origin()
    }

    /// Sends one request, once the gate is open, and waits for the head of the answer.
    pub(crate) async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: HeaderMap,
        body: Option<Bytes>,
    ) -> Result<Response, Failure> {
        self.gate.pass().await;
        let limit = self.options.connect_timeout + self.options.response_timeout;
        match timeout(limit, self.start(method, url, headers, body.map(Body::from))).await {
            Ok(result) => result,
            Err(_) => Err(Failure::later(self.silence(url, limit))),
        }
    }

    /// The same at once and without a limit of time, for a body that takes its own.
    pub(crate) async fn start(
        &self,
        method: Method,
        url: &Url,
        mut headers: HeaderMap,
        body: Option<Body>,
    ) -> Result<Response, Failure> {
        if self.is_registry(url) {
            let configured = &self.endpoint.headers;
            // What the request has already wins: a token of the registry's own service.
            let missing: Vec<_> = configured.keys().filter(|name| !headers.contains_key(*name)).collect();
            for name in missing {
                headers.extend(configured.get_all(name).iter().map(|value| (name.clone(), value.clone())));
            }
        }
        let mut request = self.client_for(url)?.request(method, url.clone()).headers(headers);
        if let Some(body) = body {
            request = request.body(body);
        }
        let response = request.send().await.map_err(|error| self.broken(url, error))?;
        if matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
            && let Some(told) = retry_after(response.headers())
        {
            tracing::debug!(host = self.name(url), ?told, "held by Retry-After");
            self.gate.close(told);
        }
        Ok(response)
    }

    /// The next piece of a body, `None` at its end.
    pub(crate) async fn piece(&self, response: &mut Response) -> Result<Option<Bytes>, Failure> {
        match timeout(self.options.idle_timeout, response.chunk()).await {
            Ok(result) => result.map_err(|error| self.broken(&response.url().clone(), error)),
            Err(_) => Err(Failure::later(self.silence(response.url(), self.options.idle_timeout))),
        }
    }

    /// A whole body of at most `limit_bytes`; `what` names it.
    pub(crate) async fn body(&self, mut response: Response, limit_bytes: usize, what: &str) -> Result<Bytes, Failure> {
        let too_large = || Error::too_large(format!("{what} is longer than {limit_bytes} bytes"));
        if response.content_length().is_some_and(|len| len > limit_bytes as u64) {
            return Err(too_large().into());
        }
        let limit = self.time_for(limit_bytes as u64);
        let host = response.url().clone();
        let read = async {
            let mut bytes = BytesMut::new();
            while let Some(piece) = self.piece(&mut response).await? {
                if bytes.len() + piece.len() > limit_bytes {
                    return Err(too_large().into());
                }
                bytes.extend_from_slice(&piece);
            }
            Ok(bytes.freeze())
        };
        match timeout(limit, read).await {
            Ok(result) => result,
            Err(_) => Err(Failure::later(self.silence(&host, limit))),
        }
    }

    /// How long a body of this length may take.
    pub(crate) fn time_for(&self, len_bytes: u64) -> Duration {
        self.options.idle_timeout + Duration::from_secs(len_bytes / SLOWEST_BYTES_PER_SECOND)
    }

    /// The failure that an answer with an unwelcome status stands for; `what` names what was asked for.
    pub(crate) async fn refusal(&self, response: Response, what: &str) -> Failure {
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let host = self.name(response.url());
        let reason = match status {
            // The body of a 416 is often shorter than its length says (docker's registry); a 404 says all.
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::NOT_FOUND => String::new(),
            _ => self.reason(response).await.map_or_else(String::new, |reason| format!(": {reason}")),
        };
        let (registry, repository) = (&self.endpoint.name, &self.repository);
        let error = |kind, text: String| Error::new(kind, format!("{text}{reason}"));
        match status {
            StatusCode::NOT_FOUND => {
                error(ErrorKind::NotFound, format!("repository {registry}/{repository} has no {what}")).into()
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                error(ErrorKind::Unauthorized, format!("{host} denies access to {what} in repository {repository}"))
                    .into()
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Failure {
                error: error(ErrorKind::Unavailable, format!("{host} answers {status} for {what}")),
                retry: Retry::Later { retry_after },
            },
            _ if status.is_server_error() => Failure {
                error: error(ErrorKind::Unavailable, format!("{host} answers {status} for {what}")),
                retry: Retry::Later { retry_after },
            },
            StatusCode::RANGE_NOT_SATISFIABLE => error(
                ErrorKind::Corrupt,
                format!("{what} in repository {registry}/{repository} is shorter than expected"),
            )
            .into(),
            StatusCode::PAYLOAD_TOO_LARGE => {
                error(ErrorKind::TooLarge, format!("{host} finds {what} too large")).into()
            }
            _ if status.is_client_error() => {
                error(ErrorKind::Invalid, format!("{host} answers {status} for {what}")).into()
            }
            _ => Failure::suspect(error(ErrorKind::Corrupt, format!("{host} answers {status} for {what}"))),
        }
    }

    /// What the operator knows the host of `url` as. Never the whole address: storage addresses carry a signature.
    pub(crate) fn name(&self, url: &Url) -> String {
        if self.is_registry(url) {
            return format!("registry {}", self.endpoint.name);
        }
        let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
        format!("{}{port} (for registry {})", url.host_str().unwrap_or_default(), self.endpoint.name)
    }

    fn client_for(&self, url: &Url) -> Result<&Client> {
        match url.scheme() {
            "https" => match self.tls.get() {
                Some(client) => Ok(client),
                None => {
                    let made = tls_client(&self.options, &self.endpoint)?;
                    Ok(self.tls.get_or_init(|| made))
                }
            },
            "http" if self.is_plain(url) || url.host_str().is_some_and(is_loopback) => Ok(&self.plain),
            "http" => Err(Error::invalid(format!("{} would be asked in plain HTTP", self.name(url)))),
            other => {
                Err(Error::corrupt(format!("registry {} points to an address of scheme {other}", self.endpoint.name)))
            }
        }
    }

    /// Whether the user has said that plain HTTP is spoken there: everywhere, or at this address, which a file names.
    fn is_plain(&self, url: &Url) -> bool {
        self.options.plain_http || self.is_registry(url)
    }

    fn silence(&self, url: &Url, limit: Duration) -> Error {
        Error::unavailable(format!("{} did not answer within {} s", self.name(url), limit.as_secs_f32()))
    }

    fn broken(&self, url: &Url, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        let (name, root) = (self.name(url), root_cause(&error));
        if let Some(trouble) = tls::trouble(&error) {
            return Error::unavailable(format!("{name} {trouble}")).with_source(error).into();
        }
        let text = if error.is_connect() && error.is_timeout() {
            format!("{name} is not reachable: no connection within {} s", self.options.connect_timeout.as_secs_f32())
        } else if error.is_connect() {
            format!("{name} is not reachable: {root}")
        } else {
            format!("the connection to {name} broke: {root}")
        };
        Failure::later(Error::unavailable(text).with_source(error))
    }

    /// The first error of an OCI error document (distribution spec, "Error Codes"), in one line.
    async fn reason(&self, response: Response) -> Option<String> {
        let body = self.body(response, MAX_ERROR_BYTES, "an error").await.ok()?;
        let document: serde_json::Value = serde_json::from_slice(&body).ok()?;
        let first = document.get("errors")?.get(0)?;
        let text = |key| first.get(key).and_then(serde_json::Value::as_str).filter(|text| !text.is_empty());
        let reason = text("message").or(text("code"))?;
        Some(reason.chars().filter(|c| !c.is_control()).take(MAX_REASON_CHARS).collect())
    }
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport").field("registry", &self.endpoint.name).finish_non_exhaustive()
    }
}

fn tls_client(options: &ClientOptions, endpoint: &Endpoint) -> Result<Client> {
    let mut builder = client(options, endpoint);
    for path in &endpoint.authorities {
        let certificates = Certificate::from_pem_bundle(&read(path)?).map_err(|cause| bad_file(path, cause))?;
        builder = builder.tls_certs_merge(certificates);
    }
    if let Some((certificate, key)) = &endpoint.identity {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        builder = builder.identity(Identity::from_pem(&pem).map_err(|cause| bad_file(certificate, cause))?);
    }
    builder.build().map_err(|cause| {
        let root = root_cause(&cause);
        Error::invalid(format!("cannot set up TLS (are root certificates installed?): {root}")).with_source(cause)
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|cause| Error::io(format_args!("cannot read {}", path.display()), cause))
}

fn bad_file(path: &Path, cause: reqwest::Error) -> Error {
    Error::invalid(format!("{} is no certificate in PEM: {}", path.display(), root_cause(&cause))).with_source(cause)
}

fn client(options: &ClientOptions, endpoint: &Endpoint) -> ClientBuilder {
    let client = Client::builder()
        .user_agent(concat!("ublkimg/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .connect_timeout(options.connect_timeout)
        .pool_max_idle_per_host(IDLE_CONNECTIONS);
    // A proxy cannot reach this machine's loopback, and hardly anybody lists it in NO_PROXY.
    if endpoint.address.host_str().is_some_and(is_loopback) { client.no_proxy() } else { client }
}

/// `Retry-After` in seconds. The form with a date is ignored: it would need both clocks to agree.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// The innermost cause in plain words: "connection refused" instead of a chain of wrappers.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut root = error;
    while let Some(cause) = root.source() {
        root = cause;
    }
    match root.downcast_ref::<std::io::Error>() {
        Some(io) if io.raw_os_error().is_some() => io.kind().to_string(),
        _ => root.to_string(),
    }
}
