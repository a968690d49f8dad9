//! The running system: store, fetcher, devices, mounts, daemon and recovery.

pub mod attach;
mod capabilities;
pub mod counters;
pub mod daemon;
mod decode;
pub mod device;
#[cfg(test)]
mod disk_tests;
pub mod engine;
pub mod error;
mod fetch;
mod figures;
pub mod first_reads;
#[cfg(test)]
mod fixture;
mod hot;
pub mod image;
mod kept_chunks;
pub mod kernel;
pub mod latency;
mod memory;
pub mod mounts;
pub mod namespace;
mod outage;
#[cfg(test)]
mod outage_tests;
mod patience;
#[cfg(test)]
mod profile_fixture;
#[cfg(test)]
mod profile_tests;
pub mod propagation;
pub mod pull;
#[cfg(test)]
mod random;
mod recorder;
#[cfg(test)]
mod shared_chunks_tests;
pub mod start_events;
pub mod store;
#[cfg(test)]
mod tests;
pub mod trace_file;
pub mod verity;
pub mod warm;
#[cfg(test)]
mod wrong_source_tests;

pub use attach::{AttachOptions, KeptProfile, LoadedImage, LoadedProfile, ProfileSource, attach, reopen};
pub use counters::{ImageCounters, ImageStatistics};
pub use engine::{Engine, ImageReport};
pub use error::{Error, ErrorKind, Result};
pub use first_reads::{DeviceRead, FirstReadStatistics, Waited};
pub use image::{PrefetchReport, ServedImage};
pub use kept_chunks::learn as learn_kept_chunks;
pub use outage::Waiting;
pub use store::Store;
