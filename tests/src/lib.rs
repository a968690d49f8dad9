//! ublkimg tests.
