//! What the device tests share: images with known content, and where tests can run.

#![allow(dead_code, reason = "each test uses its part")]
pub(crate) mod image;
pub(crate) mod scenarios;

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) const BLOCK_LEN: usize = 4096;

/// Opens a device so that every read reaches it.
pub(crate) fn open_direct(path: &Path) -> std::fs::File {
    std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Bytes aligned for direct I/O.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK_LEN];
        let start = bytes.as_ptr().align_offset(BLOCK_LEN);
        Self { bytes, start, len }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// One direct read of whole blocks.
pub(crate) fn read_blocks(file: &std::fs::File, start_block: u32, blocks: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = Aligned::new(blocks * BLOCK_LEN);
    file.read_exact_at(buffer.as_mut_slice(), u64::from(start_block) * BLOCK_LEN as u64)?;
    Ok(buffer.as_slice().to_vec())
}

/// Waits for something that must happen soon.
pub(crate) fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
