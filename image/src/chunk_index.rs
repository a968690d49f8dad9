//! The chunk index of the EROFS image layer specification (draft): where in a blob each chunk is, which bytes of the
//! raw stream it holds, and the SHA-256 of its stored frame.
//!
//! A blob is a sequence of zstd frames; each decompresses to one chunk. The index has the start of every chunk in both
//! streams; a chunk ends where the next one starts, the last one at the start of the index section (stored) and at the
//! uncompressed size (raw). The name of a chunk is the digest of its stored frame, so it is checked before anything
//! decodes it, and the digest of the index itself vouches for all chunks.
//!
//! Of what the specification allows, this crate takes one form: zstd, SHA-256, chunks that are cut at block
//! boundaries and have at most 256 KiB of raw data (so a fetched chunk needs a bounded buffer).

use std::ops::Range;

use crate::cursor::Cursor;
use crate::{BLOCK_SIZE, CHUNK_BYTES, Error, MAX_BLOCKS, Result, Sha256};

const PART: &str = "chunk index";
const MAGIC: [u8; 4] = [0xCD, 0xE4, 0xEC, 0x67];
const VERSION: u8 = 1;
const COMPRESSION_ZSTD: u8 = 1;
const HASH_SHA2: u8 = 1;
const HASH_BYTES: u8 = 32;
const HEADER_BYTES: usize = 32;
const ENTRY_BYTES: usize = 48;

/// Longest stored frame of a chunk, in bytes. zstd adds at most 1 KiB to 256 KiB that do not compress, and some 20
/// bytes of frame; the rest is slack for other encoders.
pub const MAX_STORED_CHUNK_BYTES: u64 = CHUNK_BYTES + 4096;

/// Name of a chunk: the SHA-256 of its stored frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub Sha256);

/// A chunk of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Position in the index, from 0.
    pub index: u32,
    /// Where the stored frame is, in bytes from the start of the blob. At most [`MAX_STORED_CHUNK_BYTES`] long.
    pub stored: Range<u64>,
    /// What it decompresses to, in bytes of the raw stream. Starts and ends at block boundaries; 1 to
    /// [`CHUNK_BLOCKS`](crate::CHUNK_BLOCKS) blocks.
    pub raw: Range<u64>,
    /// Digest of the stored frame.
    pub id: ChunkId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    stored_offset: u64,
    raw_offset: u64,
    id: ChunkId,
}

/// The chunks of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkIndex {
    entries: Vec<Entry>,
    raw_len_bytes: u64,
    section_offset_bytes: u64,
}

impl ChunkIndex {
    /// The payload of the index: header and entries, without a frame around them.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.entries.len() * ENTRY_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, COMPRESSION_ZSTD, 0, 0]);
        out.extend_from_slice(&self.raw_len_bytes.to_le_bytes());
        out.extend_from_slice(&self.len().to_le_bytes());
        out.extend_from_slice(&[HASH_SHA2, HASH_BYTES]);
        out.resize(HEADER_BYTES, 0);
        for entry in &self.entries {
            out.extend_from_slice(&entry.stored_offset.to_le_bytes());
            out.extend_from_slice(&entry.raw_offset.to_le_bytes());
            out.extend_from_slice(&entry.id.0.0);
        }
        out
    }

    /// Reads the payload of an index. `section_offset_bytes` is where the index section (the skippable frame) starts
    /// in the blob: the end of the last chunk.
    ///
    /// # Errors
    /// `Corrupt` if the bytes are not an index: wrong length, offsets that do not ascend or lie outside of the blob.
    /// `Unsupported` if it is one of a kind not used here: other version, flags, compression or hash, chunks not cut
    /// at blocks or longer than 256 KiB.
    pub fn decode(payload: &[u8], section_offset_bytes: u64) -> Result<Self> {
        let mut cursor = Cursor::new(PART, payload);
        if cursor.array()? != MAGIC {
            return Err(Error::corrupt(PART, "wrong magic number"));
        }
        let [version, compression, flags_low, flags_high] = cursor.array()?;
        let raw_len_bytes = cursor.u64()?;
        let count = cursor.u32()?;
        let hash = cursor.array()?;
        if (version, compression) != (VERSION, COMPRESSION_ZSTD) || (flags_low, flags_high) != (0, 0) {
            return Err(Error::unsupported(
                PART,
                format!("version {version}, compression {compression}, flags {flags_high:02x}{flags_low:02x}"),
            ));
        }
        if hash != [HASH_SHA2, HASH_BYTES] {
            return Err(Error::unsupported(PART, format!("hash algorithm {} of {} bytes", hash[0], hash[1])));
        }
        cursor.zeros(HEADER_BYTES - 22)?;
        if cursor.remaining() as u64 != u64::from(count) * ENTRY_BYTES as u64 {
            return Err(Error::corrupt(PART, format!("{count} chunks in {} bytes", cursor.remaining())));
        }
        let mut entries = Vec::with_capacity(cursor.remaining() / ENTRY_BYTES);
        for _ in 0..count {
            entries.push(Entry {
                stored_offset: cursor.u64()?,
                raw_offset: cursor.u64()?,
                id: ChunkId(Sha256(cursor.array()?)),
            });
        }
        cursor.end()?;
        let index = Self { entries, raw_len_bytes, section_offset_bytes };
        index.check()?;
        Ok(index)
    }

    fn check(&self) -> Result<()> {
        if self.raw_len_bytes > u64::from(MAX_BLOCKS) * BLOCK_SIZE as u64 {
            return Err(Error::unsupported(PART, format!("{} raw bytes, more than 16 TiB", self.raw_len_bytes)));
        }
        let first = self.entries.first().map_or(self.raw_len_bytes, |entry| entry.raw_offset);
        if first != 0 {
            return Err(Error::corrupt(PART, format!("first chunk starts at raw byte {first}")));
        }
        for (number, entry) in self.entries.iter().enumerate() {
            let (stored_end, raw_end) = self.end_of(number);
            let fault = |detail| Error::corrupt(PART, format!("chunk {number}: {detail}"));
            let stored_len = stored_end.checked_sub(entry.stored_offset).filter(|len| *len > 0);
            let stored_len = stored_len.ok_or_else(|| fault("stored offsets do not ascend"))?;
            let raw_len = raw_end.checked_sub(entry.raw_offset).filter(|len| *len > 0);
            let raw_len = raw_len.ok_or_else(|| fault("raw offsets do not ascend"))?;
            if raw_len % BLOCK_SIZE as u64 != 0 || raw_len > CHUNK_BYTES || stored_len > MAX_STORED_CHUNK_BYTES {
                let detail = format!("chunk {number}: {raw_len} raw bytes in {stored_len} stored ones");
                return Err(Error::unsupported(PART, detail));
            }
        }
        Ok(())
    }

    /// Ends of a chunk in the stored and in the raw stream.
    fn end_of(&self, number: usize) -> (u64, u64) {
        match self.entries.get(number + 1) {
            Some(next) => (next.stored_offset, next.raw_offset),
            None => (self.section_offset_bytes, self.raw_len_bytes),
        }
    }

    /// Number of chunks.
    pub fn len(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    /// Whether there is no chunk.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Length of the raw stream in bytes: a multiple of the block size.
    pub fn raw_len_bytes(&self) -> u64 {
        self.raw_len_bytes
    }

    /// Length of the raw stream in blocks: at most [`MAX_BLOCKS`].
    pub fn raw_len_blocks(&self) -> u32 {
        u32::try_from(self.raw_len_bytes / BLOCK_SIZE as u64).unwrap_or(MAX_BLOCKS)
    }

    /// Where the index section starts in the blob, in bytes: the end of the last chunk.
    pub fn section_offset_bytes(&self) -> u64 {
        self.section_offset_bytes
    }

    /// A chunk by its position.
    ///
    /// # Panics
    /// If `index` is not less than [`len`](Self::len).
    pub fn chunk(&self, index: u32) -> Chunk {
        let entry = self.entries[index as usize];
        let (stored_end, raw_end) = self.end_of(index as usize);
        Chunk { index, stored: entry.stored_offset..stored_end, raw: entry.raw_offset..raw_end, id: entry.id }
    }

    /// All chunks in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Chunk> {
        (0..self.len()).map(|index| self.chunk(index))
    }

    /// The chunk that holds the raw byte at that offset.
    ///
    /// # Panics
    /// If the offset is not less than [`raw_len_bytes`](Self::raw_len_bytes).
    pub fn find(&self, raw_offset_bytes: u64) -> u32 {
        assert!(raw_offset_bytes < self.raw_len_bytes, "raw byte {raw_offset_bytes} of {}", self.raw_len_bytes);
        // The first chunk starts at 0, so at least one entry is not after the offset.
        let after = self.entries.partition_point(|entry| entry.raw_offset <= raw_offset_bytes);
        u32::try_from(after - 1).unwrap_or(u32::MAX)
    }

    /// Digest of [`encode`](Self::encode).
    pub fn digest(&self) -> Sha256 {
        Sha256::of(&self.encode())
    }
}

/// Makes a [`ChunkIndex`] from frames in the order in which they are stored, without gaps.
#[derive(Debug, Clone)]
pub struct ChunkIndexBuilder {
    index: ChunkIndex,
}

impl ChunkIndexBuilder {
    /// `first_frame_offset_bytes` is where the first frame starts in the blob.
    pub fn new(first_frame_offset_bytes: u64) -> Self {
        let section_offset_bytes = first_frame_offset_bytes;
        Self { index: ChunkIndex { entries: Vec::new(), raw_len_bytes: 0, section_offset_bytes } }
    }

    /// Adds the next frame.
    ///
    /// # Errors
    /// `Invalid` if the raw length is not 1 to 64 whole blocks or the stored length is 0 or more than
    /// [`MAX_STORED_CHUNK_BYTES`]; `TooLarge` if the raw stream gets longer than [`MAX_BLOCKS`] blocks.
    pub fn push(&mut self, stored_len_bytes: u64, raw_len_bytes: u64, id: ChunkId) -> Result<()> {
        let index = &mut self.index;
        if !(1..=CHUNK_BYTES).contains(&raw_len_bytes) || !raw_len_bytes.is_multiple_of(BLOCK_SIZE as u64) {
            return Err(Error::invalid(PART, format!("chunk of {raw_len_bytes} raw bytes")));
        }
        if !(1..=MAX_STORED_CHUNK_BYTES).contains(&stored_len_bytes) {
            return Err(Error::invalid(PART, format!("chunk of {stored_len_bytes} stored bytes")));
        }
        let raw_end = index.raw_len_bytes + raw_len_bytes;
        let stored_end = index.section_offset_bytes.checked_add(stored_len_bytes);
        let Some(stored_end) = stored_end.filter(|_| raw_end <= u64::from(MAX_BLOCKS) * BLOCK_SIZE as u64) else {
            return Err(Error::too_large(PART, "raw stream longer than 16 TiB"));
        };
        index.entries.push(Entry { stored_offset: index.section_offset_bytes, raw_offset: index.raw_len_bytes, id });
        index.section_offset_bytes = stored_end;
        index.raw_len_bytes = raw_end;
        Ok(())
    }

    /// The index. Its section starts where the last frame ends.
    pub fn finish(self) -> ChunkIndex {
        self.index
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An index with random lengths of chunks.
    pub(crate) fn index() -> impl Strategy<Value = ChunkIndex> {
        let frame = (1..=MAX_STORED_CHUNK_BYTES, 1..=CHUNK_BYTES / BLOCK_SIZE as u64, any::<[u8; 32]>());
        (0u64..10_000, prop::collection::vec(frame, 0..40)).prop_map(|(first, frames)| {
            let mut builder = ChunkIndexBuilder::new(first);
            for (stored_len, raw_blocks, digest) in frames {
                builder.push(stored_len, raw_blocks * BLOCK_SIZE as u64, ChunkId(Sha256(digest))).unwrap();
            }
            builder.finish()
        })
    }

    proptest! {
        #[test]
        fn reads_back(index in index()) {
            let payload = index.encode();
            let read = ChunkIndex::decode(&payload, index.section_offset_bytes()).unwrap();
            prop_assert_eq!(&read, &index);
            prop_assert_eq!(read.digest(), Sha256::of(&payload));
            for cut in 0..payload.len() {
                prop_assert!(ChunkIndex::decode(&payload[..cut], index.section_offset_bytes()).is_err());
            }
        }

        #[test]
        fn chunks_cover_both_streams(index in index()) {
            let mut raw_end = 0;
            let mut stored_end = index.iter().next().map_or(index.section_offset_bytes(), |chunk| chunk.stored.start);
            for chunk in index.iter() {
                prop_assert_eq!((chunk.stored.start, chunk.raw.start), (stored_end, raw_end));
                (stored_end, raw_end) = (chunk.stored.end, chunk.raw.end);
                for offset in [chunk.raw.start, chunk.raw.start + 1, chunk.raw.end - 1] {
                    prop_assert_eq!(index.find(offset), chunk.index);
                }
            }
            prop_assert_eq!((stored_end, raw_end), (index.section_offset_bytes(), index.raw_len_bytes()));
            prop_assert_eq!(u64::from(index.raw_len_blocks()) * BLOCK_SIZE as u64, raw_end);
        }

        /// Every index has one form, and what is read is within the bounds.
        #[test]
        fn damage_is_refused_or_sound(
            index in index(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            section_offset in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
        ) {
            let mut payload = index.encode();
            for (at, value) in changes {
                let at = at.index(payload.len());
                payload[at] = value;
            }
            let section_offset = section_offset.unwrap_or(index.section_offset_bytes());
            if let Ok(read) = ChunkIndex::decode(&payload, section_offset) {
                prop_assert_eq!(read.encode(), payload);
                for chunk in read.iter() {
                    prop_assert!((1..=MAX_STORED_CHUNK_BYTES).contains(&(chunk.stored.end - chunk.stored.start)));
                    prop_assert!((1..=CHUNK_BYTES).contains(&(chunk.raw.end - chunk.raw.start)));
                }
            }
        }
    }

    #[test]
    fn header_is_as_specified() {
        let mut builder = ChunkIndexBuilder::new(100);
        builder.push(50, 8192, ChunkId(Sha256::of(b"frame"))).unwrap();
        let payload = builder.finish().encode();
        let header = [0xCD, 0xE4, 0xEC, 0x67, 1, 1, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 32];
        assert_eq!(payload[..22], header);
        assert_eq!(payload[22..32], [0; 10]);
        assert_eq!(payload[32..40], 100u64.to_le_bytes());
        assert_eq!(payload[40..48], 0u64.to_le_bytes());
        assert_eq!(payload[48..], Sha256::of(b"frame").0);
    }

    #[test]
    fn frames_out_of_bounds_are_not_added() {
        let id = ChunkId(Sha256::of(b""));
        let mut builder = ChunkIndexBuilder::new(0);
        for (stored_len, raw_len) in
            [(0, 4096), (1, 0), (1, 4097), (1, CHUNK_BYTES + 4096), (MAX_STORED_CHUNK_BYTES + 1, 4096)]
        {
            assert_eq!(builder.push(stored_len, raw_len, id).unwrap_err().kind(), crate::ErrorKind::Invalid);
        }
        assert!(builder.finish().is_empty());
        let kind = ChunkIndexBuilder::new(u64::MAX).push(1, 4096, id).unwrap_err().kind();
        assert_eq!(kind, crate::ErrorKind::TooLarge);
    }
}
