//! An attached image as the device sees it: from a range of device blocks to ranges of local files.
//!
//! A queue thread calls [`ServedImage::plan`] for each request: it is arithmetic and a few atomic loads, takes no lock,
//! performs no I/O, and allocates nothing once the [`Plan`] has grown. When everything is there the request is answered
//! from the files of the plan. Otherwise [`ServedImage::demand`] parks the request: it returns at once, and the waiter
//! runs later, on the engine's thread; after `Ok` the range is planned again.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ublkimg_image::{BLOCK_SIZE, ChunkIndex, DeviceMap, TAIL_BLOCKS, Target};
use ublkimg_scheduler::{BlobKey, ChunkKey, ImageKey};

use crate::counters::{ImageCounters, ImageStatistics};
use crate::engine::EngineHandle;
use crate::error::{Error, ErrorKind, Result};
use crate::first_reads::{DeviceRead, FirstReads, Waited};
use crate::store::BlobFile;

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

/// A layer blob of the image.
#[derive(Debug)]
pub(crate) struct ServedBlob {
    pub(crate) key: BlobKey,
    pub(crate) file: Arc<BlobFile>,
    pub(crate) index: Arc<ChunkIndex>,
    /// A bit for each chunk that was read, so that each first read is told to the scheduler once.
    touched: Box<[AtomicU64]>,
}

impl ServedBlob {
    pub(crate) fn new(key: BlobKey, file: Arc<BlobFile>, index: Arc<ChunkIndex>) -> Self {
        let words = index.len().div_ceil(u64::BITS);
        Self { key, file, index, touched: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Notes that a chunk was read; true the first time.
    fn touch(&self, chunk: u32) -> bool {
        let (word, bit) = (&self.touched[(chunk / u64::BITS) as usize], 1 << (chunk % u64::BITS));
        // Most reads are not the first: look before writing to a line that other threads read.
        word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}

/// How an image reaches the engine; detaches it when dropped.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) engine: EngineHandle,
    pub(crate) image: ImageKey,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.engine.detach(self.image);
    }
}

/// One attached image. Shared by the device's queue threads; detached when the last of them lets go.
#[derive(Debug)]
pub struct ServedImage {
    map: DeviceMap,
    /// The metadata image, then the blob files.
    files: Vec<Arc<File>>,
    blobs: Vec<ServedBlob>,
    counters: Arc<ImageCounters>,
    first_reads: FirstReads,
    /// `None` for an image that needs no engine, because it has no blobs.
    attachment: Option<Attachment>,
}

impl ServedImage {
    /// An image that lies wholly in one local file of `file_blocks` blocks, followed by zeros.
    ///
    /// # Errors
    /// `Invalid` without a block, or with more than a device can have.
    pub fn complete(file: File, file_blocks: u32) -> Result<Self> {
        Self::new(Arc::new(file), file_blocks, Vec::new(), Arc::default(), None)
    }

    /// An image of a metadata image and layer blobs, in the order of its device table.
    pub(crate) fn new(
        metadata: Arc<File>,
        metadata_blocks: u32,
        blobs: Vec<ServedBlob>,
        counters: Arc<ImageCounters>,
        attachment: Option<Attachment>,
    ) -> Result<Self> {
        let blob_blocks: Vec<u32> = blobs.iter().map(|blob| blob.index.raw_len_blocks()).collect();
        let map = DeviceMap::new(metadata_blocks, &blob_blocks)
            .map_err(|error| Error::caused(ErrorKind::Invalid, "lay out the device", error))?;
        let files = std::iter::once(metadata).chain(blobs.iter().map(|blob| Arc::clone(blob.file.file()))).collect();
        let blob_blocks = map.metadata_blocks()..map.total_blocks() - TAIL_BLOCKS;
        let first_reads = FirstReads::new(blob_blocks);
        Ok(Self { map, files, blobs, counters, first_reads, attachment })
    }

    /// Length of the device.
    #[must_use]
    pub fn total_blocks(&self) -> u32 {
        self.map.total_blocks()
    }

    /// The files that pieces refer to; to be read at offsets only.
    #[must_use]
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    /// A request of the device has arrived: to be called once for each, before it is planned.
    #[must_use]
    pub fn begin(&self, start_block: u32, len_blocks: u32) -> DeviceRead {
        self.first_reads.begin(start_block..start_block.saturating_add(len_blocks))
    }

    /// The request is about to wait: what it waited for is noted in what this returns, which goes to
    /// [`ServedImage::demand`].
    #[must_use]
    pub fn wait(&self, read: &mut DeviceRead) -> Arc<Waited> {
        self.first_reads.wait(read)
    }

    /// What was read so far, and how that went.
    #[allow(dead_code, reason = "the recorder is being written")]
    pub(crate) fn first_reads(&self) -> &FirstReads {
        &self.first_reads
    }

    /// Fills `plan` for a range of device blocks, less than 4 GiB long. Blocks past the end of the device read as zeros.
    pub fn plan(&self, start_block: u32, len_blocks: u32, plan: &mut Plan) -> Readiness {
        plan.pieces.clear();
        plan.missing.clear();
        let mut planned_blocks = 0;
        for segment in self.map.segments(start_block, len_blocks) {
            planned_blocks += segment.len_blocks;
            let len_bytes = segment.len_blocks * BLOCK_SIZE_BYTES;
            plan.pieces.push(match segment.target {
                Target::Metadata { block } => Piece::File { file: 0, offset_bytes: offset_of(block), len_bytes },
                Target::Blob { index, block } => {
                    self.look_up(usize::from(index), block..block + segment.len_blocks, &mut plan.missing);
                    Piece::File { file: index + 1, offset_bytes: offset_of(block), len_bytes }
                }
                Target::Zero => Piece::Zero { len_bytes },
            });
        }
        if planned_blocks < len_blocks {
            plan.pieces.push(Piece::Zero { len_bytes: (len_blocks - planned_blocks) * BLOCK_SIZE_BYTES });
        }
        if plan.missing.is_empty() { Readiness::Ready } else { Readiness::Missing }
    }

    /// Notes the chunks of a range of blocks of a blob as read, and appends those that are not in the store.
    fn look_up(&self, blob: usize, blocks: Range<u32>, missing: &mut Vec<ChunkKey>) {
        let blob = &self.blobs[blob];
        let mut first_missing = blob.file.first_missing(blocks.clone());
        let mut at = blocks.start;
        while at < blocks.end {
            let chunk = blob.index.find(offset_of(at));
            let key = ChunkKey { blob: blob.key, chunk };
            let raw_end = blob.index.chunk(chunk).raw.end / BLOCK_SIZE as u64;
            let end = u32::try_from(raw_end).unwrap_or(u32::MAX).min(blocks.end);
            let first_read = blob.touch(chunk);
            if first_missing.is_some_and(|block| block < end) {
                missing.push(key);
                first_missing = blob.file.first_missing(end..blocks.end);
            } else if first_read && let Some(attachment) = &self.attachment {
                attachment.engine.touch(key);
            }
            at = end;
        }
    }

    /// Asks for what `plan` (of [`Readiness::Missing`]) misses. Never blocks. `waiter` runs exactly once, perhaps before
    /// this returns, and with EIO at the latest when the engine stops.
    pub fn demand(&self, plan: &Plan, waited: Arc<Waited>, waiter: Waiter) {
        let Some(attachment) = &self.attachment else { return waiter(Ok(())) };
        attachment.engine.demand(plan.missing.clone(), Arc::clone(&self.counters), waited, waiter);
    }

    /// To be called by the device once for each request: with the length when it is answered with data, else with the
    /// positive errno.
    pub fn answered(&self, read: &DeviceRead, outcome: Result<u32, i32>) {
        self.first_reads.answered(read, outcome.is_ok());
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

    /// Lets go of the engine before the image is dropped: fetches for this image alone end, and whoever waits for them
    /// gets EIO. Reads of what is in the store still work.
    pub fn detach(&self) {
        if let Some(attachment) = &self.attachment {
            attachment.engine.detach(attachment.image);
        }
    }

    /// What the image has done so far.
    #[must_use]
    pub fn statistics(&self) -> ImageStatistics {
        ImageStatistics { first_reads: self.first_reads.statistics(), ..self.counters.statistics() }
    }

    /// Bytes of the layer blobs that are in the store, and all of them.
    #[must_use]
    pub fn stored_bytes(&self) -> (u64, u64) {
        let bytes = |blocks: u32| u64::from(blocks) * u64::from(BLOCK_SIZE_BYTES);
        let sum = |of: fn(&BlobFile) -> u32| self.blobs.iter().map(|blob| bytes(of(&blob.file))).sum();
        (sum(BlobFile::present_blocks), sum(BlobFile::blocks))
    }
}

fn offset_of(block: u32) -> u64 {
    u64::from(block) * u64::from(BLOCK_SIZE_BYTES)
}
