//! An attached image as the device sees it: from a range of device blocks to ranges of local files.
//!
//! A queue thread calls [`ServedImage::plan`] for each request: it is arithmetic and a few atomic loads, takes no lock,
//! performs no I/O, and allocates nothing once the [`Plan`] has grown. When everything is there the request is answered
//! from the files of the plan. A block is taken from the layer's blob file if it is there, else from the hot file of the
//! profile that the image is started with. Otherwise [`ServedImage::demand`] parks the request: it returns at once, and the waiter
//! runs later, on the engine's thread; after `Ok` the range is planned again.

mod units;

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ublkimg_image::{BLOCK_SIZE, ChunkIndex, DeviceMap, Segment, Target};
use ublkimg_scheduler::{BlobKey, ChunkKey, FillMode};

use crate::counters::{ImageCounters, ImageStatistics};
use crate::engine::{Attachment, ImageReport};
use crate::error::{Error, ErrorKind, Result};
use crate::first_reads::{DeviceRead, FirstReads, Waited};
use crate::hot::{HotMap, Withdrawn};
use crate::outage::Waiting;
use crate::start_events::StartEvents;
use crate::store::{BlobFile, Place, Reader};

pub(crate) use units::{UnitKey, local};

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
    /// Evictions before the plan was made.
    evictions: u64,
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

    /// Adds blocks of a file, to the last piece if they follow it.
    fn push_file(&mut self, file: u16, first_block: u32, len_blocks: u32) {
        let (start_bytes, more_bytes) = (offset_of(first_block), len_blocks * BLOCK_SIZE_BYTES);
        if let Some(Piece::File { file: last, offset_bytes, len_bytes }) = self.pieces.last_mut()
            && *last == file
            && *offset_bytes + u64::from(*len_bytes) == start_bytes
        {
            *len_bytes += more_bytes;
        } else {
            self.pieces.push(Piece::File { file, offset_bytes: start_bytes, len_bytes: more_bytes });
        }
    }

    /// Adds a chunk that is not there. A request has few.
    fn push_missing(&mut self, chunk: ChunkKey) {
        if !self.missing.contains(&chunk) {
            self.missing.push(chunk);
        }
    }
}

/// A layer blob of the image.
#[derive(Debug)]
pub(crate) struct ServedBlob {
    pub(crate) key: BlobKey,
    pub(crate) file: Arc<BlobFile>,
    pub(crate) index: Arc<ChunkIndex>,
    /// Whether each chunk was in the store when attaching began.
    was_local: Box<[bool]>,
    /// A bit for each chunk that was read, so that each first read is told to the scheduler once.
    touched: Box<[AtomicU64]>,
}

impl ServedBlob {
    pub(crate) fn new(key: BlobKey, file: Arc<BlobFile>, index: Arc<ChunkIndex>, was_local: Box<[bool]>) -> Self {
        let words = index.len().div_ceil(u64::BITS);
        Self { key, file, index, was_local, touched: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Notes that a chunk was read; true the first time.
    fn touch(&self, chunk: u32) -> bool {
        let (word, bit) = (&self.touched[(chunk / u64::BITS) as usize], 1 << (chunk % u64::BITS));
        // Most reads are not the first: look before writing to a line that other threads read.
        word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// The chunks of a range of blocks.
    fn each_chunk(&self, blocks: Range<u32>, mut take: impl FnMut(u32)) {
        if !blocks.is_empty() {
            (self.index.find(offset_of(blocks.start))..=self.index.find(offset_of(blocks.end - 1))).for_each(&mut take);
        }
    }
}

/// The hot blob of the profile that the image is started with.
#[derive(Debug)]
pub(crate) struct ServedHot {
    /// Its file, in which a block's number is its rank, and its frames.
    blob: ServedBlob,
    map: HotMap,
    withdrawn: Arc<Withdrawn>,
    /// Frames that nobody has read from. When there are none left, reads need not look for them.
    untouched: AtomicU32,
}

impl ServedHot {
    pub(crate) fn new(blob: ServedBlob, map: HotMap, withdrawn: Arc<Withdrawn>) -> Self {
        let untouched = AtomicU32::new(blob.index.len());
        Self { blob, map, withdrawn, untouched }
    }

    /// The frame of a rank, and the rank after its last.
    fn frame(&self, rank: u32) -> (u32, u32) {
        let frame = self.blob.index.find(offset_of(rank));
        let end = self.blob.index.chunk(frame).raw.end / BLOCK_SIZE as u64;
        (frame, u32::try_from(end).unwrap_or(u32::MAX))
    }

    fn touch(&self, frame: u32) -> bool {
        let first = self.blob.touch(frame);
        if first {
            self.untouched.fetch_sub(1, Ordering::Relaxed);
        }
        first
    }
}

/// What an image does to be read from before it is asked.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PrefetchReport {
    /// What the engine says.
    pub engine: ImageReport,
    /// Frames of the hot blob that is used; none without one.
    pub hot_frames: u32,
    /// Those that could not be had as they should be.
    pub hot_frames_withdrawn: u32,
    /// Blocks of the hot blob that are in the store.
    pub hot_blocks_present: u32,
}

/// One attached image. Shared by the device's queue threads; detached when the last of them lets go.
#[derive(Debug)]
pub struct ServedImage {
    map: DeviceMap,
    /// The metadata image, then the blob files, then the hot file if there is one, then what is in memory.
    files: Vec<Arc<File>>,
    blobs: Vec<ServedBlob>,
    hot: Option<ServedHot>,
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
        let map = DeviceMap::new(file_blocks, &[])
            .map_err(|error| Error::caused(ErrorKind::Invalid, "lay out the device", error))?;
        Ok(Self::new(Arc::new(file), map, 0, Vec::new(), None, Arc::default(), None))
    }

    /// An image of a metadata image and the blobs of its device table, for which `map` was made. The first `layers` of them
    /// are those of layers, whose first reads are of interest.
    pub(crate) fn new(
        metadata: Arc<File>,
        map: DeviceMap,
        layers: usize,
        blobs: Vec<ServedBlob>,
        hot: Option<ServedHot>,
        counters: Arc<ImageCounters>,
        attachment: Option<Attachment>,
    ) -> Self {
        let of_blobs = blobs.iter().chain(hot.as_ref().map(|hot| &hot.blob)).map(|blob| Arc::clone(blob.file.file()));
        let memory = blobs.first().map(|blob| Arc::clone(blob.file.memory()));
        let files = std::iter::once(metadata).chain(of_blobs).chain(memory).collect();
        let blob_blocks = map.metadata_blocks()..map.end_of(layers);
        let first_reads = FirstReads::new(blob_blocks, counters.events.began());
        Self { map, files, blobs, hot, counters, first_reads, attachment }
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

    /// Where device blocks come from.
    pub(crate) fn segments(&self, start_block: u32, len_blocks: u32) -> impl Iterator<Item = Segment> + '_ {
        self.map.segments(start_block, len_blocks)
    }

    /// Length of the metadata image, with which the device begins.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        offset_of(self.map.metadata_blocks())
    }

    /// What happened since attaching began.
    pub(crate) fn events(&self) -> &StartEvents {
        &self.counters.events
    }

    /// What was read so far, and how that went.
    pub(crate) fn first_reads(&self) -> &FirstReads {
        &self.first_reads
    }

    /// Raw bytes per second at which one thread decodes this image's chunks at best; none while that is not known.
    pub(crate) fn decode_bytes_per_s(&self) -> Option<u64> {
        Some(self.counters.decode_bytes_per_s.load(Ordering::Relaxed)).filter(|rate| *rate > 0)
    }

    /// Fills `plan` for a range of device blocks, less than 4 GiB long. Blocks past the end of the device read as zeros.
    pub fn plan(&self, start_block: u32, len_blocks: u32, plan: &mut Plan) -> Readiness {
        plan.pieces.clear();
        plan.missing.clear();
        plan.evictions = self.evictions();
        let mut planned_blocks = 0;
        for segment in self.map.segments(start_block, len_blocks) {
            planned_blocks += segment.len_blocks;
            match segment.target {
                Target::Metadata { block } => plan.push_file(0, block, segment.len_blocks),
                Target::Blob { index, block } => self.look_up(index, block..block + segment.len_blocks, plan),
                Target::Zero => plan.pieces.push(Piece::Zero { len_bytes: segment.len_blocks * BLOCK_SIZE_BYTES }),
            }
        }
        if planned_blocks < len_blocks {
            plan.pieces.push(Piece::Zero { len_bytes: (len_blocks - planned_blocks) * BLOCK_SIZE_BYTES });
        }
        if plan.missing.is_empty() { Readiness::Ready } else { Readiness::Missing }
    }

    /// Plans a range of blocks of a layer blob, and notes what of it is read for the first time.
    fn look_up(&self, layer: u16, blocks: Range<u32>, plan: &mut Plan) {
        let blob = &self.blobs[usize::from(layer)];
        let mut at = blocks.start;
        while at < blocks.end {
            let (place, end) = blob.file.find(at..blocks.end);
            match place {
                Some(place) => {
                    self.touch(layer, at..end);
                    // The metadata image is the first file.
                    self.push_found(&blob.file, layer + 1, place, at..end, plan);
                }
                None => self.each_run(layer, at..end, |run, rank| match rank {
                    Some((hot, rank)) => self.look_up_hot(hot, layer, &run, rank, plan),
                    None => self.miss_chunks(blob, run, plan),
                }),
            }
            at = end;
        }
    }

    /// Plans blocks that a blob file has, in the file with this index or in memory.
    fn push_found(&self, blob: &BlobFile, file: u16, place: Place, blocks: Range<u32>, plan: &mut Plan) {
        blob.note_use(blocks.clone());
        match place {
            Place::Disk => plan.push_file(file, blocks.start, blocks.end - blocks.start),
            // The last file is the one in memory.
            Place::Memory(block) => {
                plan.push_file(self.last_file(), block, blocks.end - blocks.start);
            }
        }
    }

    /// Plans blocks of a layer blob that lie side by side in the hot file, from `rank` on.
    fn look_up_hot(&self, hot: &ServedHot, layer: u16, blocks: &Range<u32>, rank: u32, plan: &mut Plan) {
        let blob = &self.blobs[usize::from(layer)];
        let mut at = blocks.start;
        while at < blocks.end {
            let rank = rank + (at - blocks.start);
            let (frame, frame_end) = hot.frame(rank);
            let len_blocks = (frame_end - rank).min(blocks.end - at);
            let key = ChunkKey { blob: hot.blob.key, chunk: frame };
            if let (Some(place), end) = hot.blob.file.find(rank..rank + len_blocks)
                && end == rank + len_blocks
            {
                if !self.is_given(layer, &(at..at + len_blocks)) {
                    self.touch_frame(hot, frame);
                }
                self.push_found(&hot.blob.file, self.hot_file(), place, rank..end, plan);
            } else if hot.withdrawn.contains(frame) {
                self.miss_chunks(blob, at..at + len_blocks, plan);
            } else if self.attachment.as_ref().is_some_and(Attachment::trusts_plan) {
                hot.touch(frame);
                plan.push_missing(key);
            } else {
                self.touch_frame(hot, frame);
                self.miss_chunks(blob, at..at + len_blocks, plan);
            }
            at += len_blocks;
        }
    }

    /// Cuts blocks of a layer blob into those that lie side by side in the hot file, with the rank of the first, and those
    /// that do not lie there.
    fn each_run<'a>(
        &'a self,
        layer: u16,
        blocks: Range<u32>,
        mut take: impl FnMut(Range<u32>, Option<(&'a ServedHot, u32)>),
    ) {
        let mut at = blocks.start;
        while at < blocks.end {
            let hot = self.hot.as_ref();
            let found = hot.map(|hot| (hot, hot.map.find(usize::from(layer), at..blocks.end)));
            let (rank, end) = match found {
                Some((hot, (rank, end))) => (rank.map(|rank| (hot, rank)), end),
                None => (None, blocks.end),
            };
            take(at..end, rank);
            at = end;
        }
    }

    /// Adds the chunks of blocks that are not there.
    fn miss_chunks(&self, blob: &ServedBlob, blocks: Range<u32>, plan: &mut Plan) {
        blob.each_chunk(blocks, |chunk| {
            blob.touch(chunk);
            plan.push_missing(ChunkKey { blob: blob.key, chunk });
        });
    }

    /// Notes blocks that the layer has as read: the frames that foretold them, for others the chunks.
    fn touch(&self, layer: u16, blocks: Range<u32>) {
        let blob = &self.blobs[usize::from(layer)];
        if self.is_given(layer, &blocks) {
            return;
        }
        if self.hot.as_ref().is_none_or(|hot| hot.untouched.load(Ordering::Relaxed) == 0) {
            return self.touch_chunks(blob, blocks);
        }
        self.each_run(layer, blocks, |run, foretold| match foretold {
            None => self.touch_chunks(blob, run),
            Some((hot, mut rank)) => {
                let end = rank + (run.end - run.start);
                while rank < end {
                    let (frame, frame_end) = hot.frame(rank);
                    self.touch_frame(hot, frame);
                    rank = frame_end;
                }
            }
        });
    }

    fn touch_chunks(&self, blob: &ServedBlob, blocks: Range<u32>) {
        blob.each_chunk(blocks, |chunk| {
            if blob.touch(chunk) {
                self.tell_touch(ChunkKey { blob: blob.key, chunk });
            }
        });
    }

    fn touch_frame(&self, hot: &ServedHot, frame: u32) {
        if hot.touch(frame) {
            self.tell_touch(ChunkKey { blob: hot.blob.key, chunk: frame });
        }
    }

    fn tell_touch(&self, chunk: ChunkKey) {
        if let Some(attachment) = &self.attachment {
            attachment.engine.touch(attachment.image, chunk);
        }
    }

    /// Index of the hot file: after those of the layers.
    fn hot_file(&self) -> u16 {
        u16::try_from(self.blobs.len() + 1).unwrap_or(u16::MAX)
    }

    fn last_file(&self) -> u16 {
        u16::try_from(self.files.len() - 1).unwrap_or(u16::MAX)
    }

    /// Whether all that `plan` says was there until now: to be asked when its pieces have been read. If not, what was read
    /// may be holes, and the range must be planned again.
    #[must_use]
    pub fn was_there(&self, plan: &Plan) -> bool {
        plan.evictions == self.evictions()
    }

    /// For a queue thread that reads what [`Self::plan`] says without asking [`Self::was_there`] afterwards; none for an
    /// image of which nothing is ever evicted. `kick` wakes the thread up.
    pub(crate) fn reader(&self, kick: impl Fn() + Send + Sync + 'static) -> Option<Reader> {
        self.blobs.first().map(|blob| blob.file.evictions().reader(kick))
    }

    fn evictions(&self) -> u64 {
        self.blobs.first().map_or(0, |blob| blob.file.evictions().count())
    }

    /// A file of a plan could not be read. True if what it has can be had again: plan the range again.
    #[must_use]
    pub fn cannot_read(&self, file: u16, offset_bytes: u64, len_bytes: u32) -> bool {
        let hot = self.hot.as_ref().map(|hot| &hot.blob);
        let Some(blob) = usize::from(file).checked_sub(1).and_then(|at| self.blobs.iter().chain(hot).nth(at)) else {
            return false;
        };
        let block = |offset_bytes: u64| u32::try_from(offset_bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
        blob.file.cannot_read(block(offset_bytes)..block(offset_bytes + u64::from(len_bytes)));
        true
    }

    /// Asks for what `plan` (of [`Readiness::Missing`]) misses. Never blocks. `waiter` runs exactly once, perhaps before
    /// this returns, and with EIO at the latest when the engine stops.
    pub fn demand(&self, plan: &Plan, waited: Arc<Waited>, waiter: Waiter) {
        let Some(Attachment { engine, image, .. }) = &self.attachment else { return waiter(Ok(())) };
        engine.demand(*image, plan.missing.clone(), Arc::clone(&self.counters), waited, waiter);
    }

    /// To be called by the device once for each request: with the length when it is answered with data, else with the
    /// positive errno.
    pub fn answered(&self, read: &DeviceRead, outcome: Result<u32, i32>) {
        if let Some(end) = self.first_reads.answered(read, outcome.is_ok()) {
            self.counters.events.read(end.outcome, end.at, end.blocks, end.stall);
        }
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
        let (first_reads, latencies) = (self.first_reads.statistics(), self.first_reads.latencies());
        ImageStatistics { first_reads, latencies, ..self.counters.statistics() }
    }

    /// What waits for the registry now.
    #[must_use]
    pub fn waiting(&self) -> Option<Waiting> {
        self.counters.outage.waiting()
    }

    /// What is done so that reads do not wait.
    #[must_use]
    pub fn prefetch(&self) -> PrefetchReport {
        let engine = self.attachment.as_ref().map(|Attachment { engine, image, .. }| engine.report(*image));
        let mut report = PrefetchReport { engine: engine.unwrap_or_default(), ..PrefetchReport::default() };
        if let Some(hot) = &self.hot {
            report.hot_frames = hot.blob.index.len();
            report.hot_frames_withdrawn = hot.withdrawn.count();
            report.hot_blocks_present = hot.blob.file.present_blocks();
        }
        report
    }

    /// Whether to fetch what nobody asked for, from now on.
    pub fn set_fill(&self, mode: FillMode) {
        if let Some(Attachment { engine, image, .. }) = &self.attachment {
            engine.set_fill(*image, mode);
        }
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
