//! What a caller can choose about a connection.

use std::path::PathBuf;
use std::time::Duration;

/// How to talk to a registry. Layout directories need none of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientOptions {
    /// Speak plain HTTP to this registry (and accept it in redirects and token addresses). Without it plain HTTP is for
    /// loopback hosts only.
    pub plain_http: bool,
    /// The one file to take credentials from, in the format of docker's `config.json` or containers' `auth.json`; an
    /// empty file means anonymous. `None` = `credential_files`.
    pub auth_file: Option<PathBuf>,
    /// Files of the same formats that are looked at in this order; those that are not there are passed over. None = the
    /// usual places of this process, see [`crate`].
    pub credential_files: Vec<PathBuf>,
    /// Directories with a `hosts.toml` for each registry, as containerd has them: the first one that has a file for a registry
    /// says which mirrors are tried before it. The file is read when a repository is opened.
    pub hosts_dirs: Vec<PathBuf>,
    /// How long a TCP and TLS connection may take.
    pub connect_timeout: Duration,
    /// How long the registry may take from the request to the head of the answer.
    pub response_timeout: Duration,
    /// How long a body may stand still.
    pub idle_timeout: Duration,
    /// No attempt at a request begins later than this after the first one. Time spent waiting for a free request slot, or
    /// for the end of a `Retry-After` that another request was given, does not count. Zero = one attempt.
    pub retry_deadline: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            plain_http: false,
            auth_file: None,
            credential_files: Vec::new(),
            hosts_dirs: Vec::new(),
            connect_timeout: Duration::from_secs(5),
            response_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(10),
            retry_deadline: Duration::from_secs(30),
        }
    }
}
