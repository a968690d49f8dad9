//! Device names: the handle by which scripts speak of a device.

use crate::error::{Error, ErrorKind, Result};

/// A name is also a file name, with a few characters added.
const NAME_MAX_BYTES: usize = 200;

/// Checks a name that the user gave: letters, digits, `.`, `_`, `-`, not starting with a dot or a dash.
///
/// # Errors
/// [`ErrorKind::Invalid`].
pub(super) fn check(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > NAME_MAX_BYTES || name.starts_with(['.', '-']) || !name.chars().all(allowed) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{name:?} is no device name: use letters, digits, '.', '_' and '-', at most {NAME_MAX_BYTES}"),
        ));
    }
    Ok(())
}

/// The name of a device that the user did not name: the last part of the reference with every other character
/// replaced, `app/web:1.2` → `web-1.2`. The same reference always gives the same name, so `add` can be repeated.
#[must_use]
pub fn from_reference(reference: &str) -> String {
    let last = reference.trim_end_matches('/').rsplit('/').next().unwrap_or(reference);
    let mut name: String =
        last.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' }).collect();
    name.truncate(NAME_MAX_BYTES);
    let name = name.trim_start_matches(['.', '-']);
    if name.is_empty() { "image".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_comes_from_the_last_part_of_the_reference() {
        for (reference, name) in [
            ("registry.example.com/app/web:1.2", "web-1.2"),
            ("127.0.0.1:5000/demo", "demo"),
            ("app@sha256:00ff", "app-sha256-00ff"),
            ("oci:/srv/images/.hidden:v1", "hidden-v1"),
            ("oci:/srv/images/", "images"),
            ("...", "image"),
        ] {
            assert_eq!(from_reference(reference), name);
            check(name).unwrap();
        }
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "../x", "a/b", "-f", "a b", &"x".repeat(201)] {
            assert_eq!(check(name).unwrap_err().kind(), ErrorKind::Invalid, "{name:?}");
        }
    }
}
