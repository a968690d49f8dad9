//! The running system: store, fetcher, devices, mounts, daemon and recovery.

pub mod device;
pub mod error;
pub mod image;
pub mod kernel;
pub mod mounts;
pub mod namespace;
pub mod store;

pub use error::{Error, ErrorKind, Result};
