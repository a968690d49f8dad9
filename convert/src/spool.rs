//! Contents of files between the archive and the blob: one unlinked file per layer.
//!
//! A layer's metadata comes first in its blob and is known last, so file contents wait on disk. Each file is cut in
//! pieces of one chunk; a piece of zeros is a hole and takes no room. The file has no name, so nothing is left behind
//! however the program ends.
//!
//! A piece of a large file will be a chunk of its own wherever the file ends up, so it is compressed at once, on other
//! threads while the next ones are read, and waits as the frame that it will be; its chunk id tells whether an equal one
//! is here. Small files wait as they are, because which of them make a chunk is known when all are there; a SHA-256 tells
//! whether an equal one is here.

mod writer;

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use ublkimg_image::{BLOCK_SIZE, CHUNK_BYTES, ChunkId, Sha256};

use crate::chunk_size::ChunkSize;
use crate::error::{Error, Result};
use crate::frames::{Chunk, Compress, Frame, Frames};

pub(crate) use writer::ContentWriter;

/// Most bytes of a piece: the grain of holes and of large files' chunks.
#[expect(clippy::cast_possible_truncation, reason = "256 KiB")]
pub(crate) const PIECE_BYTES: usize = CHUNK_BYTES as usize;

/// Most pieces, stored or holes, of the files with holes in one layer: 1 TiB of the largest pieces. Each takes four bytes of
/// metadata.
const HOLED_PIECES_MAX: u64 = 4 << 20;

/// Names a content of one [`Spool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ContentId(u32);

/// The bytes of one or more files.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) size_bytes: u64,
    /// Of a piece; the last one may be shorter.
    pub(crate) piece_bytes: u64,
    /// Of a small content: a digest of its size and bytes.
    pub(crate) identity: Option<Sha256>,
    /// The pieces that are not holes, in order.
    pub(crate) stored: Vec<StoredPiece>,
}

impl Content {
    /// Number of pieces, holes included.
    pub(crate) fn pieces(&self) -> u64 {
        self.size_bytes.div_ceil(self.piece_bytes)
    }

    /// Bytes of a piece: all have the full length but the last.
    pub(crate) fn piece_len_bytes(&self, piece: u32) -> u64 {
        (self.size_bytes - u64::from(piece) * self.piece_bytes).min(self.piece_bytes)
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
    pub(crate) at: PieceAt,
}

/// Where a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PieceAt {
    /// The only piece of a small content, as it is.
    Raw { offset_bytes: u64 },
    /// A piece of a large content, by the order in which they came.
    Chunk(ChunkNumber),
}

/// Numbers the pieces of large contents; equal ones too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChunkNumber(u32);

/// A piece of a large content, compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredChunk {
    offset_bytes: u64,
    len_bytes: usize,
    pub(crate) id: ChunkId,
}

/// The contents of a layer.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    dir: PathBuf,
    /// Length of the file.
    pub(crate) end_bytes: u64,
    len_bytes: u64,
    contents: Vec<Content>,
    /// The small ones.
    by_identity: HashMap<Sha256, ContentId>,
    /// The pieces of large contents, by number; some 100 bytes for each 256 KiB of the layer, with `by_id`.
    chunks: Vec<StoredChunk>,
    by_id: HashMap<ChunkId, StoredChunk>,
    chunk_size: ChunkSize,
    how: Compress,
    /// What compresses them, while it does.
    frames: Option<Frames>,
    /// Number of them, those included that are not compressed yet.
    chunks_begun: u32,
    holed_pieces: u64,
    /// The piece being filled.
    buffer: Vec<u8>,
}

impl Spool {
    /// An empty spool in a file without a name in `dir`. Contents of `chunk_size` and more are large.
    ///
    /// # Errors
    /// `DiskFull`, `NotFound` or `Io` naming the directory.
    pub(crate) fn new(dir: &Path, chunk_size: ChunkSize, how: Compress) -> Result<Self> {
        let file = tempfile::tempfile_in(dir)
            .map_err(|error| Error::io(format!("temporary directory {}", dir.display()), error))?;
        Ok(Self {
            file,
            dir: dir.to_owned(),
            end_bytes: 0,
            len_bytes: 0,
            contents: Vec::new(),
            by_identity: HashMap::new(),
            chunks: Vec::new(),
            by_id: HashMap::new(),
            chunk_size,
            how,
            frames: None,
            chunks_begun: 0,
            holed_pieces: 0,
            buffer: Vec::with_capacity(chunk_size.bytes_usize()),
        })
    }

    /// Starts a new content. Dropping the writer instead of finishing it leaves no content.
    pub(crate) fn write(&mut self) -> ContentWriter<'_> {
        ContentWriter::new(self)
    }

    /// Waits until all pieces are compressed. Nothing can be read before.
    ///
    /// # Errors
    /// `DiskFull` or `Io` naming the directory.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let Some(mut frames) = self.frames.take() else { return Ok(()) };
        while let Some(frame) = frames.pop()? {
            self.keep(&frame)?;
        }
        Ok(())
    }

    pub(crate) fn content(&self, id: ContentId) -> &Content {
        &self.contents[id.0 as usize]
    }

    /// Bytes of the contents, before they are compressed; of equal small ones, those of one.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The grain.
    pub(crate) fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    /// Number of different contents.
    pub(crate) fn len(&self) -> usize {
        self.contents.len()
    }

    /// Fills `buffer` with the start of a piece.
    ///
    /// # Errors
    /// `Io` naming the directory.
    pub(crate) fn read(&self, buffer: &mut [u8], at: PieceAt) -> Result<()> {
        match at {
            PieceAt::Raw { offset_bytes } => self.read_at(buffer, offset_bytes),
            PieceAt::Chunk(number) => {
                let frame = self.read_chunk(self.chunk(number)?)?;
                let raw = zstd::bulk::decompress(&frame, PIECE_BYTES).map_err(|error| self.in_dir(error))?;
                let raw = raw.get(..buffer.len()).ok_or_else(|| self.in_dir(ErrorKind::UnexpectedEof.into()))?;
                buffer.copy_from_slice(raw);
                Ok(())
            }
        }
    }

    /// A piece of a large content. Equal pieces are the same chunk.
    ///
    /// # Errors
    /// `Io` when it is not compressed yet.
    pub(crate) fn chunk(&self, number: ChunkNumber) -> Result<StoredChunk> {
        let chunk = self.chunks.get(number.0 as usize).copied();
        chunk.ok_or_else(|| self.in_dir(ErrorKind::NotFound.into()))
    }

    /// The frame of a chunk: the piece and zeros to the end of its last block.
    ///
    /// # Errors
    /// `Io` naming the directory.
    pub(crate) fn read_chunk(&self, chunk: StoredChunk) -> Result<Vec<u8>> {
        let mut frame = vec![0; chunk.len_bytes];
        self.read_at(&mut frame, chunk.offset_bytes)?;
        Ok(frame)
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset_bytes).map_err(|error| self.in_dir(error))
    }

    /// Appends bytes to the file. Returns where they start.
    fn append(&mut self, bytes: &[u8]) -> Result<u64> {
        let offset_bytes = self.end_bytes;
        self.file.write_all_at(bytes, offset_bytes).map_err(|error| self.in_dir(error))?;
        self.end_bytes += bytes.len() as u64;
        Ok(offset_bytes)
    }

    /// Appends what is in the buffer: a small content.
    fn append_buffer(&mut self) -> Result<u64> {
        let buffer = std::mem::take(&mut self.buffer);
        let offset_bytes = self.append(&buffer)?;
        self.len_bytes += buffer.len() as u64;
        self.buffer = buffer;
        Ok(offset_bytes)
    }

    /// Has the piece in the buffer compressed.
    fn compress(&mut self) -> Result<ChunkNumber> {
        self.len_bytes += self.buffer.len() as u64;
        let mut raw = std::mem::replace(&mut self.buffer, Vec::with_capacity(self.chunk_size.bytes_usize()));
        raw.resize(raw.len().next_multiple_of(BLOCK_SIZE), 0);
        let how = self.how;
        let frame = self.frames.get_or_insert_with(|| Frames::new(how)).push(Chunk::Raw(raw))?;
        if let Some(frame) = frame {
            self.keep(&frame)?;
        }
        let number = ChunkNumber(self.chunks_begun);
        self.chunks_begun =
            self.chunks_begun.checked_add(1).ok_or_else(|| Error::unsupported("a layer of more than 1 PiB"))?;
        Ok(number)
    }

    fn keep(&mut self, frame: &Frame) -> Result<()> {
        let chunk = match self.by_id.get(&frame.id) {
            Some(equal) => *equal,
            None => {
                let offset_bytes = self.append(&frame.stored)?;
                let chunk = StoredChunk { offset_bytes, len_bytes: frame.stored.len(), id: frame.id };
                self.by_id.insert(frame.id, chunk);
                chunk
            }
        };
        self.chunks.push(chunk);
        Ok(())
    }

    fn in_dir(&self, error: std::io::Error) -> Error {
        Error::io(format!("temporary directory {}", self.dir.display()), error)
    }
}

#[cfg(test)]
mod tests;
