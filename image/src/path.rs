//! Rules for names and paths inside an image, for the writer and the readers alike.

/// Longest name of a directory entry, in bytes (Linux `NAME_MAX`).
pub(crate) const MAX_NAME_BYTES: usize = 255;

/// Why `name` cannot be the name of a directory entry, or `None` if it can.
pub(crate) fn name_fault(name: &[u8]) -> Option<&'static str> {
    match name {
        [] => Some("is empty"),
        b"." | b".." => Some("is reserved"),
        _ if name.len() > MAX_NAME_BYTES => Some("is longer than 255 bytes"),
        _ if name.contains(&b'/') => Some("contains a slash"),
        _ if name.contains(&0) => Some("contains a NUL byte"),
        _ => None,
    }
}

/// Why `path` is not a sequence of good names joined by single slashes, or `None` if it is one.
pub(crate) fn path_fault(path: &[u8]) -> Option<&'static str> {
    path.split(|byte| *byte == b'/').find_map(name_fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_and_plain() {
        for good in [&b"a"[..], b"a/b", b"...", b"a/.b/ c\xff"] {
            assert_eq!(path_fault(good), None, "{good:?}");
        }
        for bad in [&b""[..], b"/", b"/a", b"a/", b"a//b", b"a/./b", b"..", b"a/../b", b"a\0b", &[b'x'; 256]] {
            assert!(path_fault(bad).is_some(), "{bad:?}");
        }
    }
}
