//! One content on its way into the spool, piece by piece.

use sha2::Digest as _;
use ublkimg_image::Sha256;

use super::{Content, ContentId, HOLED_PIECES_MAX, PieceAt, Spool, StoredPiece};
use crate::error::{Error, Result};
use crate::hashing::finish;

/// What the identity of a content says: all zeros, or that the digest of its bytes follows.
const HOLE: u8 = 0;
const STORED: u8 = 1;

/// Writes one content into a [`Spool`].
pub(crate) struct ContentWriter<'a> {
    spool: &'a mut Spool,
    piece_bytes: usize,
    stored: Vec<StoredPiece>,
    size_bytes: u64,
}

impl<'a> ContentWriter<'a> {
    pub(super) fn new(spool: &'a mut Spool) -> Self {
        spool.buffer.clear();
        Self { piece_bytes: spool.chunk_size.bytes_usize(), spool, stored: Vec::new(), size_bytes: 0 }
    }

    /// Appends bytes.
    pub(crate) fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = self.piece_bytes - self.spool.buffer.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.spool.buffer.extend_from_slice(now);
            // Not sooner: the length at its end is what numbers a piece.
            self.size_bytes += now.len() as u64;
            bytes = later;
            if self.spool.buffer.len() == self.piece_bytes {
                self.end_piece()?;
            }
        }
        Ok(())
    }

    /// Appends that many zero bytes.
    pub(crate) fn zeros(&mut self, len_bytes: u64) -> Result<()> {
        let end_bytes = self.size_bytes.checked_add(len_bytes).ok_or_else(too_sparse)?;
        if end_bytes / self.piece_bytes as u64 > HOLED_PIECES_MAX {
            return Err(too_sparse());
        }
        let mut left = len_bytes;
        while left > 0 {
            let room = self.piece_bytes - self.spool.buffer.len();
            let now = usize::try_from(left).map_or(room, |left| left.min(room));
            if now == self.piece_bytes {
                self.size_bytes += now as u64;
            } else {
                self.size_bytes += now as u64;
                let filled = self.spool.buffer.len() + now;
                self.spool.buffer.resize(filled, 0);
                if filled == self.piece_bytes {
                    self.end_piece()?;
                }
            }
            left -= now as u64;
        }
        Ok(())
    }

    /// Ends a piece of a large content: it is compressed unless it is zeros.
    fn end_piece(&mut self) -> Result<()> {
        if !self.is_zeros() {
            let piece = u32::try_from((self.size_bytes - 1) / self.piece_bytes as u64)
                .map_err(|_| Error::unsupported("a file of more than 1 PiB"))?;
            self.stored.push(StoredPiece { piece, at: PieceAt::Chunk(self.spool.compress()?) });
        }
        self.spool.buffer.clear();
        Ok(())
    }

    fn is_zeros(&self) -> bool {
        self.spool.buffer.iter().all(|byte| *byte == 0)
    }

    /// Ends the content and returns its name; that of an equal small content if there is one.
    ///
    /// # Errors
    /// `DiskFull` or `Io` naming the spool's directory; `Unsupported` for too many files or holes.
    pub(crate) fn finish(mut self) -> Result<ContentId> {
        if self.size_bytes < self.piece_bytes as u64 {
            return self.finish_small();
        }
        if !self.spool.buffer.is_empty() {
            self.end_piece()?;
        }
        self.add(None)
    }

    fn finish_small(mut self) -> Result<ContentId> {
        let is_hole = self.is_zeros();
        let mut hasher = sha2::Sha256::new();
        if !is_hole {
            hasher.update([STORED]);
            hasher.update(Sha256::of(&self.spool.buffer).0);
        } else if self.size_bytes > 0 {
            hasher.update([HOLE]);
        }
        hasher.update(self.size_bytes.to_le_bytes());
        let identity = finish(hasher);
        if let Some(id) = self.spool.by_identity.get(&identity) {
            return Ok(*id);
        }
        if !is_hole {
            let offset_bytes = self.spool.append_buffer()?;
            self.stored.push(StoredPiece { piece: 0, at: PieceAt::Raw { offset_bytes } });
        }
        self.add(Some(identity))
    }

    fn add(self, identity: Option<Sha256>) -> Result<ContentId> {
        let spool = self.spool;
        let content = Content {
            size_bytes: self.size_bytes,
            piece_bytes: self.piece_bytes as u64,
            identity,
            stored: self.stored,
        };
        if content.has_holes() {
            spool.holed_pieces += content.pieces();
            if spool.holed_pieces > HOLED_PIECES_MAX {
                return Err(too_sparse());
            }
        }
        let id = u32::try_from(spool.contents.len()).map_err(|_| Error::unsupported("2^32 files in one layer"))?;
        let id = ContentId(id);
        spool.contents.push(content);
        spool.by_identity.extend(identity.map(|identity| (identity, id)));
        Ok(id)
    }
}

fn too_sparse() -> Error {
    Error::unsupported(format!("sparse files of more than {HOLED_PIECES_MAX} chunks in one layer"))
}
