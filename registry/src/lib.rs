//! ublkimg registry.
