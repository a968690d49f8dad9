//! The error of this crate.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What the operator can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The reference, or something that it names, does not exist: check the name.
    NotFound,
    /// The registry refused the credentials, or wants some: log in.
    Unauthorized,
    /// The registry cannot be reached or answers with server errors: try again later.
    Unavailable,
    /// A deadline passed: try again later, or allow more time.
    TimedOut,
    /// The reference names an image of another format: convert it first.
    NotOurs,
    /// Something fetched or stored is not what its digest, size or format promises: do not trust the source.
    Corrupt,
    /// The kernel or the machine lacks something: see `doctor`.
    Unsupported,
    /// The disk of the store is full: free some space.
    NoSpace,
    /// The request contradicts itself or the state of the system: correct it.
    Invalid,
    /// Somebody else uses the thing: stop them first.
    Busy,
    /// The operating system refused an operation: read the cause.
    Io,
    /// Something that cannot happen: report it.
    Internal,
}

/// The exit code of a process that ends with an error of this kind. Part of the command line's contract.
const EXIT_CODES: [(ErrorKind, u8); 12] = [
    (ErrorKind::Internal, 1),
    (ErrorKind::Invalid, 2),
    (ErrorKind::NotFound, 3),
    (ErrorKind::Unauthorized, 4),
    (ErrorKind::NotOurs, 5),
    (ErrorKind::Corrupt, 6),
    (ErrorKind::Unavailable, 7),
    (ErrorKind::TimedOut, 7),
    (ErrorKind::Unsupported, 8),
    (ErrorKind::Busy, 9),
    (ErrorKind::NoSpace, 10),
    (ErrorKind::Io, 12),
];

impl ErrorKind {
    /// The exit code of a process that ends with an error of this kind; 11 is left for malformed source images, which
    /// this crate does not read.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        EXIT_CODES.iter().find(|(kind, _)| *kind == self).map_or(1, |(_, code)| *code)
    }

    /// The kind that a child process which ended with `code` meant.
    #[must_use]
    pub fn from_exit_code(code: i32) -> Option<Self> {
        EXIT_CODES.iter().find(|(_, known)| i32::from(*known) == code).map(|(kind, _)| *kind)
    }
}

/// One line that names what failed, its kind, and its cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    what: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without a cause. `what` is one line that names the thing (path, digest, offset).
    #[must_use]
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), source: None }
    }

    /// The same with a cause.
    #[must_use]
    pub fn caused(
        kind: ErrorKind,
        what: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, what: what.into(), source: Some(source.into()) }
    }

    /// An operating system error; its kind follows from the errno (a full disk is [`ErrorKind::NoSpace`]).
    #[must_use]
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::caused(kind, what, source)
    }

    /// An operating system error about a path; `doing` is a verb ("open", "write").
    #[must_use]
    pub fn path(doing: &str, path: &Path, source: std::io::Error) -> Self {
        Self::io(format!("{doing} {}", path.display()), source)
    }

    /// An error of a registry; `what` names what was asked of it.
    #[must_use]
    pub fn registry(what: impl Into<String>, source: ublkimg_registry::Error) -> Self {
        use ublkimg_registry::ErrorKind as Kind;
        let kind = match source.kind() {
            Kind::NotFound => ErrorKind::NotFound,
            Kind::Unauthorized => ErrorKind::Unauthorized,
            Kind::Unavailable => ErrorKind::Unavailable,
            Kind::Corrupt | Kind::TooLarge => ErrorKind::Corrupt,
            Kind::Invalid => ErrorKind::Invalid,
            Kind::NotOurs => ErrorKind::NotOurs,
            Kind::Io => ErrorKind::Io,
            Kind::NoSpace => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        };
        Self::caused(kind, what, source)
    }

    /// The kind, for deciding what to do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The error and its causes on one line, for a log or another process.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !line.contains(&text) {
                line = format!("{line}: {text}");
            }
            cause = error.source();
        }
        line.replace('\n', " ")
    }

    /// What a block request that met this error is answered with: a positive errno.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self.kind {
            ErrorKind::NoSpace => libc::ENOSPC,
            _ => libc::EIO,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_an_exit_code_that_leads_back() {
        for (kind, code) in EXIT_CODES {
            assert_eq!(kind.exit_code(), code);
            let back = ErrorKind::from_exit_code(i32::from(code)).unwrap();
            assert_eq!(back.exit_code(), code);
        }
        assert_eq!(ErrorKind::from_exit_code(0), None);
    }
}
