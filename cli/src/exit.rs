//! From errors to exit codes and one line of text.

use std::process::ExitCode;

use ublkimg_driver::error::ErrorKind;

/// Exit code of a source image that is malformed; the driver, which knows all other codes, reads no source images.
const BAD_SOURCE: u8 = 11;

/// Exit code of a command that was interrupted, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;

/// The exit code that tells a script what to do next: that of the first error in the chain that has one.
pub(crate) fn code(error: &anyhow::Error) -> ExitCode {
    let code = error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<ublkimg_driver::Error>() {
            Some(error.kind().exit_code())
        } else if let Some(error) = cause.downcast_ref::<ublkimg_convert::Error>() {
            Some(of_convert(error.kind()))
        } else if let Some(error) = cause.downcast_ref::<ublkimg_image::Error>() {
            Some(of_image(error.kind()))
        } else {
            cause.downcast_ref::<ublkimg_registry::Error>().map(|error| of_registry(error.kind()))
        }
    });
    code.unwrap_or(ErrorKind::Internal.exit_code()).into()
}

fn of_convert(kind: ublkimg_convert::ErrorKind) -> u8 {
    use ublkimg_convert::ErrorKind as Convert;
    match kind {
        Convert::BadSource | Convert::Unsupported => BAD_SOURCE,
        Convert::NotOurs => ErrorKind::NotOurs.exit_code(),
        Convert::Usage => ErrorKind::Invalid.exit_code(),
        Convert::NotFound => ErrorKind::NotFound.exit_code(),
        Convert::Unauthorized => ErrorKind::Unauthorized.exit_code(),
        Convert::Unavailable => ErrorKind::Unavailable.exit_code(),
        Convert::VerificationFailed => ErrorKind::Corrupt.exit_code(),
        Convert::DiskFull => ErrorKind::NoSpace.exit_code(),
        Convert::Io => ErrorKind::Io.exit_code(),
        _ => ErrorKind::Internal.exit_code(),
    }
}

fn of_registry(kind: ublkimg_registry::ErrorKind) -> u8 {
    use ublkimg_registry::ErrorKind as Registry;
    match kind {
        Registry::NotFound => ErrorKind::NotFound.exit_code(),
        Registry::Unauthorized => ErrorKind::Unauthorized.exit_code(),
        Registry::Unavailable => ErrorKind::Unavailable.exit_code(),
        Registry::Corrupt | Registry::TooLarge => ErrorKind::Corrupt.exit_code(),
        Registry::NotOurs => ErrorKind::NotOurs.exit_code(),
        Registry::Invalid => ErrorKind::Invalid.exit_code(),
        Registry::Io => ErrorKind::Io.exit_code(),
        Registry::NoSpace => ErrorKind::NoSpace.exit_code(),
        _ => ErrorKind::Internal.exit_code(),
    }
}

/// Of what was read from a registry or, `Invalid`, of what the user gave.
fn of_image(kind: ublkimg_image::ErrorKind) -> u8 {
    match kind {
        ublkimg_image::ErrorKind::Unsupported => ErrorKind::NotOurs.exit_code(),
        ublkimg_image::ErrorKind::Invalid | ublkimg_image::ErrorKind::TooLarge => ErrorKind::Invalid.exit_code(),
        _ => ErrorKind::Corrupt.exit_code(),
    }
}

/// The error and its causes on one line. A cause whose text the line has already is not said again.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', " ");
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    if is_refused(error) && !rustix::process::geteuid().is_root() {
        line.push_str(": run it as root");
    }
    line
}

/// Whether the kernel would not let us.
fn is_refused(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    causes.any(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once_and_on_one_line() {
        let error = anyhow::anyhow!("disk\nfull").context("cannot write a: disk full").context("cannot convert");
        assert_eq!(one_line(&error), "cannot convert: cannot write a: disk full");
    }

    #[test]
    fn every_documented_code_is_one_of_ours() {
        for line in crate::args::EXIT_CODES.lines().skip(1) {
            let number: u8 = line.split_whitespace().next().unwrap().parse().unwrap();
            let known = ErrorKind::from_exit_code(number.into()).is_some();
            assert!(known || [0, BAD_SOURCE, INTERRUPTED].contains(&number), "{line}");
        }
    }
}
