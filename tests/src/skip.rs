//! Tests that cannot run say why, and are counted.

use std::io::Write;

/// The file that every skipped test adds a line to, for a count at the end. Set by the test command; without it the line
/// goes to stderr only.
pub const SKIPS_FILE_VARIABLE: &str = "UBLKIMG_SKIPS_FILE";

/// Ends the test function that it stands in, and says so: `skip!("no docker-registry here")`. Only for a thing that the
/// machine lacks; something that ought to work and does not is a failure.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::skip::record(&format!($($reason)*));
        return;
    }};
}

/// Writes down that the test of this thread is skipped.
pub fn record(reason: &str) {
    let line = format!("SKIP {}: {reason}\n", std::thread::current().name().unwrap_or("a test"));
    // Not eprint, which the test harness shows only for failed tests.
    drop(std::io::stderr().write_all(line.as_bytes()));
    if let Some(file) = std::env::var_os(SKIPS_FILE_VARIABLE) {
        let opened = std::fs::OpenOptions::new().append(true).create(true).open(file);
        drop(opened.and_then(|mut file| file.write_all(line.as_bytes())));
    }
}

/// Whether this process has the rights of root that mounting and making device nodes need.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
