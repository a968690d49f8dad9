//! Convincing the registry: what goes into `Authorization`, and when it is renewed.
//!
//! The first request goes without; its 401 says what the registry wants, and from then on requests of every scope carry it
//! at once. Bearer tokens are kept per scope and renewed shortly before they end by this machine's own clock (their age
//! counts from their arrival, so the two clocks need not agree) and whenever one is refused, with 401 or, as some registries
//! have it, with 403. However many requests are
//! refused at once, one asks the token service and all use its answer, also when that answer is a failure.

use std::collections::HashMap;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::Url;

use crate::error::{Error, ErrorKind, Result};
use crate::options::ClientOptions;
use crate::retry::{Failure, Retry};
use crate::transport::Transport;

pub(crate) mod challenge;
mod credentials;
mod helper;

use challenge::Challenge;
pub use credentials::usual_credential_files;
use credentials::{CredentialFiles, Credentials};

/// Tokens of cloud registries reach 10 KiB.
const MAX_TOKEN_BYTES: usize = 64 << 10;
/// What a token is good for when its service does not say (docs.docker.com/registry/spec/auth/token).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// A token is renewed this long before its end, so that a request under way does not outlive it.
const RENEWAL_MARGIN: Duration = Duration::from_secs(10);
/// The name that OAuth 2 token services want from every client.
const CLIENT_ID: &str = "ublkimg";

/// Something that the registry accepts, until it ends.
#[derive(Clone)]
pub(crate) struct Grant {
    header: HeaderValue,
    renew_at: Option<Instant>,
    /// Whether the user's credentials are behind it.
    personal: bool,
}

impl Grant {
    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        headers.insert(AUTHORIZATION, self.header.clone());
    }

    fn new(header: &str, lifetime: Option<Duration>, personal: bool) -> Result<Self> {
        let mut header = HeaderValue::from_str(header)
            .map_err(|_| Error::corrupt("credentials or a token with characters that HTTP does not allow"))?;
        header.set_sensitive(true);
        let renew_at = lifetime.map(|lifetime| Instant::now() + lifetime - RENEWAL_MARGIN.min(lifetime / 5));
        Ok(Self { header, renew_at, personal })
    }
}

/// What a request wants to do, in the words of the token specification.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scope(Vec<String>);

impl Scope {
    pub(crate) fn pull(repository: &str) -> Self {
        Self(vec![format!("repository:{repository}:pull")])
    }

    /// Push, and read another repository of the registry to link a blob from it.
    pub(crate) fn push(repository: &str, from: Option<&str>) -> Self {
        let push = format!("repository:{repository}:pull,push");
        Self(std::iter::once(push).chain(from.map(|from| format!("repository:{from}:pull"))).collect())
    }
}

/// The state of one repository's access.
pub(crate) struct Authenticator {
    registry: String,
    repository: String,
    files: CredentialFiles,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    challenge: Option<Challenge>,
    /// At most one for each scope in use: pull, push, push with a source to link from.
    grants: HashMap<Scope, Grant>,
    /// The last failure to get one, for those who waited for it.
    failed: Option<(Instant, ErrorKind, String, Retry)>,
}

impl Authenticator {
    pub(crate) fn new(registry: &str, repository: &str, options: &ClientOptions) -> Self {
        let files = CredentialFiles::new(options);
        let (registry, repository) = (registry.to_owned(), repository.to_owned());
        Self { registry, repository, files, state: Mutex::default() }
    }

    /// What to send along; `None` until the registry has asked for something.
    pub(crate) async fn grant(&self, transport: &Transport, scope: &Scope) -> Result<Option<Grant>, Failure> {
        let arrived = Instant::now();
        let mut state = self.state.lock().await;
        let Some(challenge) = state.challenge.clone() else { return Ok(None) };
        match state.grants.get(scope) {
            Some(grant) if grant.renew_at.is_none_or(|at| Instant::now() < at) => Ok(Some(grant.clone())),
            _ => self.obtain(&mut state, arrived, transport, scope, &challenge).await.map(Some),
        }
    }

    /// What to send along instead of `refused`, after a 401 with these headers.
    pub(crate) async fn renew(
        &self,
        transport: &Transport,
        scope: &Scope,
        headers: &HeaderMap,
        refused: Option<&Grant>,
    ) -> Result<Grant, Failure> {
        let arrived = Instant::now();
        let mut state = self.state.lock().await;
        if let Some(grant) = state.grants.get(scope)
            && refused.is_none_or(|refused| refused.header != grant.header)
        {
            return Ok(grant.clone());
        }
        let challenge = Challenge::of(headers).ok_or_else(|| {
            Error::unauthorized(format!("registry {} wants credentials of an unknown kind", self.registry))
        })?;
        let grant = self.obtain(&mut state, arrived, transport, scope, &challenge).await?;
        if refused.is_some_and(|refused| refused.header == grant.header) {
            return Err(self.denied(Some(&grant)).into());
        }
        state.challenge = Some(challenge);
        Ok(grant)
    }

    /// What to send along instead of `refused`, after a 403; `None` if it is no token, or there is no other.
    pub(crate) async fn renew_token(
        &self,
        transport: &Transport,
        scope: &Scope,
        refused: &Grant,
    ) -> Result<Option<Grant>, Failure> {
        let arrived = Instant::now();
        let mut state = self.state.lock().await;
        let Some(challenge @ Challenge::Bearer { .. }) = state.challenge.clone() else { return Ok(None) };
        let other = |grant: Grant| Some(grant).filter(|grant| grant.header != refused.header);
        match state.grants.get(scope).cloned().and_then(other) {
            Some(grant) => Ok(Some(grant)),
            None => self.obtain(&mut state, arrived, transport, scope, &challenge).await.map(other),
        }
    }

    /// What to tell the user when a fresh grant was refused.
    pub(crate) fn denied(&self, grant: Option<&Grant>) -> Error {
        self.denial(grant.is_some_and(|grant| grant.personal))
    }

    fn denial(&self, personal: bool) -> Error {
        let (registry, repository) = (&self.registry, &self.repository);
        let remedy = format!("run \"docker login {registry}\" or give --auth-file");
        Error::unauthorized(if personal {
            format!("credentials for {registry} were refused; {remedy}")
        } else {
            format!("registry {registry} wants credentials for repository {repository}; {remedy}")
        })
    }

    async fn obtain(
        &self,
        state: &mut State,
        arrived: Instant,
        transport: &Transport,
        scope: &Scope,
        challenge: &Challenge,
    ) -> Result<Grant, Failure> {
        if let Some((at, kind, text, retry)) = &state.failed
            && *at > arrived
        {
            return Err(Failure { error: Error::new(*kind, text.clone()), retry: *retry });
        }
        match self.fetch(transport, scope, challenge).await {
            Ok(grant) => {
                state.grants.insert(scope.clone(), grant.clone());
                Ok(grant)
            }
            Err(failure) => {
                state.grants.remove(scope);
                let text = failure.error.to_string();
                state.failed = Some((Instant::now(), failure.error.kind(), text, failure.retry));
                Err(failure)
            }
        }
    }

    async fn fetch(&self, transport: &Transport, scope: &Scope, challenge: &Challenge) -> Result<Grant, Failure> {
        let credentials = self.files.find(&self.registry, &self.repository).await?;
        match challenge {
            Challenge::Basic => match credentials.as_ref().and_then(Credentials::basic) {
                Some(header) => Ok(Grant::new(&header, None, true)?),
                None => Err(self.denied(None).into()),
            },
            Challenge::Bearer { realm, service, scopes } => {
                let realm = Url::parse(realm)
                    .map_err(|_| Error::corrupt(format!("registry {} names no token service", self.registry)))?;
                // A registry may want a scope of its own (a cloud account), besides the repository's.
                let extra = scopes.iter().filter(|scope| !scope.starts_with("repository:"));
                let scopes: Vec<_> = scope.0.iter().chain(extra).map(String::as_str).collect();
                self.fetch_token(transport, realm, service.as_deref(), &scopes, credentials).await
            }
        }
    }

    async fn fetch_token(
        &self,
        transport: &Transport,
        mut realm: Url,
        service: Option<&str>,
        scopes: &[&str],
        credentials: Option<Credentials>,
    ) -> Result<Grant, Failure> {
        let personal = credentials.is_some();
        let mut headers = HeaderMap::new();
        let response = if let Some(Credentials::Identity { token }) = &credentials {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            let form = identity_form(token, service, scopes);
            transport.send(Method::POST, &realm, headers, Some(form.into())).await?
        } else {
            realm.query_pairs_mut().extend_pairs(service.map(|service| ("service", service)));
            realm.query_pairs_mut().extend_pairs(scopes.iter().map(|scope| ("scope", *scope)));
            if let Some(header) = credentials.as_ref().and_then(Credentials::basic) {
                Grant::new(&header, None, true)?.apply(&mut headers);
            }
            transport.send(Method::GET, &realm, headers, None).await?
        };
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.denial(personal).into()),
            StatusCode::BAD_REQUEST if personal => return Err(self.denial(true).into()),
            _ => return Err(transport.refusal(response, "token").await),
        }
        let name = transport.name(&realm);
        let body = transport.body(response, MAX_TOKEN_BYTES, &format!("the token from {name}")).await?;
        let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_| {
            Failure::suspect(Error::corrupt(format!("{name} answers with something other than a token")))
        })?;
        Ok(answer.grant(&name, personal)?)
    }
}

/// docs.docker.com/registry/spec/auth/oauth
fn identity_form(token: &str, service: Option<&str>, scopes: &[&str]) -> String {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token);
    form.append_pair("client_id", CLIENT_ID).append_pair("scope", &scopes.join(" "));
    form.extend_pairs(service.map(|service| ("service", service)));
    form.finish()
}

impl std::fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authenticator").field("registry", &self.registry).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
pub(crate) struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u32>,
}

impl TokenAnswer {
    /// What the service `name` has granted.
    pub(crate) fn grant(self, name: &str, personal: bool) -> Result<Grant> {
        let token = self.token.or(self.access_token).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| Error::corrupt(format!("{name} answers without a token")))?;
        let lifetime = self.expires_in.map_or(DEFAULT_LIFETIME, |seconds| Duration::from_secs(u64::from(seconds)));
        Grant::new(&format!("Bearer {token}"), Some(lifetime), personal)
    }
}
