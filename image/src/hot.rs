//! The hot table: what vouches for a hot blob.
//!
//! A hot blob holds the first blocks of a trace, in the trace's order, in zstd frames one after another from its first
//! byte. The table has length, number of blocks and digest of each frame, so that a reader can ask for any frame and
//! check it before it decodes it. Which blocks they are, the trace says: rank *r* of the trace is block *r* of the blob.

use std::ops::Range;

use crate::chunk_index::MAX_STORED_CHUNK_BYTES;
use crate::cursor::Cursor;
use crate::{CHUNK_BLOCKS, Error, Result, Sha256};

const PART: &str = "hot table";
const MAGIC: [u8; 4] = *b"UBHT";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 12;
const FRAME_BYTES: usize = 40;

/// Most frames of a table: 4 GiB of blocks. The table then has 640 KiB, and may still travel inside of its descriptor.
pub const HOT_FRAMES_MAX: usize = 1 << 14;

/// Most blocks of one frame.
pub const HOT_FRAME_BLOCKS_MAX: u16 = 64;
const _: () = assert!(HOT_FRAME_BLOCKS_MAX as u32 == CHUNK_BLOCKS);

/// The frames of a hot blob.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HotTable {
    /// In the order in which they are stored. At most [`HOT_FRAMES_MAX`].
    pub frames: Vec<HotFrame>,
}

/// A frame of a hot blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotFrame {
    /// Length of the stored zstd frame: 1 to [`MAX_STORED_CHUNK_BYTES`].
    pub stored_len_bytes: u32,
    /// Number of blocks that it decompresses to: 1 to [`HOT_FRAME_BLOCKS_MAX`].
    pub blocks: u16,
    /// Digest of the stored frame.
    pub digest: Sha256,
}

impl HotFrame {
    fn fault(&self) -> Option<String> {
        let Self { stored_len_bytes, blocks, .. } = *self;
        let good = (1..=MAX_STORED_CHUNK_BYTES).contains(&u64::from(stored_len_bytes))
            && (1..=HOT_FRAME_BLOCKS_MAX).contains(&blocks);
        (!good).then(|| format!("{blocks} blocks in {stored_len_bytes} stored bytes"))
    }
}

impl HotTable {
    /// The table as bytes.
    ///
    /// # Errors
    /// `TooLarge` with more than [`HOT_FRAMES_MAX`] frames; `Invalid` if a frame is out of its bounds.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let count = u32::try_from(self.frames.len()).ok().filter(|_| self.frames.len() <= HOT_FRAMES_MAX);
        let count = count.ok_or_else(|| Error::too_large(PART, format!("{} frames", self.frames.len())))?;
        let mut out = Vec::with_capacity(HEADER_BYTES + self.frames.len() * FRAME_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&count.to_le_bytes());
        for (number, frame) in self.frames.iter().enumerate() {
            if let Some(fault) = frame.fault() {
                return Err(Error::invalid(PART, format!("frame {number}: {fault}")));
            }
            out.extend_from_slice(&frame.stored_len_bytes.to_le_bytes());
            out.extend_from_slice(&frame.blocks.to_le_bytes());
            out.extend_from_slice(&[0; 2]);
            out.extend_from_slice(&frame.digest.0);
        }
        Ok(out)
    }

    /// Reads a table.
    ///
    /// # Errors
    /// `Corrupt` if `bytes` is not exactly one table within the bounds, `Unsupported` if it is of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut cursor = Cursor::new(PART, bytes);
        if cursor.array()? != MAGIC {
            return Err(Error::corrupt(PART, "wrong magic number"));
        }
        let version = cursor.u16()?;
        if version != VERSION {
            return Err(Error::unsupported(PART, format!("version {version}")));
        }
        cursor.zeros(2)?;
        let count = cursor.u32()? as usize;
        if count > HOT_FRAMES_MAX || cursor.remaining() != count * FRAME_BYTES {
            let detail = format!("{count} frames in {} bytes, at most {HOT_FRAMES_MAX}", cursor.remaining());
            return Err(Error::corrupt(PART, detail));
        }
        let mut frames = Vec::with_capacity(count);
        for number in 0..count {
            let at = cursor.position();
            let (stored_len_bytes, blocks) = (cursor.u32()?, cursor.u16()?);
            cursor.zeros(2)?;
            let frame = HotFrame { stored_len_bytes, blocks, digest: Sha256(cursor.array()?) };
            if let Some(fault) = frame.fault() {
                return Err(Error::corrupt(PART, format!("frame {number}: {fault}")).at(at));
            }
            frames.push(frame);
        }
        cursor.end()?;
        Ok(Self { frames })
    }

    /// Digest of [`encode`](Self::encode): names the file that holds the blocks.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn digest(&self) -> Result<Sha256> {
        Ok(Sha256::of(&self.encode()?))
    }

    /// Number of blocks in all frames: the ranks below it are in the hot blob.
    pub fn blocks(&self) -> u32 {
        self.frames.iter().fold(0, |sum, frame| sum.saturating_add(u32::from(frame.blocks)))
    }

    /// Length of the hot blob in bytes.
    pub fn stored_len_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| u64::from(frame.stored_len_bytes)).sum()
    }

    /// Where each frame lies, in the blob and among the ranks.
    pub fn layout(&self) -> HotLayout {
        let mut starts = Vec::with_capacity(self.frames.len() + 1);
        let (mut offset, mut rank) = (0u64, 0u32);
        starts.push((offset, rank));
        for frame in &self.frames {
            offset = offset.saturating_add(u64::from(frame.stored_len_bytes));
            rank = rank.saturating_add(u32::from(frame.blocks));
            starts.push((offset, rank));
        }
        HotLayout { starts }
    }
}

/// Where the frames of a hot blob lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotLayout {
    /// Stored offset and first rank of each frame, then the ends of the last one.
    starts: Vec<(u64, u32)>,
}

impl HotLayout {
    /// Number of frames.
    pub fn frames(&self) -> u32 {
        u32::try_from(self.starts.len() - 1).unwrap_or(u32::MAX)
    }

    /// The frame that holds the block of that rank; `None` if it is past the last one.
    pub fn frame_of(&self, rank: u32) -> Option<u32> {
        let after = self.starts.partition_point(|(_, first)| *first <= rank);
        (after < self.starts.len()).then(|| u32::try_from(after - 1).unwrap_or(u32::MAX))
    }

    /// The ranks of the blocks in a frame.
    ///
    /// # Panics
    /// If `frame` is not less than [`frames`](Self::frames).
    pub fn ranks(&self, frame: u32) -> Range<u32> {
        self.starts[frame as usize].1..self.starts[frame as usize + 1].1
    }

    /// Where a frame is stored, in bytes from the start of the hot blob.
    ///
    /// # Panics
    /// If `frame` is not less than [`frames`](Self::frames).
    pub fn stored(&self, frame: u32) -> Range<u64> {
        self.starts[frame as usize].0..self.starts[frame as usize + 1].0
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test code")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STORED_MAX: u32 = MAX_STORED_CHUNK_BYTES as u32;

    fn table() -> impl Strategy<Value = HotTable> {
        let frame = (1..=STORED_MAX, 1..=HOT_FRAME_BLOCKS_MAX, any::<[u8; 32]>());
        let frame = frame.prop_map(|(stored_len_bytes, blocks, digest)| HotFrame {
            stored_len_bytes,
            blocks,
            digest: Sha256(digest),
        });
        prop::collection::vec(frame, 0..40).prop_map(|frames| HotTable { frames })
    }

    proptest! {
        #[test]
        fn reads_back(table in table()) {
            let bytes = table.encode().unwrap();
            prop_assert_eq!(table.digest().unwrap(), Sha256::of(&bytes));
            for cut in 0..bytes.len() {
                prop_assert!(HotTable::decode(&bytes[..cut]).is_err());
            }
            prop_assert_eq!(HotTable::decode(&bytes), Ok(table));
        }

        #[test]
        fn frames_cover_blob_and_ranks(table in table()) {
            let layout = table.layout();
            let (mut offset, mut rank) = (0, 0);
            for frame in 0..layout.frames() {
                prop_assert_eq!((layout.stored(frame).start, layout.ranks(frame).start), (offset, rank));
                (offset, rank) = (layout.stored(frame).end, layout.ranks(frame).end);
                for rank in layout.ranks(frame) {
                    prop_assert_eq!(layout.frame_of(rank), Some(frame));
                }
            }
            prop_assert_eq!((offset, rank), (table.stored_len_bytes(), table.blocks()));
            prop_assert_eq!(layout.frame_of(rank), None);
        }

        /// Every table has one form, and what is read is within the bounds.
        #[test]
        fn damage_is_refused_or_sound(
            table in table(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = table.encode().unwrap();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(read) = HotTable::decode(&bytes) {
                prop_assert_eq!(read.encode().unwrap(), bytes);
            }
        }
    }

    #[test]
    fn frames_out_of_bounds_are_not_written() {
        let good = HotFrame { stored_len_bytes: 1, blocks: 1, digest: Sha256::of(b"") };
        let kind = |frames| HotTable { frames }.encode().unwrap_err().kind();
        for frame in [
            HotFrame { stored_len_bytes: 0, ..good },
            HotFrame { stored_len_bytes: STORED_MAX + 1, ..good },
            HotFrame { blocks: 0, ..good },
            HotFrame { blocks: 65, ..good },
        ] {
            assert_eq!(kind(vec![frame]), crate::ErrorKind::Invalid);
        }
        assert_eq!(kind(vec![good; HOT_FRAMES_MAX + 1]), crate::ErrorKind::TooLarge);
        let most = HotTable { frames: vec![good; HOT_FRAMES_MAX] };
        assert_eq!(HotTable::decode(&most.encode().unwrap()), Ok(most));
    }
}
