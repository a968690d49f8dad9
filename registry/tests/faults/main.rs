//! The client against a scripted registry that misbehaves in one way at a time.
#![allow(clippy::unwrap_used, reason = "tests")]

mod auth;
mod fake;
#[allow(dead_code, unreachable_pub, reason = "shared with the crate of end-to-end tests")]
#[path = "../../../tests/src/fault_row.rs"]
mod fault_row;
mod gate;
mod manifest;
mod push;
mod range;
mod redirect;
mod referrers;
mod stream;
mod tls;
mod whole;
