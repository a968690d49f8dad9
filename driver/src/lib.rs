//! The running system: store, fetcher, devices, mounts, daemon and recovery.
