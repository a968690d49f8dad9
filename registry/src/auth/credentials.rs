//! Credentials from docker's `config.json` and containers' `auth.json`.
//!
//! Both have the same form: `auths` maps a registry (docker; possibly written as an address) or a registry and a path in it
//! (containers) to a base64 `user:password` or an identity token; `credHelpers` maps registries to helper programs;
//! `credsStore` names one for all. In one file a helper for the registry wins, then the longest matching entry, then the
//! store; the first file with an answer wins. The files are read when a token is needed, not before, so a later login is
//! noticed and nothing secret stays in memory.

use std::collections::HashMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::engine::{DecodePaddingMode, general_purpose};
use serde::Deserialize;

use super::helper;
use crate::error::{Error, Result};
use crate::options::ClientOptions;

/// A file of credentials for every registry of the world is shorter.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Some programs leave the padding out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// docker files Docker Hub under this key.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// What to show a token service or a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// An OAuth 2 refresh token.
    Identity {
        token: String,
    },
}

impl Credentials {
    /// The value of a Basic `Authorization`; none for an identity token.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { user, password } => {
                let encoded = general_purpose::STANDARD.encode(format!("{user}:{password}"));
                Some(format!("Basic {encoded}"))
            }
            Self::Identity { .. } => None,
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// Which files to look in, in order.
#[derive(Debug, Clone)]
pub(super) struct CredentialFiles {
    files: Vec<PathBuf>,
    /// The user named this one file: it must exist.
    required: bool,
}

impl CredentialFiles {
    /// The file that the caller names, else the places that it names, else those of this process.
    pub(super) fn new(options: &ClientOptions) -> Self {
        Self::of(options, variable, rustix::process::getuid().as_raw())
    }

    fn of(options: &ClientOptions, variable: impl Fn(&str) -> Option<PathBuf>, user: u32) -> Self {
        if let Some(file) = &options.auth_file {
            return Self { files: vec![file.clone()], required: true };
        }
        if !options.credential_files.is_empty() {
            return Self { files: options.credential_files.clone(), required: false };
        }
        match variable("REGISTRY_AUTH_FILE") {
            Some(file) => Self { files: vec![file], required: true },
            None => Self { files: usual(variable, user), required: false },
        }
    }

    /// What is on file for a repository; `None` = nothing.
    ///
    /// # Errors
    /// `Invalid` for a file that cannot be read or parsed and for a helper that fails.
    pub(super) async fn find(&self, registry: &str, repository: &str) -> Result<Option<Credentials>> {
        for path in &self.files {
            let Some(file) = self.read(path)? else { continue };
            if let Some(program) = file.helper_for(registry) {
                if let Some(found) = helper::get(program, &helper_key(registry)).await? {
                    return Ok(Some(found));
                }
                continue;
            }
            if let Some(found) = file
                .entry(registry, repository)
                .map(Entry::credentials)
                .transpose()
                .map_err(|()| Error::invalid(format!("the entry for {registry} in {} is malformed", path.display())))?
                .flatten()
            {
                return Ok(Some(found));
            }
            if let Some(program) = file.creds_store.as_deref().filter(|program| !program.is_empty())
                && let Some(found) = helper::get(program, &helper_key(registry)).await?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn read(&self, path: &Path) -> Result<Option<AuthFile>> {
        let failed = |cause: &dyn fmt::Display| {
            Error::invalid(format!("cannot read credentials from {}: {cause}", path.display()))
        };
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound && !self.required => return Ok(None),
            Err(cause) => return Err(failed(&cause)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|cause| failed(&cause))?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(failed(&"it is longer than 1 MiB"));
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        // The parser's message may quote the file, and so a secret: only the place is passed on.
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Some).map_err(|cause| failed(&format_args!("line {} is not what it should be", cause.line())))
    }
}

/// Where podman and docker keep the logins of whoever runs this process, in the order in which they are looked at; absolute, and
/// whether the files are there or not. `$REGISTRY_AUTH_FILE` is not among them: it would be the only one.
#[must_use]
pub fn usual_credential_files() -> Vec<PathBuf> {
    let files = usual(variable, rustix::process::getuid().as_raw());
    files.iter().filter_map(|file| std::path::absolute(file).ok()).collect()
}

fn usual(variable: impl Fn(&str) -> Option<PathBuf>, user: u32) -> Vec<PathBuf> {
    let home = home(&variable, user);
    let in_home = |below: &str| home.as_ref().map(|home| home.join(below));
    // As podman has it (containers-auth.json(5)).
    let podman = variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers"));
    let podman = podman.unwrap_or_else(|| format!("/run/containers/{user}").into());
    let config = variable("XDG_CONFIG_HOME").or_else(|| in_home(".config"));
    let docker = variable("DOCKER_CONFIG").or_else(|| in_home(".docker"));
    let others = [(config, "containers/auth.json"), (docker, "config.json")];
    let others = others.into_iter().filter_map(|(dir, file)| Some(dir?.join(file)));
    std::iter::once(podman.join("auth.json")).chain(others).collect()
}

/// A system service has no HOME unless it has a User= (systemd.exec(5)).
fn home(variable: impl Fn(&str) -> Option<PathBuf>, user: u32) -> Option<PathBuf> {
    variable("HOME").or_else(|| (user == 0).then(|| PathBuf::from("/root")))
}

/// The home that a helper is to have, which keeps its own things there.
pub(super) fn own_home() -> Option<PathBuf> {
    home(variable, rustix::process::getuid().as_raw())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    identitytoken: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

impl AuthFile {
    fn helper_for(&self, registry: &str) -> Option<&str> {
        let helpers = self.cred_helpers.iter();
        let program =
            helpers.filter(|(key, _)| normalized(key) == registry).map(|(_, program)| program.as_str()).next();
        program.filter(|program| !program.is_empty())
    }

    /// The entry with the longest key that is the registry or a path in it down to the repository.
    fn entry(&self, registry: &str, repository: &str) -> Option<&Entry> {
        let full = format!("{registry}/{repository}");
        let covers = |key: &str| full.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let matching = self.auths.iter().map(|(key, entry)| (normalized(key), entry)).filter(|(key, _)| covers(key));
        // Of keys that are the same after all, the plainest written one: what comes is the same on every run.
        matching.max_by_key(|(key, _)| key.len()).map(|(_, entry)| entry)
    }
}

impl Entry {
    /// `Ok(None)` for an entry without content: docker leaves one behind where a helper keeps the secret.
    fn credentials(&self) -> std::result::Result<Option<Credentials>, ()> {
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = set(&self.identitytoken) {
            return Ok(Some(Credentials::Identity { token }));
        }
        if let Some(encoded) = set(&self.auth) {
            let decoded = BASE64.decode(encoded.trim()).map_err(|_| ())?;
            let decoded = String::from_utf8(decoded).map_err(|_| ())?;
            let (user, password) = decoded.split_once(':').ok_or(())?;
            // docker pads the decoded text with zeros at times.
            let password = password.trim_end_matches('\0');
            return Ok(Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() }));
        }
        Ok(set(&self.username)
            .zip(set(&self.password))
            .map(|(user, password)| Credentials::Password { user, password }))
    }
}

/// A key as `host[:port][/path]`: docker writes addresses, `https://index.docker.io/v1/` for Docker Hub.
fn normalized(key: &str) -> String {
    let address = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let key = match address {
        // Of an address only the host counts.
        Some(address) => address.split('/').next().unwrap_or_default(),
        None => key.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches("/v2"),
    };
    let (host, path) = key.split_once('/').map_or((key, None), |(host, path)| (host, Some(path)));
    let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
    path.map_or_else(|| host.to_owned(), |path| format!("{host}/{path}"))
}

fn helper_key(registry: &str) -> String {
    if registry == "docker.io" { DOCKER_HUB_KEY.to_owned() } else { registry.to_owned() }
}

#[cfg(test)]
#[path = "credentials_tests.rs"]
mod tests;
