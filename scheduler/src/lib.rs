//! What to fetch next: a pure policy.
//!
//! [`Scheduler::step`] takes one event and the time and appends actions: nothing here reads a clock, performs I/O, or
//! draws a random number, so a run can be replayed and simulated exactly.
//!
//! There is one table of chunk states, so a chunk is fetched once whoever asks for it, and a demand for what is under way
//! joins it. Four classes want the link, each before the next:
//!
//! 1. *Demand*: a device request waits. It is issued at once, whatever else is going on, and queues behind other demands
//!    only.
//! 2. *Trace*: what a recorded start read next ([`Event::SetPlan`]), in its order, as far as the reads that come say that
//!    it is the same start.
//! 3. *Read-ahead*: what lies before a sequential reader, for reads that no plan knows.
//! 4. *Fill*: the rest, when the user wants it ([`Event::SetFill`]).
//!
//! All but demands stay inside a window of bytes in flight for each link, twice what the link holds, which is found out
//! as BBR does. Requests are ranges of at most half of it, so nothing needs to be cancelled for a demand: what a demand
//! can find before it on the link is at most one window.
//!
//! A miss in a small file brings the rest of it without being told: chunks are cut at the boundaries of files, and files
//! smaller than a chunk share one with their neighbours.
#![forbid(unsafe_code)]

pub mod bound;
mod counters;
mod demand;
mod estimate;
mod fair;
mod fill;
mod flight;
mod guard;
mod link;
mod plan;
#[cfg(test)]
mod policy_tests;
mod prefetch;
mod scheduler;
pub mod simulate;
mod streams;
mod table;
mod types;

pub use counters::Counters;
pub use estimate::{PRODUCT_BYTES_MIN, WINDOW_BYTES_MAX};
pub use flight::{DEMAND_CHUNKS_TOTAL_MAX, PREFETCH_BYTES_MAX, PREFETCH_CHUNKS_MAX};
pub use link::{DEMAND_CHUNKS_MAX, PREFETCH_REQUESTS_MAX};
pub use scheduler::{FAILURE_HOLD, FAILURES_MAX, Scheduler};
pub use streams::STREAMS_MAX;
pub use types::{
    Action, BlobKey, BlobKind, ChunkEntry, ChunkKey, Class, Estimate, Event, FetchKey, FillMode, FillProgress,
    ImageCounters, ImageKey, LinkKey, Now, PlanEntry, PlanProgress, Ticket,
};
