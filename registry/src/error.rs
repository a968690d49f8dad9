//! The error of this crate: what kind of trouble, the thing it happened to, and the cause.

use std::fmt;

type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What went wrong, as far as it decides what the operator does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The repository, tag, manifest, blob or directory does not exist: correct the name.
    NotFound,
    /// Credentials are missing, refused or not sufficient: log in.
    Unauthorized,
    /// The registry is down, does not answer in time, or is overloaded: try again later.
    Unavailable,
    /// The registry or directory answered with something other than what was asked for: wrong digest, wrong length,
    /// wrong range, malformed answer.
    Corrupt,
    /// The request itself makes no sense: a malformed reference, an ambiguous layout directory, a wrong option.
    Invalid,
    /// The answer is longer than the bound for its kind.
    TooLarge,
    /// A valid image, but not one with EROFS layers: convert it.
    NotOurs,
    /// A local file could not be read or written.
    Io,
    /// The disk of a local file is full: free some space.
    NoSpace,
}

/// An error of a registry or a layout directory.
///
/// Displays as one line that names the thing; the cause, where there is one, is its [`source`](std::error::Error::source).
/// Neither contains a credential, a token or the query of an address (storage addresses are signed there).
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Cause>,
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unauthorized, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::TooLarge, message)
    }

    /// A failed file operation: `what` names the operation and the path.
    pub(crate) fn io(what: impl fmt::Display, cause: std::io::Error) -> Self {
        let kind = match cause.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::new(kind, format!("{what}: {cause}")).with_source(cause)
    }

    pub(crate) fn with_source(mut self, cause: impl Into<Cause>) -> Self {
        self.source = Some(cause.into());
        self
    }

    /// Says how often it was tried, where that was more than once.
    pub(crate) fn after_attempts(mut self, attempts: u32) -> Self {
        if attempts > 1 {
            self.message.push_str(&format!(" (gave up after {attempts} attempts)"));
        }
        self
    }

    /// What went wrong, for a decision.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|cause| cause.as_ref() as _)
    }
}

/// For readers behind [`tokio::io::AsyncRead`]: the error of this crate stays inside and can be got back with
/// [`std::io::Error::downcast`].
impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind {
            ErrorKind::NotFound => std::io::ErrorKind::NotFound,
            ErrorKind::Unauthorized => std::io::ErrorKind::PermissionDenied,
            ErrorKind::Unavailable => std::io::ErrorKind::TimedOut,
            ErrorKind::Corrupt | ErrorKind::TooLarge => std::io::ErrorKind::InvalidData,
            ErrorKind::Invalid | ErrorKind::NotOurs => std::io::ErrorKind::InvalidInput,
            ErrorKind::Io => std::io::ErrorKind::Other,
            ErrorKind::NoSpace => std::io::ErrorKind::StorageFull,
        };
        Self::new(kind, error)
    }
}
