//! The client against a scripted registry that misbehaves in one way at a time.
#![allow(clippy::unwrap_used, reason = "tests")]

mod auth;
mod fake;
mod gate;
mod manifest;
mod push;
mod range;
mod redirect;
mod referrers;
mod stream;
mod tls;
mod whole;
