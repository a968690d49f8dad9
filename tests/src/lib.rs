//! What the end-to-end tests stand on. The tests themselves are in `tests/tests`.

#![forbid(unsafe_code)]

pub mod http;
pub mod registry;
