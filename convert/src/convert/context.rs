//! What the steps of a conversion share: settings, places, progress, and the news that the result is not wanted any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Options;
use crate::destination::Destination;
use crate::error::{Error, ErrorKind, Result};
use crate::frames::Compress;
use crate::progress::{Progress, Task};
use crate::reuse::Reuse;

/// What all steps need.
pub(super) struct Context {
    pub(super) options: Options,
    pub(super) destination: Destination,
    /// `HOST/NAME` of the source in a registry: what its blobs can be linked from.
    pub(super) source_repository: Option<String>,
    pub(super) reuse: Reuse,
    /// What the layer blobs are marked with.
    pub(super) settings: String,
    pub(super) progress: Arc<dyn Progress>,
    /// Set when a step failed, or nobody waits for the result any more.
    pub(super) cancelled: Arc<AtomicBool>,
}

/// Sets the flag when the conversion is given up, so that work on other threads ends soon.
pub(super) struct CancelOnDrop(pub(super) Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Context {
    pub(super) fn new(
        options: Options,
        destination: Destination,
        source_repository: Option<String>,
        reuse: Reuse,
        settings: String,
        progress: Arc<dyn Progress>,
    ) -> Self {
        Self { options, destination, source_repository, reuse, settings, progress, cancelled: Arc::default() }
    }

    /// How chunks are compressed.
    pub(super) fn compress(&self) -> Compress {
        Compress { level: self.options.level, threads: self.options.threads }
    }

    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Io, "given up"));
        }
        Ok(())
    }

    /// Tells of progress, unless nobody listens any more.
    pub(super) fn advance(&self, task: &Task, bytes: u64) -> Result<()> {
        self.check_cancelled()?;
        self.progress.advance(task, bytes);
        Ok(())
    }
}
