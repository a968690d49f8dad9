//! A simulator of starts: the policy itself, on virtual time, over a link made of arithmetic.
//!
//! - **The program** is one thread that replays recorded reads: it thinks, reads, and waits for what is not there.
//! - **The link** is fluid: its rate is shared equally by all transfers under way, and the first byte of an answer comes
//!   one round trip after its request was sent. Connections are warm, decoding takes no time, nothing is lost.
//! - **The policy** is told what happened and orders fetches. [`Ours`] is the [`crate::Scheduler`] that the driver runs;
//!   [`DemandOnly`] and [`Fifo`] are what it is compared with.
//!
//! The simulator keeps its own books on what was asked for and what is there, so duplicates and misses are not the
//! policy's own word. It has no clock and draws nothing but from a seed: the same input gives the same outcome, to the
//! nanosecond. Reading trace files is the caller's business.

mod baselines;
mod image;
mod link;
mod ours;
mod program;
mod run;
mod wrong;

pub use baselines::{DemandOnly, Fifo};
pub use image::{CHUNK_BLOCKS, ChunkSize, FRAME_BLOCKS, FrameSize, HOT, LAYER, SimulatedImage};
pub use link::Link;
pub use ours::{Ours, Plan};
pub use program::{Program, ProgramRead, RecordedRead};
pub use run::{Happened, Order, Outcome, Policy, Scenario, SimulationError, simulate};
pub use wrong::Recording;

#[cfg(test)]
mod tests;
