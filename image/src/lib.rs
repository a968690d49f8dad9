//! ublkimg image format.
