//! Names of entries: from what an archive says to components inside the image.

use crate::error::{Error, Result};

/// Most bytes of one name; the file system's limit.
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// Most bytes of a path. Twice what Linux takes in one call; deeper trees can only be walked step by step.
pub(crate) const PATH_BYTES_MAX: usize = 8192;

/// What the name of a whiteout begins with; the name that it deletes follows.
pub(crate) const WHITEOUT_PREFIX: &[u8] = b".wh.";

/// The names along `path`; empty for the root. Leading, repeated and trailing slashes and `.` mean nothing. A whiteout
/// may be longer than a name by its prefix: it never becomes a file.
///
/// # Errors
/// `BadSource` naming the entry for `..`, which could lead out of the image, and for names that are too long.
pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    if path.len() > PATH_BYTES_MAX {
        return Err(Error::bad_source(format!("entry {}: path of {} bytes", show(path), path.len())));
    }
    let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    if names.iter().any(|name| *name == b"..") {
        return Err(Error::bad_source(format!("entry {}: \"..\" leads out of the image", show(path))));
    }
    let is_long = |name: &&[u8]| name.strip_prefix(WHITEOUT_PREFIX).unwrap_or(name).len() > NAME_BYTES_MAX;
    if names.iter().any(is_long) {
        return Err(Error::bad_source(format!("entry {}: a name is longer than {NAME_BYTES_MAX} bytes", show(path))));
    }
    Ok(names)
}

/// A path in a message: printable, and no longer than a line or two.
pub(crate) fn show(path: &[u8]) -> String {
    const SHOWN_BYTES: usize = 200;
    match path.get(..SHOWN_BYTES) {
        Some(start) if path.len() > SHOWN_BYTES => format!("\"{}...\"", start.escape_ascii()),
        _ => format!("\"{}\"", path.escape_ascii()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn paths_are_normalised() {
        for (path, want) in [
            (&b"a/b"[..], &[&b"a"[..], b"b"][..]),
            (b"./a//b/.", &[b"a", b"b"]),
            (b"/a", &[b"a"]),
            (b"./", &[]),
            (b"/", &[]),
            (b"..a/b..", &[b"..a", b"b.."]),
        ] {
            assert_eq!(components(path).unwrap(), want);
        }
    }

    #[test]
    fn escapes_are_refused_by_name() {
        for path in ["../etc/passwd", "a/../../b", "a/..", ".."] {
            let error = components(path.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadSource);
            assert!(error.to_string().contains(path), "{error}");
        }
        assert!(components(&[b'a'; 256]).is_err());
        assert!(components(&vec![b'/'; PATH_BYTES_MAX + 1]).is_err());
    }
}
