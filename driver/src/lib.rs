//! ublkimg driver.
