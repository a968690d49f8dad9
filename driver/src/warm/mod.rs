//! The warmer: blocks that a profile foretells are pushed into the page cache of the mounted image as they arrive, so that
//! the container's read is an access of memory and never comes to the device.
//!
//! ```text
//! server:  trace ─► Feed ── runs of the device that are here ──┐  one turn for each question
//! warmer:  ask ◄────────────────────────────────────────────────┘─► files that have them ─► POSIX_FADV_WILLNEED
//! ```
//! The server knows what has arrived and says what comes next; it never touches the file system. The warmer is the process
//! that mounted the image, gone on in the background: it may block in the kernel, may be stopped or killed at any moment,
//! and nobody waits for it. What it does to a file takes the file open for as long as the kernel takes the advice, so
//! nothing keeps the mount busy between.
//!
//! It ends when there is nothing left to push, when its budget is spent or memory gets short, and when the server is gone
//! or says so: because the image is recorded, its start is over, or it is about to be removed.

mod feed;
mod memory;
mod pieces;
mod process;

pub(crate) use feed::{END_ENTRIES, Feed, Run, State};
pub use process::{Warmer, go_on_alone};
