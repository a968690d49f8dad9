//! The one error type of this crate.

use std::fmt;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, in terms of what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Bytes that were read break the format. Do not use the image; fetch it again or blame its producer.
    Corrupt,
    /// Bytes that were read may be right, but use a feature that is not supported here.
    Unsupported,
    /// What is to be written does not fit the format (a number of blocks, links, entries, bytes).
    TooLarge,
    /// What is to be written makes no sense (a name with a slash, an address outside of its device).
    Invalid,
}

/// An error with the part of the format it is about and, when there is one, the place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    part: &'static str,
    detail: String,
    offset_bytes: Option<u64>,
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.part, self.detail)?;
        match self.offset_bytes {
            Some(offset) => write!(f, " (at byte {offset})"),
            None => Ok(()),
        }
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, part: &'static str, detail: impl Into<String>) -> Self {
        Self { kind, part, detail: detail.into(), offset_bytes: None }
    }

    pub(crate) fn corrupt(part: &'static str, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, part, detail)
    }

    pub(crate) fn unsupported(part: &'static str, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, part, detail)
    }

    pub(crate) fn too_large(part: &'static str, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::TooLarge, part, detail)
    }

    pub(crate) fn invalid(part: &'static str, detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, part, detail)
    }

    /// Adds the place of the fault, in bytes from the start of the part. The first place given stays.
    pub(crate) fn at(mut self, offset_bytes: u64) -> Self {
        self.offset_bytes.get_or_insert(offset_bytes);
        self
    }

    /// What kind of fault this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The part of the format it is about, such as "chunk index".
    pub fn part(&self) -> &'static str {
        self.part
    }

    /// Where in that part, in bytes, if that is known.
    pub fn offset_bytes(&self) -> Option<u64> {
        self.offset_bytes
    }
}
