//! The running system: store, fetcher, devices, mounts, daemon and recovery.

pub mod error;
pub mod image;

pub use error::{Error, ErrorKind, Result};
