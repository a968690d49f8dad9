//! An attached image as the device sees it: from a range of device blocks to ranges of local files.
//!
//! A queue thread calls [`ServedImage::plan`] for each request: it is arithmetic and a few atomic loads, takes no lock,
//! performs no I/O, and allocates nothing once the [`Plan`] has grown. When everything is there the request is answered
//! from the files of the plan. Otherwise [`ServedImage::demand`] parks the request: it returns at once, and the waiter
//! runs later, on the engine's thread; after `Ok` the range is planned again.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ublkimg_scheduler::ChunkKey;

/// Bytes of a block: the unit of the device.
pub const BLOCK_SIZE_BYTES: u32 = 4096;

/// Called exactly once when a parked request can be planned again, or with a positive errno. Runs on the engine's
/// thread: it must hand the news on (a message, an eventfd) and return.
pub type Waiter = Box<dyn FnOnce(Result<(), i32>) + Send>;

/// Where the next bytes of a request come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// From a local file: index into [`ServedImage::files`].
    File {
        /// Index of the file.
        file: u16,
        /// Offset in it, a multiple of the block size.
        offset_bytes: u64,
        /// A multiple of the block size.
        len_bytes: u32,
    },
    /// Zeros.
    Zero {
        /// A multiple of the block size.
        len_bytes: u32,
    },
}

/// Whether a request can be answered now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Every piece of the plan can be read.
    Ready,
    /// The request needs chunks that are not in the store: [`ServedImage::demand`] fetches them.
    Missing,
}

/// How to answer one request. Reuse it: its vectors keep their capacity.
#[derive(Debug, Default)]
pub struct Plan {
    pieces: Vec<Piece>,
    missing: Vec<ChunkKey>,
}

impl Plan {
    /// An empty plan.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// In the order of the device; together exactly the range that was planned. Only to be read when the plan is
    /// [`Readiness::Ready`].
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }
}

/// What an image has done since it was attached.
#[derive(Debug, Default)]
pub struct ImageCounters {
    /// Requests planned as ready at once.
    pub hits: AtomicU64,
    /// Requests that had to wait.
    pub misses: AtomicU64,
    /// Requests answered with an error.
    pub errors: AtomicU64,
    /// Requests answered with data, by [`ServedImage::answered`].
    pub reads: AtomicU64,
    /// Bytes of those.
    pub read_bytes: AtomicU64,
}

/// One attached image. Shared by the device's queue threads.
#[derive(Debug)]
pub struct ServedImage {
    files: Vec<Arc<File>>,
    total_blocks: u32,
    file_blocks: u32,
    counters: ImageCounters,
}

impl ServedImage {
    /// An image that lies wholly in one local file, followed by zeros up to `total_blocks`.
    #[must_use]
    pub fn complete(file: File, file_blocks: u32, total_blocks: u32) -> Self {
        Self { files: vec![Arc::new(file)], total_blocks, file_blocks, counters: ImageCounters::default() }
    }

    /// Length of the device.
    #[must_use]
    pub fn total_blocks(&self) -> u32 {
        self.total_blocks
    }

    /// The files that pieces refer to; opened for reading and writing, to be read at offsets only.
    #[must_use]
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    /// Fills `plan` for a range of device blocks. Blocks past the end of the device read as zeros.
    pub fn plan(&self, start_block: u32, len_blocks: u32, plan: &mut Plan) -> Readiness {
        plan.pieces.clear();
        plan.missing.clear();
        let in_file = self.file_blocks.saturating_sub(start_block).min(len_blocks);
        if in_file > 0 {
            let offset_bytes = u64::from(start_block) * u64::from(BLOCK_SIZE_BYTES);
            plan.pieces.push(Piece::File { file: 0, offset_bytes, len_bytes: in_file * BLOCK_SIZE_BYTES });
        }
        if len_blocks > in_file {
            plan.pieces.push(Piece::Zero { len_bytes: (len_blocks - in_file) * BLOCK_SIZE_BYTES });
        }
        Readiness::Ready
    }

    /// Asks for what `plan` (of [`Readiness::Missing`]) misses. Never blocks. `waiter` runs exactly once, perhaps before
    /// this returns.
    pub fn demand(&self, plan: &Plan, waiter: Waiter) {
        debug_assert!(plan.missing.is_empty(), "everything is there");
        waiter(Ok(()));
    }

    /// To be called by the device when a request is answered, with its length, or a positive errno.
    pub fn answered(&self, outcome: Result<u32, i32>) {
        match outcome {
            Ok(len_bytes) => {
                self.counters.reads.fetch_add(1, Ordering::Relaxed);
                self.counters.read_bytes.fetch_add(u64::from(len_bytes), Ordering::Relaxed);
            }
            Err(_) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// What the image has done so far.
    #[must_use]
    pub fn counters(&self) -> &ImageCounters {
        &self.counters
    }
}
