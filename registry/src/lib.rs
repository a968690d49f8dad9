//! OCI distribution registries and OCI layout directories behind one interface, [`Repository`].
//!
//! **Nothing is believed.** A manifest is hashed before it is handed out; a whole blob is hashed while it is read and the
//! reader fails at its end when digest or size differ. A *range* of a blob cannot be checked here: its caller knows the
//! hash of the range. What is checked for a range is all that HTTP says about it: status 206, the exact `Content-Range`,
//! the exact length. Every answer has a bound.
//!
//! **Trouble is waited out.** Refused and broken connections, silence, 408, 429 and 5xx, short bodies are tried again with
//! growing, jittered pauses until [`ClientOptions::retry_deadline`]; 401, 403 and 404 are answers, not trouble. A
//! `Retry-After` holds everything that this process asks of that registry. See `retry` and `gate`.
//!
//! **Secrets stay home.** `Authorization` goes to the registry's own host only; redirects are followed by this crate, not by
//! the HTTP library, and a redirect's address (signed, therefore secret) appears in no message. Credentials come, in this
//! order, from `$REGISTRY_AUTH_FILE` (and then from nowhere else), `$XDG_RUNTIME_DIR/containers/auth.json` (default
//! `/run/containers/UID/auth.json`), `$XDG_CONFIG_HOME/containers/auth.json` (default `~/.config`), `$DOCKER_CONFIG/config.json`
//! (default `~/.docker`), with their credential helpers. [`ClientOptions::credential_files`] names other places, for a
//! process that works for others; [`ClientOptions::auth_file`] replaces them all.
//!
//! **Mirrors** of a registry are tried before it, in the order of its `hosts.toml` in [`ClientOptions::hosts_dirs`]; see
//! `mirrors` and `hosts`.
//!
//! TLS is rustls with the system's root certificates (`SSL_CERT_FILE` and `SSL_CERT_DIR` replace them). Plain HTTP is
//! spoken to loopback hosts, and to others only with [`ClientOptions::plain_http`].

#![forbid(unsafe_code)]

mod artifact;
mod auth;
mod blob;
pub mod descriptor;
mod digest;
mod endpoint;
pub mod erofs_manifest;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gate;
mod hosts;
mod layout;
mod mirrors;
mod options;
pub mod profile;
mod reference;
mod remote;
mod repository;
mod retry;
mod tls;
mod transport;

pub use auth::usual_credential_files;
pub use blob::{BlobReader, BlobSource, RangeStream};
pub use digest::Digest;
pub use error::{Error, ErrorKind, Result};
/// The JSON documents of the OCI image specification.
pub use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest};
pub use options::ClientOptions;
pub use reference::{Location, Reference};
pub use repository::{NewProfile, Pushed, PushedProfile, Repository, Resolved};
pub use retry::jitter;

/// The longest manifest or index that is read or written: what registries accept (OCI distribution spec, "Pushing
/// Manifests": at least 4 MiB; docker's registry refuses more).
pub const MAX_MANIFEST_BYTES: usize = 4 << 20;
