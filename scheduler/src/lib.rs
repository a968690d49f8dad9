//! What to fetch next: a pure policy.
//!
//! [`Scheduler::step`] takes one event and the time and appends actions: nothing here reads a clock, performs I/O, or
//! draws a random number, so a run can be replayed and simulated exactly.
#![forbid(unsafe_code)]

mod types;

pub use types::{Action, BlobKey, ChunkEntry, ChunkKey, Class, Event, Now, Ticket};
