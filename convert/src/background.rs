//! Work that may block, away from the threads that serve futures.

use crate::error::{Error, ErrorKind, Result};

/// Runs `work` on a thread where it may block; its panics come back here.
///
/// # Errors
/// `Io` when the program is shutting down.
pub(crate) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => Ok(value),
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(stopped) => Err(Error::new(ErrorKind::Io, "the program is shutting down").with_source(stopped)),
    }
}
