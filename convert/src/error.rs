//! The one error type of the crate: a kind that says what to do next, what it is about, and the cause.

use std::error::Error as StdError;
use std::fmt;

use ublkimg_registry::ErrorKind as RegistryKind;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn StdError + Send + Sync>;

/// What the operator can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The source, its tag or its platform does not exist: check the reference.
    NotFound,
    /// Log in, or ask for access.
    Unauthorized,
    /// The registry does not answer: try again later.
    Unavailable,
    /// The source is malformed: build it again. The message names the layer and the entry.
    BadSource,
    /// Bytes do not have the digest they must have: fetch or build the source again.
    VerificationFailed,
    /// No room: free some space or choose another `--tmpdir`.
    DiskFull,
    /// A valid source that this version cannot convert.
    Unsupported,
    /// An ordinary image where a converted one is needed: convert it first.
    NotOurs,
    /// The request itself makes no sense: correct the arguments.
    Usage,
    /// Reading or writing a local file failed.
    Io,
}

/// An error with its kind, the thing it is about, and its cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Cause>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn bad_source(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadSource, message)
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    pub(crate) fn damaged(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::VerificationFailed, message)
    }

    /// An I/O error about `what`. A full disk gets its own kind; errors of this crate and of the registry that travelled
    /// through [`std::io::Read`] come back as what they were.
    pub(crate) fn io(what: impl Into<String>, cause: std::io::Error) -> Self {
        if cause.get_ref().is_some_and(<dyn StdError + Send + Sync>::is::<Self>) {
            let inner = cause.into_inner().and_then(|inner| inner.downcast::<Self>().ok());
            return inner.map_or_else(|| Self::new(ErrorKind::Io, what), |inner| *inner);
        }
        if cause.get_ref().is_some_and(<dyn StdError + Send + Sync>::is::<ublkimg_registry::Error>) {
            let inner = cause.into_inner().and_then(|inner| inner.downcast::<ublkimg_registry::Error>().ok());
            return inner.map_or_else(|| Self::new(ErrorKind::Io, what), |inner| Self::from(*inner));
        }
        let kind = match cause.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::DiskFull,
            _ => ErrorKind::Io,
        };
        Self { kind, message: what.into(), source: Some(Box::new(cause)) }
    }

    /// An error opening something that the user named.
    pub(crate) fn open(what: impl Into<String>, cause: std::io::Error) -> Self {
        let kind = match cause.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Self { kind, message: what.into(), source: Some(Box::new(cause)) }
    }

    pub(crate) fn with_source(mut self, source: impl Into<Cause>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Puts the name of the thing being worked on in front of the message.
    pub(crate) fn within(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// What the operator can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let cause = self.source.as_deref()?;
        // An error of the registry gave its text to this one; only what is behind it is new.
        match cause.downcast_ref::<ublkimg_registry::Error>() {
            Some(error) => error.source(),
            None => Some(cause as _),
        }
    }
}

/// Lets an error cross a [`std::io::Read`]; [`Error::io`] takes it out again.
impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        Self::other(error)
    }
}

impl From<ublkimg_registry::Error> for Error {
    fn from(error: ublkimg_registry::Error) -> Self {
        let kind = match error.kind() {
            RegistryKind::NotFound => ErrorKind::NotFound,
            RegistryKind::Unauthorized => ErrorKind::Unauthorized,
            RegistryKind::Unavailable => ErrorKind::Unavailable,
            RegistryKind::Corrupt => ErrorKind::VerificationFailed,
            RegistryKind::Invalid => ErrorKind::Usage,
            RegistryKind::NoSpace => ErrorKind::DiskFull,
            RegistryKind::NotOurs => ErrorKind::NotOurs,
            RegistryKind::TooLarge => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Self { kind, message: error.to_string(), source: Some(Box::new(error)) }
    }
}
