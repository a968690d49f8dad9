//! The ublkimg command.
fn main() {}
