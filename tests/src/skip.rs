//! Tests that cannot run say why, and are counted.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

/// Ends the test function that it stands in, and says so: `skip!("no docker-registry here")`. Only for a thing that the
/// machine lacks; something that ought to work and does not is a failure.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::skip::record(&format!($($reason)*));
        return;
    }};
}

/// Where skipped tests are written down, a line each, for a count at the end: `skips.log` beside the programs that cargo
/// built. Whoever runs the tests removes it first.
fn log_path() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.parent()?.join("skips.log"))
}

/// Writes down that the test of this thread is skipped.
pub fn record(reason: &str) {
    let line = format!("SKIP {}: {reason}\n", std::thread::current().name().unwrap_or("a test"));
    // Not eprint, which the test harness shows only for failed tests.
    drop(std::io::stderr().write_all(line.as_bytes()));
    // In a guest the programs may lie on a file system that cannot be written.
    let log = log_path().and_then(|path| OpenOptions::new().append(true).create(true).open(path).ok());
    drop(log.map(|mut log| log.write_all(line.as_bytes())));
}

/// Whether this process has the rights of root that mounting and making device nodes need.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
