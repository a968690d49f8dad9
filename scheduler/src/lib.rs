//! ublkimg scheduler.
