//! The rest of an image, in the order of its blobs: what nobody asked for.

use crate::table::{State, Table};
use crate::types::{BlobKey, ChunkKey, FillMode, FillProgress, Now};

/// Silence on a link before an idle fill uses it: longer than most pauses of a start.
pub(crate) const QUIET: Now = Now::from_millis(200);

/// Times that an image is gone through. A chunk that failed is asked for again by the next pass.
const PASSES_MAX: u32 = 3;

/// Pause between two passes: longer than a failure is held.
const PASS_PAUSE: Now = Now::from_secs(5);

/// The fill of one image.
#[derive(Debug)]
pub(crate) struct Fill {
    pub(crate) mode: FillMode,
    blobs: Vec<BlobKey>,
    /// Where the pass is.
    blob: usize,
    chunk: u32,
    passes: u32,
    /// The next pass begins here.
    resume_at: Now,
}

impl Fill {
    pub(crate) fn new(mode: FillMode, blobs: &[BlobKey]) -> Self {
        let (blobs, resume_at) = (blobs.to_vec(), Now::ZERO);
        Self { mode, blobs, blob: 0, chunk: 0, passes: 0, resume_at }
    }

    /// The next chunk to fetch. Chunks that need nothing are passed for good, or until the next pass.
    pub(crate) fn peek(&mut self, now: Now, table: &Table) -> Option<ChunkKey> {
        if self.mode == FillMode::Off || now < self.resume_at {
            return None;
        }
        while let Some(&blob) = self.blobs.get(self.blob) {
            let chunks = table.blob(blob).map_or(&[][..], |blob| &blob.chunks);
            while let Some(chunk) = chunks.get(self.chunk as usize) {
                if chunk.state == State::Absent {
                    return Some(ChunkKey { blob, chunk: self.chunk });
                }
                self.chunk += 1;
            }
            (self.blob, self.chunk) = (self.blob + 1, 0);
        }
        if self.passes + 1 < PASSES_MAX && !self.is_complete(table) {
            // Some may still be under way; what failed a moment ago fails again.
            self.passes += 1;
            (self.blob, self.chunk, self.resume_at) = (0, 0, now + PASS_PAUSE);
        }
        None
    }

    /// The chunks before this one need nothing more in this pass.
    pub(crate) fn pass(&mut self, chunks_end: u32) {
        self.chunk = chunks_end;
    }

    pub(crate) fn resume_at(&self) -> Option<Now> {
        (!self.at_end() && self.mode != FillMode::Off).then_some(self.resume_at)
    }

    fn is_complete(&self, table: &Table) -> bool {
        let blobs = self.blobs.iter().filter_map(|blob| table.blob(*blob));
        blobs.into_iter().all(|blob| blob.present_bytes == blob.total_bytes)
    }

    /// Nothing is left to ask for.
    pub(crate) fn at_end(&self) -> bool {
        self.blob >= self.blobs.len()
    }

    pub(crate) fn progress(&self, table: &Table) -> FillProgress {
        let mut progress = FillProgress::default();
        for blob in self.blobs.iter().filter_map(|blob| table.blob(*blob)) {
            progress.present_bytes += blob.present_bytes;
            progress.total_bytes += blob.total_bytes;
        }
        progress.finished = progress.present_bytes == progress.total_bytes || self.at_end();
        progress
    }
}
