//! ublkimg convert.
