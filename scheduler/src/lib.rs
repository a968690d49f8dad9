//! What to fetch next: a pure policy.
//!
//! [`Scheduler::step`] takes one event and the time and appends actions: nothing here reads a clock, performs I/O, or
//! draws a random number, so a run can be replayed and simulated exactly.
//!
//! There is one table of chunk states, so a chunk is fetched once whoever asks for it. A demand (a device request waits)
//! is issued at once, whatever read-ahead is doing; it can queue behind other demands only. Read-ahead follows
//! sequential readers, inside a window of bytes in flight, and is not issued while a demand is being fetched: what a
//! demand can find before it on the link is at most one window.
#![forbid(unsafe_code)]

pub mod bound;
mod scheduler;
pub mod simulate;
mod streams;
mod types;

pub use scheduler::{
    Counters, DEMAND_CHUNKS_MAX, FAILURE_HOLD, FAILURES_MAX, READ_AHEAD_BYTES_MAX, READ_AHEAD_CHUNKS_MAX, Scheduler,
};
pub use streams::{STREAMS_MAX, WINDOW_BYTES_MAX, WINDOW_BYTES_MIN};
pub use types::{
    Action, BlobKey, BlobKind, ChunkEntry, ChunkKey, Class, Estimate, Event, FetchKey, FillMode, FillProgress,
    ImageCounters, ImageKey, LinkKey, Now, PlanEntry, Ticket,
};
