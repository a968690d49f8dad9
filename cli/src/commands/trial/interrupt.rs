//! Ctrl-C ends a run between two steps, so that what was made so far is taken back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ublkimg_driver::error::{Error, ErrorKind};

use crate::exit::INTERRUPTED;

/// How often somebody who waits for something else looks.
const POLL: Duration = Duration::from_millis(20);

/// Set by SIGINT and SIGTERM.
pub(in crate::commands) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on these signals do not end the program.
    pub(in crate::commands) fn watch() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let interrupted = Arc::new(AtomicBool::new(false));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut interrupt, mut terminate) = {
            let _entered = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let set = Arc::clone(&interrupted);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    set.store(true, Ordering::SeqCst);
                }
            });
        })?;
        Ok(Self(interrupted))
    }

    /// # Errors
    /// When a signal came.
    pub(in crate::commands) fn check(&self) -> Result<(), Error> {
        match self.0.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Busy, "interrupted")),
            false => Ok(()),
        }
    }

    /// Returns when a signal has come.
    pub(in crate::commands) async fn came(&self) -> Error {
        loop {
            if let Err(interrupted) = self.check() {
                return interrupted;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Ends the program if a signal came; `what` is gone by then.
    pub(in crate::commands) fn end_if_set(&self, what: &str) {
        if self.check().is_err() {
            eprintln!("ublkimg: interrupted, nothing is left of {what}");
            std::process::exit(INTERRUPTED.into());
        }
    }
}
