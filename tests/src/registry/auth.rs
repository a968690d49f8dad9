//! Who may read and write: the layer that asks for Basic credentials or a Bearer token, and the place that gives out
//! tokens (`/_token`, after the distribution project's token specification).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;

use super::answer::ApiError;
use super::distribution::repository_of;

/// Tokens that are remembered; the oldest go first. More than the requests of any test.
const TOKENS: usize = 10_000;

/// What the registry asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// Nothing.
    #[default]
    Anonymous,
    /// User and password in each request.
    Basic(Credentials),
    /// A token for the repository and the action.
    Bearer {
        /// What the token server asks for.
        credentials: Credentials,
        /// Tokens to pull are given to anybody.
        anonymous_pull: bool,
        /// How long a token is good.
        token_lifetime_s: u64,
    },
}

/// A user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Name.
    pub user: String,
    /// Password.
    pub password: String,
}

impl Credentials {
    /// From both parts.
    pub fn new(user: &str, password: &str) -> Self {
        Self { user: user.into(), password: password.into() }
    }

    fn are_in(&self, headers: &HeaderMap) -> bool {
        let expected = base64::engine::general_purpose::STANDARD.encode(format!("{}:{}", self.user, self.password));
        authorization(headers, "Basic ") == Some(expected.as_str())
    }
}

fn authorization<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix(scheme)
}

/// What a token is good for.
struct Grant {
    scopes: Vec<String>,
    expires_at: Instant,
}

pub(crate) struct Gate {
    auth: Auth,
    address: SocketAddr,
    tokens: Mutex<(u64, HashMap<String, Grant>)>,
}

/// The outer side of the registry's own handlers.
pub(crate) async fn layer(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    match gate.answer(&request) {
        Some(answer) => answer,
        None => next.run(request).await,
    }
}

impl Gate {
    pub(crate) fn new(auth: Auth, address: SocketAddr) -> Self {
        Self { auth, address, tokens: Mutex::default() }
    }

    /// No token that was given out is good any more.
    pub(crate) fn revoke_tokens(&self) {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).1.clear();
    }

    /// `None`: the request may go on. Otherwise a refusal, or the token that was asked for.
    fn answer(&self, request: &Request) -> Option<Response> {
        match &self.auth {
            Auth::Anonymous => None,
            Auth::Basic(credentials) if credentials.are_in(request.headers()) => None,
            Auth::Basic(_) => Some(unauthorized("Basic realm=\"test\"")),
            Auth::Bearer { .. } if request.uri().path() == "/_token" => Some(self.grant(request)),
            Auth::Bearer { .. } => self.refusal_of_token(request),
        }
    }

    fn refusal_of_token(&self, request: &Request) -> Option<Response> {
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        let action = if is_read { "pull" } else { "push" };
        let repository = repository_of(request.uri().path());
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let grant = authorization(request.headers(), "Bearer ").and_then(|token| tokens.1.get(token));
        let granted = grant.is_some_and(|grant| {
            grant.expires_at > Instant::now()
                && repository.is_none_or(|name| grant.scopes.iter().any(|scope| allows(scope, name, action)))
        });
        if granted {
            return None;
        }
        let scope = repository.map(|name| {
            let actions = if is_read { "pull" } else { "pull,push" };
            format!(",scope=\"repository:{name}:{actions}\"")
        });
        let realm = format!("Bearer realm=\"http://{}/_token\",service=\"test\"", self.address);
        Some(unauthorized(&format!("{realm}{}", scope.unwrap_or_default())))
    }

    /// Gives out a token, with or without user and password.
    fn grant(&self, request: &Request) -> Response {
        let Auth::Bearer { credentials, anonymous_pull, token_lifetime_s } = &self.auth else {
            return StatusCode::NOT_FOUND.into_response();
        };
        let is_known = credentials.are_in(request.headers());
        if !is_known && (request.headers().contains_key(AUTHORIZATION) || !anonymous_pull) {
            return unauthorized("Basic realm=\"test\"");
        }
        let query = request.uri().query().unwrap_or_default();
        let scopes = query.split('&').filter_map(|pair| pair.strip_prefix("scope=")).map(decode_percent);
        let scopes: Vec<String> = scopes
            .flat_map(|scope| scope.split(' ').map(str::to_owned).collect::<Vec<_>>())
            .map(|scope| if is_known { scope } else { scope.replace("push", "") })
            .collect();
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.1.len() >= TOKENS {
            tokens.1.clear();
        }
        tokens.0 += 1;
        let token = format!("t0ken-secret-{}", tokens.0);
        let expires_at = Instant::now() + Duration::from_secs(*token_lifetime_s);
        tokens.1.insert(token.clone(), Grant { scopes, expires_at });
        let answer = serde_json::json!({"token": token, "expires_in": token_lifetime_s});
        ([("Content-Type", "application/json")], answer.to_string()).into_response()
    }
}

/// Whether `repository:<name>:<actions>` allows `action` on `repository`.
fn allows(scope: &str, repository: &str, action: &str) -> bool {
    scope
        .strip_prefix("repository:")
        .and_then(|scope| scope.strip_prefix(repository)?.strip_prefix(':'))
        .is_some_and(|actions| actions.split(',').any(|allowed| allowed == action))
}

fn decode_percent(text: &str) -> String {
    let mut decoded = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let hex = |byte: Option<u8>| char::from(byte?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => hex(bytes.next()).zip(hex(bytes.next())).map_or(b'%', |(high, low)| high * 16 + low),
            _ => byte,
        });
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn unauthorized(challenge: &str) -> Response {
    let mut response =
        ApiError::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "authentication required").into_response();
    if let Ok(value) = challenge.parse() {
        response.headers_mut().insert(WWW_AUTHENTICATE, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes() {
        assert!(allows("repository:a/b:pull,push", "a/b", "push"));
        assert!(!allows("repository:a/b:pull", "a/b", "push"));
        assert!(!allows("repository:a/b:pull", "a", "pull"));
        assert_eq!(decode_percent("repository%3Aa%2Fb%3Apull+x"), "repository:a/b:pull x");
    }
}
