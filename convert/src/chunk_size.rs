//! The grain of a layer blob.

use std::fmt;
use std::str::FromStr;

use ublkimg_image::{BLOCK_SIZE, CHUNK_BYTES};

use crate::error::{Error, ErrorKind};

/// How many bytes of a large file make a chunk, and small files at most: 64, 128 or 256 KiB. It is what a read that misses
/// fetches at least; smaller chunks compress worse (bench/README.md). The format allows no larger ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSize {
    blocks_log2: u8,
}

impl ChunkSize {
    /// 256 KiB.
    pub const MAX: Self = Self { blocks_log2: 6 };

    /// All that there are.
    const ALL: [Self; 3] = [Self { blocks_log2: 4 }, Self { blocks_log2: 5 }, Self::MAX];

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        (BLOCK_SIZE as u64) << self.blocks_log2
    }

    pub(crate) const fn bytes_usize(self) -> usize {
        BLOCK_SIZE << self.blocks_log2
    }

    pub(crate) const fn blocks(self) -> u32 {
        1 << self.blocks_log2
    }

    pub(crate) const fn blocks_log2(self) -> u8 {
        self.blocks_log2
    }
}

const _: () = assert!(ChunkSize::MAX.bytes() == CHUNK_BYTES);

impl Default for ChunkSize {
    fn default() -> Self {
        Self::MAX
    }
}

impl fmt::Display for ChunkSize {
    /// As it is written on a command line: `256K`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}K", self.bytes() >> 10)
    }
}

impl FromStr for ChunkSize {
    type Err = Error;

    /// # Errors
    /// `Usage` naming the sizes that there are.
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|size| size.to_string() == text);
        found.ok_or_else(|| Error::new(ErrorKind::Usage, format!("chunk size {text}: 64K, 128K or 256K")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_they_are_called() {
        let bytes = ["64K", "128K", "256K"].map(|text| text.parse::<ChunkSize>().unwrap().bytes());
        assert_eq!(bytes, [64 << 10, 128 << 10, 256 << 10]);
        assert_eq!(ChunkSize::default().to_string(), "256K");
        for text in ["", "64", "64k", "512K", "-64K"] {
            assert_eq!(text.parse::<ChunkSize>().unwrap_err().kind(), ErrorKind::Usage);
        }
    }
}
