//! ublkimg bench.
