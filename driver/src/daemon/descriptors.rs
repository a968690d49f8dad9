//! File descriptors: images may take all but a reserve, so that commands are still answered, and reads that miss still find
//! a connection, when there are too many images for the limit that the system gives.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Error, ErrorKind, Result};

/// Kept free: a command at a time for each connection of the socket (64), and as many connections to registries.
const DESCRIPTORS_RESERVED: usize = 128;

/// A blob file in use takes four descriptors: the limit that a shell gives (1024) is soon reached.
pub(super) fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!("at most {:?} files can be open: {error}", limit.current);
    }
}

/// Whether there is room for another image, or for the one that was just opened.
///
/// # Errors
/// [`ErrorKind::Busy`].
pub(super) fn check_room() -> Result<()> {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return Ok(()) };
    let path = std::path::Path::new("/proc/self/fd");
    let open = path.read_dir().map_err(|error| Error::path("list", path, error))?.count();
    if open as u64 + DESCRIPTORS_RESERVED as u64 <= limit {
        return Ok(());
    }
    let text = format!(
        "{open} of {limit} descriptors are open, and {DESCRIPTORS_RESERVED} are kept free: remove an image, or raise the daemon's limit (LimitNOFILE)"
    );
    Err(Error::new(ErrorKind::Busy, text))
}
