//! `Range` and `Content-Range` headers, single ranges of bytes only (RFC 9110, section 14).

use std::fmt;
use std::ops::Range;

use axum::http::HeaderMap;
use axum::http::header::{CONTENT_RANGE, RANGE};

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// No range, or one that a server may ignore: several ranges, other units, bad syntax.
    Whole,
    /// These bytes: not empty and inside the blob.
    Part(Range<u64>),
    /// Bytes past the end: 416.
    Unsatisfiable,
}

/// Reads the `Range` header of a request for something of `size_bytes`.
pub(crate) fn asked(headers: &HeaderMap, size_bytes: u64) -> Asked {
    let Some(spec) = headers.get(RANGE).and_then(|value| value.to_str().ok()).and_then(|v| v.strip_prefix("bytes="))
    else {
        return Asked::Whole;
    };
    let Some((first, last)) = spec.split_once('-') else { return Asked::Whole };
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size_bytes),
        (Ok(first), _) if last.is_empty() => first..size_bytes,
        (_, Ok(suffix)) if first.is_empty() => size_bytes.saturating_sub(suffix)..size_bytes,
        _ => return Asked::Whole,
    };
    if range.is_empty() { Asked::Unsatisfiable } else { Asked::Part(range) }
}

/// `bytes start-(end-1)/size`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContentRange {
    pub(crate) start: u64,
    /// One past the last byte.
    pub(crate) end: u64,
    pub(crate) size_bytes: u64,
}

impl ContentRange {
    /// Of a 206 answer.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let (range, size) = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let last: u64 = last.parse().ok()?;
        Some(Self { start: first.parse().ok()?, end: last.checked_add(1)?, size_bytes: size.parse().ok()? })
    }
}

impl fmt::Display for ContentRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "bytes {}-{}/{}", self.start, self.end.saturating_sub(1), self.size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn ranges() {
        let asked =
            |spec: &'static str| super::asked(&HeaderMap::from_iter([(RANGE, HeaderValue::from_static(spec))]), 1000);
        assert_eq!(asked("bytes=0-99"), Asked::Part(0..100));
        assert_eq!(asked("bytes=900-5000"), Asked::Part(900..1000));
        assert_eq!(asked("bytes=999-"), Asked::Part(999..1000));
        assert_eq!(asked("bytes=-10"), Asked::Part(990..1000));
        assert_eq!(asked("bytes=1000-1001"), Asked::Unsatisfiable);
        assert_eq!(asked("bytes=-0"), Asked::Unsatisfiable);
        for whole in ["bytes=0-1,4-5", "bytes=5-4", "bytes=x-y", "lines=1-2", "bytes=7"] {
            assert_eq!(asked(whole), Asked::Whole, "{whole}");
        }
    }

    #[test]
    fn content_range_is_read_as_written() {
        let range = ContentRange { start: 5, end: 10, size_bytes: 20 };
        assert_eq!(range.to_string(), "bytes 5-9/20");
        let value = HeaderValue::from_str(&range.to_string()).unwrap();
        assert_eq!(ContentRange::of(&HeaderMap::from_iter([(CONTENT_RANGE, value)])), Some(range));
    }
}
