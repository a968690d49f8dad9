//! Contents of files between the archive and the blob: one unlinked file per layer.
//!
//! A layer's metadata comes first in its blob and is known last, so file contents wait on disk. Each file is cut in
//! pieces of one chunk; a piece of zeros is a hole and takes no room. Contents are named by a SHA-256, and so are the
//! pieces of large ones; what is already here is stored once. The file has no name, so nothing is left behind however
//! the program ends.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use sha2::Digest as _;
use ublkimg_image::{CHUNK_BYTES, Sha256};

use crate::error::{Error, Result};
use crate::hashing::finish;

/// Bytes of a piece: the grain of holes and of large files' chunks.
#[expect(clippy::cast_possible_truncation, reason = "256 KiB")]
pub(crate) const PIECE_BYTES: usize = CHUNK_BYTES as usize;

/// Most pieces, stored or holes, of the files with holes in one layer: 1 TiB. Each takes four bytes of metadata.
const HOLED_PIECES_MAX: u64 = 4 << 20;

/// Names a content of one [`Spool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ContentId(u32);

/// The bytes of one or more files.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) size_bytes: u64,
    /// Digest of the size and the digests of the pieces; equal contents have equal identities.
    pub(crate) identity: Sha256,
    /// The pieces that are not holes, in order.
    pub(crate) stored: Vec<StoredPiece>,
}

impl Content {
    /// Number of pieces, holes included.
    pub(crate) fn pieces(&self) -> u64 {
        self.size_bytes.div_ceil(CHUNK_BYTES)
    }

    /// Bytes of a piece: all have the full length but the last.
    pub(crate) fn piece_len_bytes(&self, piece: u32) -> u64 {
        (self.size_bytes - u64::from(piece) * CHUNK_BYTES).min(CHUNK_BYTES)
    }

    /// Whether some piece is a hole.
    pub(crate) fn has_holes(&self) -> bool {
        (self.stored.len() as u64) < self.pieces()
    }
}

/// A piece in the spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredPiece {
    /// Number of the piece in its file.
    pub(crate) piece: u32,
    /// Where it starts in the spool.
    pub(crate) offset_bytes: u64,
}

/// The contents of a layer.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    dir: PathBuf,
    len_bytes: u64,
    contents: Vec<Content>,
    by_identity: HashMap<Sha256, ContentId>,
    /// Where the pieces of large contents start: some 50 bytes for each 256 KiB of the layer.
    by_digest: HashMap<Sha256, u64>,
    holed_pieces: u64,
    /// The piece being filled.
    buffer: Vec<u8>,
}

impl Spool {
    /// An empty spool in a file without a name in `dir`.
    ///
    /// # Errors
    /// `DiskFull`, `NotFound` or `Io` naming the directory.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(dir)
            .map_err(|error| Error::io(format!("temporary directory {}", dir.display()), error))?;
        Ok(Self {
            file,
            dir: dir.to_owned(),
            len_bytes: 0,
            contents: Vec::new(),
            by_identity: HashMap::new(),
            by_digest: HashMap::new(),
            holed_pieces: 0,
            buffer: Vec::with_capacity(PIECE_BYTES),
        })
    }

    /// Starts a new content. Dropping the writer instead of finishing it leaves no trace.
    pub(crate) fn write(&mut self) -> ContentWriter<'_> {
        self.buffer.clear();
        let end_bytes = self.len_bytes;
        ContentWriter {
            spool: self,
            hasher: sha2::Sha256::new(),
            stored: Vec::new(),
            new: HashMap::new(),
            size_bytes: 0,
            end_bytes,
        }
    }

    pub(crate) fn content(&self, id: ContentId) -> &Content {
        &self.contents[id.0 as usize]
    }

    /// Bytes that the contents take on disk.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Number of different contents.
    pub(crate) fn len(&self) -> usize {
        self.contents.len()
    }

    /// Fills `buffer` from the spool.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> Result<()> {
        let what = || format!("reading back from {}", self.dir.display());
        self.file.read_exact_at(buffer, offset_bytes).map_err(|error| Error::io(what(), error))
    }
}

/// Writes one content into a [`Spool`].
pub(crate) struct ContentWriter<'a> {
    spool: &'a mut Spool,
    hasher: sha2::Sha256,
    stored: Vec<StoredPiece>,
    /// The pieces that the spool did not have.
    new: HashMap<Sha256, u64>,
    size_bytes: u64,
    /// End of what was written to the file, which becomes its length if the content is kept.
    end_bytes: u64,
}

impl ContentWriter<'_> {
    /// Appends bytes.
    pub(crate) fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = PIECE_BYTES - self.spool.buffer.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.spool.buffer.extend_from_slice(now);
            // Not sooner: the length at its end is what numbers a piece.
            self.size_bytes += now.len() as u64;
            bytes = later;
            if self.spool.buffer.len() == PIECE_BYTES {
                self.end_piece()?;
            }
        }
        Ok(())
    }

    /// Appends that many zero bytes.
    pub(crate) fn zeros(&mut self, len_bytes: u64) -> Result<()> {
        let too_sparse = || Error::unsupported("sparse files of more than 1 TiB in one layer");
        let end_bytes = self.size_bytes.checked_add(len_bytes).ok_or_else(too_sparse)?;
        if end_bytes / CHUNK_BYTES > HOLED_PIECES_MAX {
            return Err(too_sparse());
        }
        let mut left = len_bytes;
        while left > 0 {
            let room = PIECE_BYTES - self.spool.buffer.len();
            let now = usize::try_from(left).map_or(room, |left| left.min(room));
            if now == PIECE_BYTES {
                self.size_bytes += CHUNK_BYTES;
                self.hasher.update([HOLE]);
            } else {
                self.size_bytes += now as u64;
                let filled = self.spool.buffer.len() + now;
                self.spool.buffer.resize(filled, 0);
                if filled == PIECE_BYTES {
                    self.end_piece()?;
                }
            }
            left -= now as u64;
        }
        Ok(())
    }

    /// Hashes the piece in the buffer, and stores it unless it is zeros.
    fn end_piece(&mut self) -> Result<()> {
        let spool = &mut *self.spool;
        if spool.buffer.iter().all(|byte| *byte == 0) {
            self.hasher.update([HOLE]);
        } else {
            let digest = Sha256::of(&spool.buffer);
            self.hasher.update([STORED]);
            self.hasher.update(digest.0);
            let piece = u32::try_from((self.size_bytes - 1) / CHUNK_BYTES)
                .map_err(|_| Error::unsupported("a file of more than 1 PiB"))?;
            let known = spool.by_digest.get(&digest).or_else(|| self.new.get(&digest));
            let offset_bytes = known.copied().unwrap_or(self.end_bytes);
            if known.is_none() {
                let what = || format!("temporary directory {}", spool.dir.display());
                spool.file.write_all_at(&spool.buffer, self.end_bytes).map_err(|error| Error::io(what(), error))?;
                self.end_bytes += spool.buffer.len() as u64;
                self.new.insert(digest, offset_bytes);
            }
            self.stored.push(StoredPiece { piece, offset_bytes });
        }
        spool.buffer.clear();
        Ok(())
    }

    /// Ends the content and returns its name; that of an equal content if there is one.
    pub(crate) fn finish(mut self) -> Result<ContentId> {
        if !self.spool.buffer.is_empty() {
            self.end_piece()?;
        }
        self.hasher.update(self.size_bytes.to_le_bytes());
        let identity = finish(self.hasher);
        if let Some(id) = self.spool.by_identity.get(&identity) {
            return Ok(*id);
        }
        let content = Content { size_bytes: self.size_bytes, identity, stored: self.stored };
        if content.has_holes() {
            self.spool.holed_pieces += content.pieces();
            if self.spool.holed_pieces > HOLED_PIECES_MAX {
                return Err(Error::unsupported("sparse files of more than 1 TiB in one layer"));
            }
        }
        let id = u32::try_from(self.spool.contents.len()).map_err(|_| Error::unsupported("2^32 files in one layer"))?;
        let id = ContentId(id);
        self.spool.len_bytes = self.end_bytes;
        // Small contents are packed with others, so no piece of a large one can be theirs.
        if content.size_bytes >= CHUNK_BYTES {
            self.spool.by_digest.extend(self.new);
        }
        self.spool.contents.push(content);
        self.spool.by_identity.insert(identity, id);
        Ok(id)
    }
}

/// What the identity of a content says about a piece: a hole, or that the piece's digest follows.
const HOLE: u8 = 0;
const STORED: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn spool() -> Spool {
        Spool::new(&std::env::temp_dir()).unwrap()
    }

    fn add(spool: &mut Spool, data: &[u8]) -> ContentId {
        let mut writer = spool.write();
        writer.data(data).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn equal_contents_are_stored_once() {
        let mut spool = spool();
        let large = vec![7; PIECE_BYTES + 10];
        let first = add(&mut spool, &large);
        let other = add(&mut spool, b"other");
        let before = spool.len_bytes();
        assert_eq!(add(&mut spool, &large), first);
        assert_ne!(other, first);
        assert_eq!(spool.len_bytes(), before);
        assert_eq!(spool.content(first).stored.len(), 2);
        let mut back = vec![0; 5];
        spool.read_at(&mut back, spool.content(other).stored[0].offset_bytes).unwrap();
        assert_eq!(back, b"other");
    }

    #[test]
    fn equal_pieces_of_large_contents_are_stored_once() {
        let mut spool = spool();
        let piece = |fill: u8| vec![fill; PIECE_BYTES];
        let first = add(&mut spool, &[piece(1), piece(2), piece(1), vec![3; 10]].concat());
        let offsets = |spool: &Spool, id| {
            spool.content(id).stored.iter().map(|piece| piece.offset_bytes / CHUNK_BYTES).collect::<Vec<_>>()
        };
        assert_eq!((offsets(&spool, first), spool.len_bytes()), (vec![0, 1, 0, 2], 2 * CHUNK_BYTES + 10));
        let second = add(&mut spool, &[piece(2), piece(4), vec![3; 10]].concat());
        assert_eq!(offsets(&spool, second)[0], 1);
        assert_eq!(spool.content(second).stored[2], StoredPiece { piece: 2, offset_bytes: 2 * CHUNK_BYTES });
        // What was not finished is not there.
        spool.write().data(&[piece(5), piece(5)].concat()).unwrap();
        let third = add(&mut spool, &[piece(6), piece(5)].concat());
        let mut back = piece(0);
        spool.read_at(&mut back, spool.content(third).stored[1].offset_bytes).unwrap();
        assert_eq!(back, piece(5));
    }

    #[test]
    fn zeros_are_holes_however_they_come() {
        let mut spool = spool();
        let written = add(&mut spool, &vec![0; 3 * PIECE_BYTES]);
        let mut writer = spool.write();
        writer.zeros(3 * CHUNK_BYTES).unwrap();
        assert_eq!(writer.finish().unwrap(), written);
        assert!(spool.content(written).has_holes() && spool.len_bytes() == 0);

        let mut writer = spool.write();
        writer.zeros(2 * CHUNK_BYTES + 5).unwrap();
        writer.data(b"x").unwrap();
        writer.zeros(CHUNK_BYTES).unwrap();
        let id = writer.finish().unwrap();
        let content = spool.content(id);
        assert_eq!(content.size_bytes, 3 * CHUNK_BYTES + 6);
        assert_eq!(content.stored, [StoredPiece { piece: 2, offset_bytes: 0 }]);
        let mut back = vec![0; PIECE_BYTES];
        spool.read_at(&mut back, 0).unwrap();
        assert_eq!(back.iter().position(|byte| *byte == b'x'), Some(5));
    }

    #[test]
    fn pieces_are_numbered_by_their_place_however_they_are_written() {
        let mut spool = spool();
        for step in [1000, 100_000, 3 * PIECE_BYTES] {
            let mut writer = spool.write();
            writer.zeros(CHUNK_BYTES + 5).unwrap();
            for part in vec![7; 2 * PIECE_BYTES + 1].chunks(step) {
                writer.data(part).unwrap();
            }
            let id = writer.finish().unwrap();
            let content = spool.content(id);
            let pieces: Vec<u32> = content.stored.iter().map(|piece| piece.piece).collect();
            assert_eq!((pieces, content.piece_len_bytes(3)), (vec![1, 2, 3], 6), "{step} bytes at once");
        }
    }

    #[test]
    fn a_length_is_part_of_the_identity() {
        let mut spool = spool();
        let (one, two) = (add(&mut spool, &[0; 1]), add(&mut spool, &[0; 2]));
        assert_ne!(one, two);
        assert_ne!(add(&mut spool, b""), one);
    }

    #[test]
    fn absurd_holes_are_refused_quickly() {
        let mut spool = spool();
        assert!(spool.write().zeros(u64::MAX).is_err());
        assert!(spool.write().zeros(2 << 40).is_err());
    }
}
