//! The vocabulary: keys, events and actions.

use std::ops::Range;
use std::time::Duration;

/// A registry host: what shares one path and so one estimate and one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkKey(pub u32);

/// An attached image. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageKey(pub u32);

/// A layer blob or a hot blob while it is registered with the scheduler. Never used twice, so that a late completion of
/// a removed blob cannot be taken for one of its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobKey(pub u32);

/// One chunk of one blob; of a hot blob, one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// The blob.
    pub blob: BlobKey,
    /// Index of the chunk in the blob.
    pub chunk: u32,
}

/// One waiting device request. Unique for the lifetime of the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// One [`Action::Fetch`]: one ranged request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchKey(pub u64);

/// Monotonic time since the start of the process.
pub type Now = Duration;

/// Why a chunk is fetched. The order is the priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A device request waits for it.
    Demand,
    /// A recorded start came to it next.
    Trace,
    /// A sequential reader is expected to come to it.
    ReadAhead,
    /// The rest of the image.
    Fill,
}

/// What a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlobKind {
    /// A layer: neighbouring chunks are neighbours in a file or in a directory.
    Layer,
    /// Frames in the order of a recorded start: the plan says what comes next, so no reader is looked for here.
    Hot,
}

/// How the rest of an image is fetched.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FillMode {
    /// Not at all.
    #[default]
    Off,
    /// At a share of the link that nobody else uses.
    Idle,
    /// As fast as the link allows.
    Full,
}

/// What the scheduler must know of a chunk when its blob is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Where its bytes begin in the stored blob. A chunk that begins where the one before it ends can be fetched with it
    /// in one range.
    pub stored_offset_bytes: u64,
    /// Bytes on the wire.
    pub stored_len_bytes: u32,
    /// Already in the store.
    pub present: bool,
}

/// One step of a recorded start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanEntry {
    /// What is read.
    pub chunk: ChunkKey,
    /// When, counted from the start of the recorded command.
    pub due: Duration,
    /// Share of the merged recordings that read it; 255 is all of them.
    pub confidence: u8,
}

/// Something that happened.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// An image is being attached. Its key must be new.
    AddImage {
        /// The new key.
        image: ImageKey,
        /// Where most of it comes from.
        link: LinkKey,
    },
    /// The image is gone, and with it its plan and its fill. Blobs that only it had are removed by events of their own.
    RemoveImage {
        /// The key, never to be used again.
        image: ImageKey,
    },
    /// A blob can be fetched from now on. Its key must be new.
    AddBlob {
        /// The new key.
        blob: BlobKey,
        /// Where it is fetched from.
        link: LinkKey,
        /// What it is.
        kind: BlobKind,
        /// Its chunks, in the order of the blob.
        chunks: &'a [ChunkEntry],
    },
    /// The blob is gone: whoever waits for it is woken with an error.
    RemoveBlob {
        /// The key, never to be used again.
        blob: BlobKey,
    },
    /// What is expected to be read, in this order. Takes the place of the plan before it.
    SetPlan {
        /// Whose start.
        image: ImageKey,
        /// The steps. Those of unknown chunks, and the second of a chunk, are ignored.
        entries: &'a [PlanEntry],
        /// Bytes that may be fetched on the word of this plan.
        byte_cap: u64,
    },
    /// Fetch what nobody asked for.
    SetFill {
        /// The image.
        image: ImageKey,
        /// How.
        mode: FillMode,
        /// Its layer blobs, in the order in which they are to be filled.
        blobs: &'a [BlobKey],
    },
    /// The device request `ticket` waits for all of `chunks`.
    Demand {
        /// Whose device.
        image: ImageKey,
        /// Names the request in [`Action::Wake`]. Must be new.
        ticket: Ticket,
        /// What it misses.
        chunks: &'a [ChunkKey],
    },
    /// First read of a chunk that was already there. For a frame of a hot blob that is not: a block that it holds is read
    /// from a layer instead, see [`crate::Scheduler::trusts_plan`]; the read of the layer's chunk is told next.
    Touch {
        /// Whose device.
        image: ImageKey,
        /// The chunk.
        chunk: ChunkKey,
    },
    /// Blocks of a chunk of the plan are pushed into the page cache: no read of it may come, and that it does not says
    /// nothing against the plan.
    Pushed {
        /// Whose device.
        image: ImageKey,
        /// The chunk.
        chunk: ChunkKey,
    },
    /// The first byte of the answer to a fetch has come.
    FirstByte {
        /// The fetch.
        fetch: FetchKey,
    },
    /// All stored bytes of a chunk are on this host: it has left the link. [`Event::Fetched`] and [`Event::Withdrawn`]
    /// without it stand for both.
    Arrived {
        /// The chunk.
        chunk: ChunkKey,
    },
    /// A chunk that was to be fetched is on this host already, under the same name in another blob: nothing of it comes over
    /// the link, and it counts for nobody's bytes. It stays under way until one of the next three events.
    Local {
        /// The chunk.
        chunk: ChunkKey,
    },
    /// A fetch of a chunk ended well: the chunk is in the store.
    Fetched {
        /// The chunk.
        chunk: ChunkKey,
    },
    /// A fetch of a chunk ended badly. A later demand fetches the chunk again.
    Failed {
        /// The chunk.
        chunk: ChunkKey,
        /// What the waiting requests are answered with.
        errno: i32,
    },
    /// A hot frame is not what its table promises, or cannot be had. It is never asked for again; who waits for it is
    /// woken with `Ok` and plans again, without it.
    Withdrawn {
        /// The chunk. It need not be in flight.
        chunk: ChunkKey,
    },
    /// A chunk that was present is no longer in the store.
    Lost {
        /// The chunk.
        chunk: ChunkKey,
    },
    /// Time has passed: see [`Action::WakeAt`].
    Tick,
}

/// Something to do, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Fetch these chunks, whose stored bytes lie one after another, with one request. Each chunk is answered by
    /// [`Event::Arrived`] and then by exactly one of [`Event::Fetched`], [`Event::Failed`] and [`Event::Withdrawn`].
    Fetch {
        /// Names the request.
        fetch: FetchKey,
        /// The blob.
        blob: BlobKey,
        /// Indexes of the chunks: never empty, and one chunk only if it is a demand.
        chunks: Range<u32>,
        /// Why.
        class: Class,
        /// When it was first demanded, or chosen. Deadlines count from here, not from the moment at which there was a
        /// place for it in flight.
        since: Now,
    },
    /// Answer the device request: all its chunks are there, or an errno.
    Wake {
        /// The request.
        ticket: Ticket,
        /// `Err` holds a positive errno.
        outcome: Result<(), i32>,
    },
    /// Send [`Event::Tick`] at this time. Takes the place of the one before it.
    WakeAt {
        /// When.
        at: Now,
    },
}

/// What is believed of a link. It is worth keeping for the next start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Most that it delivers.
    pub bandwidth_bytes_per_second: u64,
    /// Least time from a request to the first byte of its answer.
    pub round_trip: Duration,
}

/// What has been decided for one image.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ImageCounters {
    /// Device requests that waited.
    pub demands: u64,
    /// Chunks demanded that nobody had asked for.
    pub misses: u64,
    /// Chunks demanded while a prefetch was fetching them.
    pub late_hits: u64,
    /// Chunks demanded while another demand was fetching them.
    pub joined: u64,
    /// Requests issued for demands.
    pub demand_requests: u64,
    /// Bytes of those.
    pub demand_bytes: u64,
    /// Requests issued by plan, by read-ahead and by fill.
    pub prefetch_requests: u64,
    /// Bytes of those.
    pub prefetch_bytes: u64,
    /// Bytes issued by the plan: never above its cap.
    pub plan_bytes: u64,
    /// Bytes prefetched, by plan or read-ahead, for which a read has come since.
    pub used_bytes: u64,
}

impl ImageCounters {
    pub(crate) fn issued(&mut self, class: Class, bytes: u64) {
        let (requests, sum) = self.of(class);
        *requests += 1;
        *sum += bytes;
    }

    /// Bytes that were issued needed no fetch; `was_all` of their request.
    pub(crate) fn took_back(&mut self, class: Class, bytes: u64, was_all: bool) {
        let (requests, sum) = self.of(class);
        *requests -= u64::from(was_all);
        *sum -= bytes;
    }

    /// The counts of requests and bytes of a class.
    fn of(&mut self, class: Class) -> (&mut u64, &mut u64) {
        match class {
            Class::Demand => (&mut self.demand_requests, &mut self.demand_bytes),
            Class::Trace | Class::ReadAhead | Class::Fill => (&mut self.prefetch_requests, &mut self.prefetch_bytes),
        }
    }
}

/// How far a start has followed its plan.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PlanProgress {
    /// Steps up to the last one that was read.
    pub position: u32,
    /// All steps.
    pub steps: u32,
    /// The reads were others: it is followed no more.
    pub is_dropped: bool,
}

/// How far the fill of an image is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct FillProgress {
    /// Bytes of its layer blobs that are in the store, as stored in the registry.
    pub present_bytes: u64,
    /// All bytes of them.
    pub total_bytes: u64,
    /// Nothing is left to ask for; with `present_bytes` short of the total, some could not be had.
    pub finished: bool,
}
