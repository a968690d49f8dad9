//! The figures of a start: how it went, what it took, and how far it was from the best that its link allows.
//!
//! The lower bound T* is computed from the trace of this very start if it was recorded, else from the trace that was
//! followed: the reads in order with the thinking between them, the chunks and frames that hold them, and the estimate of
//! the link. Its zero is the moment at which attaching began, as for the time to ready beside it; nothing can be fetched
//! before what names it is here, so that time is in the bound. Decoding is in it at the best speed that was seen, since its
//! threads work beside the program; the processor time of both is not added up, for the thinking was measured on the very
//! processors that decoded meanwhile. What was in the store before costs nothing.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ublkimg_image::Sha256;
use ublkimg_image::trace::Trace;
use ublkimg_scheduler::Estimate;
use ublkimg_scheduler::bound::{Bound, BoundDecode, BoundLink, Start, Unit, UnitRead, lower_bound};

use crate::daemon::protocol::FillMode;
use crate::decode::thread_count;
use crate::first_reads::FirstReadStatistics;
use crate::image::{ServedImage, UnitKey};

/// The unit of a read for which nothing has to be fetched.
const NOTHING: u32 = u32::MAX;

/// What `status` says about the start of a device. Times are in microseconds since attaching began.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartFigures {
    /// When the program was ready, if it said so.
    pub ready_us: Option<u64>,
    /// Requests that read a block for the first time; with their stall, summed over requests.
    pub first_reads: FirstReadStatistics,
    /// Requests to the registry for reads that waited.
    pub demand_requests: u64,
    /// Bytes of those.
    pub demand_bytes: u64,
    /// Requests to the registry for what nobody waited for.
    pub prefetch_requests: u64,
    /// Bytes of those.
    pub prefetch_bytes: u64,
    /// Prefetched bytes that nobody has read so far.
    pub waste_bytes: u64,
    /// Chunks of all devices that were fetched a second time.
    pub duplicates: u64,
    /// The profile that is followed.
    pub profile: Option<ProfileFigures>,
    /// The device's read-ahead window now.
    pub read_ahead_kb: u32,
    /// What is fetched though nobody asked for it.
    pub fill: FillFigures,
    /// The recording.
    pub recording: RecordingFigures,
    /// The lower bound; none without a trace or without an estimate of the link.
    pub bound: Option<BoundFigures>,
}

/// The profile that a start follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileFigures {
    /// Where it comes from, as a user would say it.
    pub source: String,
    /// Blocks in its trace.
    pub blocks: u64,
    /// Whether a hot blob is used.
    pub has_hot_blob: bool,
    /// Whether the start has passed its end.
    pub is_used_up: bool,
}

/// How far a fill is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FillFigures {
    /// How hard.
    pub mode: FillMode,
    /// Bytes of the layers in the store.
    pub present_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
    /// Nothing is left to ask for; with `present_bytes` short of the total, some could not be had.
    pub is_finished: bool,
}

/// What becomes of the first reads.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordingFigures {
    /// Whether they are recorded now.
    pub is_running: bool,
    /// Entries so far, or of the last recording.
    pub entries: u64,
    /// The trace of the last recording on this host.
    pub trace: Option<PathBuf>,
}

/// The lower bound on the time to ready, for the measured link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BoundFigures {
    /// T*: no order of fetching is ready before.
    pub bound_us: u64,
    /// Time to ready divided by T*; none before the program was ready.
    pub ratio: Option<f64>,
    /// The same start with everything local.
    pub warm_us: u64,
    /// Bytes that had to be fetched for it, as stored.
    pub bytes: u64,
    /// Chunks and frames that had to be fetched for it.
    pub units: u32,
    /// Estimate of the link.
    pub bandwidth_bytes_per_s: u64,
    /// Estimate of the link.
    pub round_trip_us: u64,
}

/// When a start was ready.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadyAt {
    /// Since attaching began.
    pub(crate) elapsed_us: u64,
    /// The same without what it waited for the network.
    pub(crate) clock_us: u64,
}

/// The bound for a start that reads what `trace` says.
pub(crate) fn bound(
    image: &ServedImage,
    layers: &[Sha256],
    trace: &Trace,
    ready: Option<ReadyAt>,
    link: Estimate,
) -> Option<BoundFigures> {
    let first_at_us = image.first_reads().first_at_us()?;
    let (units, reads) = units_read(image, layers, trace, first_at_us);
    let last_at_us = first_at_us.saturating_add(trace.span_us());
    let tail_us = match (ready, trace.header.ready_us) {
        (Some(ready), _) => ready.clock_us.saturating_sub(last_at_us),
        (None, Some(ready_us)) => ready_us.saturating_sub(trace.span_us()),
        (None, None) => 0,
    };
    let bound = lower_bound(&Start {
        units: &units,
        reads: &reads,
        tail: Duration::from_micros(tail_us),
        link: BoundLink {
            bandwidth_bytes_per_s: as_float(link.bandwidth_bytes_per_second),
            first_byte: Duration::from_micros(image.events().fetching_since_us()) + link.round_trip,
            slow_start: None,
        },
        lead: Duration::ZERO,
        decode: image.decode_bytes_per_s().map(|bytes_per_s| BoundDecode {
            workers: u32::try_from(thread_count()).unwrap_or(1),
            bytes_per_s: as_float(bytes_per_s),
        }),
        processors: None,
    });
    Some(figures(&bound, ready, link))
}

fn figures(bound: &Bound, ready: Option<ReadyAt>, link: Estimate) -> BoundFigures {
    let bound_us = micros(bound.ready);
    let ratio = |ready: ReadyAt| as_float(ready.elapsed_us) / as_float(bound_us.max(1));
    BoundFigures {
        bound_us,
        ratio: ready.map(ratio),
        warm_us: micros(bound.warm),
        bytes: bound.bytes,
        units: bound.units,
        bandwidth_bytes_per_s: link.bandwidth_bytes_per_second,
        round_trip_us: micros(link.round_trip),
    }
}

/// The reads of a trace as reads of chunks and frames. What this image does not have is left out.
fn units_read(image: &ServedImage, layers: &[Sha256], trace: &Trace, first_at_us: u64) -> (Vec<Unit>, Vec<UnitRead>) {
    let place =
        |blob: &Sha256| layers.iter().position(|layer| layer == blob).and_then(|place| u16::try_from(place).ok());
    let places: Vec<Option<u16>> = trace.header.blobs.iter().map(place).collect();
    let mut known: HashMap<UnitKey, u32> = HashMap::new();
    let (mut units, mut reads) = (Vec::new(), Vec::new());
    let mut think_us = first_at_us;
    for entry in &trace.entries {
        think_us = think_us.saturating_add(entry.since_previous_us);
        let Some(Some(layer)) = places.get(usize::from(entry.blob)).copied() else { continue };
        image.units(layer, entry.block..entry.block.saturating_add(u32::from(entry.blocks)), |needed| {
            let number = needed.map_or(NOTHING, |(key, unit)| {
                let next = u32::try_from(units.len()).unwrap_or(NOTHING);
                *known.entry(key).or_insert_with(|| {
                    units.push(unit);
                    next
                })
            });
            reads.push(UnitRead { unit: number, think: Duration::from_micros(std::mem::take(&mut think_us)) });
        });
    }
    (units, reads)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Exact up to 2^53.
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn as_float(number: u64) -> f64 {
    number as f64
}
