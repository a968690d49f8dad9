//! T*(packed): when the start could have been ready at the earliest, with the hot blob over this link.
//!
//! The clock starts where that of the measured start does: when `ublkimg add` is executed. Before the first byte of the
//! hot blob there are round trips that nobody can save: the connection, the index, the manifest with the profile beside
//! it, and then the blob itself, which the metadata travels beside. The program cannot run before the metadata is there.
//! Its think times are those of a start whose store is full.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ublkimg_image::trace::{Ranks, Trace};
use ublkimg_image::{HotTable, Sha256};
use ublkimg_scheduler::bound::{Bound, BoundDecode, BoundLink, BoundProcessors, Start, Unit, UnitRead, lower_bound};

/// Round trips by tag until the first byte of hot blob and metadata: connect, index, manifest, these.
const ROUND_TRIPS: u32 = 4;

/// Raw bytes of a block.
const BLOCK_BYTES: u64 = 4096;

/// A start with a full store: where think times come from.
#[derive(Debug, Clone)]
pub(crate) struct LocalStart {
    /// What it read.
    pub(crate) trace: Trace,
    /// From the execution of `ublkimg add` to ready.
    pub(crate) ready: Duration,
    /// Processor time that the machine spent meanwhile; `None` where others use it too.
    pub(crate) busy: Option<Duration>,
    /// Of that, the registry's.
    pub(crate) registry: Duration,
}

/// The profile whose hot blob is fetched.
pub(crate) struct HotBlob<'a> {
    /// The order of its blocks.
    pub(crate) trace: &'a Trace,
    /// Its frames.
    pub(crate) table: &'a HotTable,
    /// Its bytes.
    pub(crate) blob: &'a [u8],
    /// Stored bytes of the metadata image.
    pub(crate) metadata_bytes: u64,
}

/// T*, and what of the local start's reads the hot blob does not hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) bound: Bound,
    pub(crate) unpacked_blocks: u64,
    /// The part of T* that is processor time, where it is known.
    pub(crate) processors: Option<Duration>,
}

/// T* of `local` with `packed` over a link of `rate_mbit` and round trips of `rtt`.
pub(crate) fn packed(
    local: &LocalStart,
    packed: &HotBlob<'_>,
    rate_mbit: u64,
    rtt: Duration,
    decode_bytes_per_s: f64,
) -> Result<Limit> {
    let layout = packed.table.layout();
    let ranks = packed.trace.ranks();
    let mut units: Vec<Unit> = packed
        .table
        .frames
        .iter()
        .map(|frame| Unit {
            stored_len_bytes: u64::from(frame.stored_len_bytes),
            raw_len_bytes: u64::from(frame.blocks) * BLOCK_BYTES,
        })
        .collect();
    let metadata = u32::try_from(units.len())?;
    // Decoding it is part of the local attach already.
    units.push(Unit { stored_len_bytes: packed.metadata_bytes, raw_len_bytes: 0 });
    let mut reads = vec![UnitRead { unit: metadata, think: Duration::ZERO }];
    let header = &local.trace.header;
    let ready_us = header.ready_us.context("the recording of the local start does not say when it was ready")?;
    // The recording's clock starts within `add`.
    let mut think = local.ready.saturating_sub(Duration::from_micros(ready_us));
    let mut unpacked_blocks = 0;
    let mut read_us = 0;
    for entry in &local.trace.entries {
        if read_us + entry.since_previous_us > ready_us {
            // Between ready and the end of the recording.
            break;
        }
        read_us += entry.since_previous_us;
        think += Duration::from_micros(entry.since_previous_us);
        let blob = header.blobs.get(usize::from(entry.blob)).context("an entry of no blob")?;
        for block in entry.block..entry.block + u32::from(entry.blocks) {
            match rank_of(packed.trace, &ranks, blob, block).and_then(|rank| layout.frame_of(rank)) {
                Some(frame) => reads.push(UnitRead { unit: frame, think: std::mem::take(&mut think) }),
                None => unpacked_blocks += 1,
            }
        }
    }
    let tail = think + Duration::from_micros(ready_us.saturating_sub(read_us));
    let count = processors()?;
    let bandwidth_bytes_per_s = f64::from(u32::try_from(rate_mbit)?) * 125_000.0;
    let bound = lower_bound(&Start {
        units: &units,
        reads: &reads,
        tail,
        link: BoundLink { bandwidth_bytes_per_s, first_byte: rtt * ROUND_TRIPS, slow_start: None },
        lead: Duration::ZERO,
        decode: Some(BoundDecode { workers: count, bytes_per_s: decode_bytes_per_s }),
        // Serving from the store is part of what the local start spent.
        processors: local.busy.map(|program| BoundProcessors { count, program, serving: Duration::ZERO }),
    });
    let decode = Duration::from_secs_f64(f64::from(packed.table.blocks()) * 4096.0 / decode_bytes_per_s);
    let processors = local.busy.map(|busy| (busy + decode) / count);
    Ok(Limit { bound, unpacked_blocks, processors })
}

/// Rank in the profile of a block that another trace names.
fn rank_of(profile: &Trace, ranks: &Ranks, blob: &Sha256, block: u32) -> Option<u32> {
    let index = profile.header.blobs.iter().position(|named| named == blob)?;
    ranks.of(u16::try_from(index).ok()?, block)
}

pub(crate) fn processors() -> Result<u32> {
    Ok(u32::try_from(std::thread::available_parallelism()?.get())?)
}

/// Raw bytes per second of one processor that checks and decodes the hot blob's frames and copies them into a new file in
/// `dir`, in this kernel.
pub(crate) fn decode_rate(packed: &HotBlob<'_>, dir: &Path) -> Result<f64> {
    let layout = packed.table.layout();
    let path = dir.join("decoded");
    let mut file = File::create(&path)?;
    let began = Instant::now();
    let mut raw_bytes = 0;
    for (number, frame) in (0..).zip(&packed.table.frames) {
        let range = layout.stored(number);
        let stored = packed.blob.get(usize::try_from(range.start)?..usize::try_from(range.end)?);
        let stored = stored.context("the hot blob is shorter than its table says")?;
        ensure!(Sha256::of(stored) == frame.digest, "frame {number} is not what its table says");
        let capacity = usize::from(frame.blocks) * usize::try_from(BLOCK_BYTES)?;
        let raw = zstd::bulk::decompress(stored, capacity)?;
        file.write_all(&raw)?;
        raw_bytes += raw.len();
    }
    let rate = f64::from(u32::try_from(raw_bytes)?) / began.elapsed().as_secs_f64();
    std::fs::remove_file(&path)?;
    Ok(rate)
}
