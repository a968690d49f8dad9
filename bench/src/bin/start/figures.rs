//! What starts cost, as a table and as JSON.

use std::fmt;

use serde::Serialize;
use serde_json::Value;
use ublkimg_bench::median;

use crate::trouble::Met;

/// One start.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    /// From the execution of `ublkimg add`, or the first request of the pull, to ready.
    pub(crate) ready_seconds: f64,
    /// Of that: until the image is mounted, or unpacked.
    pub(crate) attach_seconds: f64,
    /// Bodies that the registry sent.
    pub(crate) bytes: u64,
    /// Requests that the registry answered.
    pub(crate) requests: u64,
    /// At the host: from the first request for bytes of layers or the hot blob until the last byte of any answer.
    pub(crate) fetch_seconds: f64,
    /// Bytes of blobs that the registry sent more than once: also what was under way on a connection that broke.
    pub(crate) duplicate_bytes: u64,
    /// Processor time that the machine spent meanwhile.
    pub(crate) busy_seconds: f64,
    /// Of that: this process, which is the registry and the link.
    pub(crate) registry_seconds: f64,
    /// Of that: the daemon's threads that verify, decode and store.
    pub(crate) decode_seconds: f64,
    /// First reads at the device; none after a pull.
    pub(crate) reads: Option<FirstReads>,
    /// Chunks and frames that were fetched a second time, by the daemon's own count.
    pub(crate) duplicates: Option<u64>,
    /// What trouble was met.
    pub(crate) trouble: Option<Met>,
    /// All that `status --json` said.
    pub(crate) status: Option<Value>,
}

/// Device requests that read a block for the first time.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct FirstReads {
    pub(crate) hits: u64,
    pub(crate) late_hits: u64,
    pub(crate) misses: u64,
    pub(crate) stall_us: u64,
    pub(crate) blocks: u64,
}

impl FirstReads {
    /// Of a device's status.
    pub(crate) fn of(status: &Value) -> Self {
        let figures = &status["start"]["first_reads"];
        let count = |name: &str| figures[name].as_u64().unwrap_or(0);
        Self {
            hits: count("hits"),
            late_hits: count("late_hits"),
            misses: count("misses"),
            stall_us: count("stall_us"),
            blocks: count("blocks"),
        }
    }
}

/// A row of the table: one arm of one workload.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) workload: String,
    pub(crate) arm: String,
    pub(crate) link: String,
    pub(crate) transport: String,
    pub(crate) samples: Vec<Sample>,
    /// Where the hot blob is used, and where everything is local: of each round, or of all.
    pub(crate) packed: Vec<Packed>,
}

/// What a start with the hot blob is measured against.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Packed {
    /// T*(packed).
    pub(crate) bound_seconds: f64,
    /// T_w: think times of the start whose store is full.
    pub(crate) warm_seconds: f64,
    /// Processor time of that start and of decoding and storing the hot blob, over the number of processors, where it is
    /// known: a part of T*.
    pub(crate) processor_seconds: Option<f64>,
    /// What the registry took of that.
    pub(crate) registry_seconds: f64,
    /// Processors.
    pub(crate) processors: u32,
    /// Raw bytes per second of one processor that checks, decodes and stores frames.
    pub(crate) decode_bytes_per_s: f64,
    /// Stored bytes of the hot blob.
    pub(crate) hot_bytes: u64,
    /// Bytes that an attach without a profile fetches.
    pub(crate) attach_bytes: u64,
    /// Blocks that the local start read and the hot blob does not hold.
    pub(crate) unpacked_blocks: u64,
}

impl Row {
    pub(crate) fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        let values: Vec<f64> = self.samples.iter().map(of).collect();
        if values.is_empty() { f64::NAN } else { median(&values) }
    }

    /// The median of the times to ready.
    pub(crate) fn ready_seconds(&self) -> f64 {
        self.median(|sample| sample.ready_seconds)
    }

    /// Medians of T* and of ready / T*, each round with the T* of its own local start.
    fn bound(&self) -> Option<(f64, f64)> {
        self.bound_of(|packed, _sample| packed.bound_seconds)
    }

    /// The same where the machine is also the registry: what that took more than in the local start counts as work of its
    /// processors.
    fn bound_with_registry(&self) -> Option<(f64, f64)> {
        self.bound_of(|packed, sample| {
            let more = (sample.registry_seconds - packed.registry_seconds).max(0.0) / f64::from(packed.processors);
            packed.processor_seconds.map_or(packed.bound_seconds, |seconds| packed.bound_seconds.max(seconds + more))
        })
    }

    fn bound_of(&self, of: impl Fn(&Packed, &Sample) -> f64) -> Option<(f64, f64)> {
        let last = self.packed.last()?;
        let bounds = (0..).zip(&self.samples).map(|(round, sample)| of(self.packed.get(round).unwrap_or(last), sample));
        let bounds: Vec<f64> = bounds.collect();
        let ratios = self.samples.iter().zip(&bounds).map(|(sample, bound)| sample.ready_seconds / bound);
        let ratios: Vec<f64> = ratios.collect();
        (!bounds.is_empty()).then(|| (median(&bounds), median(&ratios)))
    }

    /// The median of a count.
    fn count(&self, of: impl Fn(&Sample) -> u64) -> u64 {
        let mut values: Vec<u64> = self.samples.iter().map(of).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    }
}

/// The rows, aligned.
pub(crate) struct Table<'a>(pub(crate) &'a [Row]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<12} {:<21} {:>8} {:>15} {:>8} {:>7} {:>7} {:>8} {:>9} {:>8} {:>7} {:>6} {:>6} {:>9} {:>7} {:>6}",
            "workload",
            "arm",
            "ready s",
            "min..max",
            "attach s",
            "fetch s",
            "busy s",
            "registry",
            "MB",
            "requests",
            "hit",
            "late",
            "miss",
            "twice B",
            "T* s",
            "ratio"
        )?;
        for row in self.0 {
            let ready = row.ready_seconds();
            let extreme =
                |pick: fn(f64, f64) -> f64| row.samples.iter().map(|sample| sample.ready_seconds).reduce(pick);
            let range =
                format!("{:.2}..{:.2}", extreme(f64::min).unwrap_or(f64::NAN), extreme(f64::max).unwrap_or(f64::NAN));
            let reads = |of: fn(&FirstReads) -> u64| {
                let is_there = row.samples.iter().any(|sample| sample.reads.is_some());
                let count = row.count(|sample| sample.reads.as_ref().map_or(0, of));
                if is_there { count.to_string() } else { "-".to_owned() }
            };
            let (bound, ratio) = match row.bound() {
                Some((bound, ratio)) => (format!("{bound:.2}"), format!("{ratio:.2}")),
                None => ("-".to_owned(), "-".to_owned()),
            };
            writeln!(
                f,
                "{:<12} {:<21} {:>8.2} {:>15} {:>8.2} {:>7.2} {:>7.2} {:>8.2} {:>9.2} {:>8} {:>7} {:>6} {:>6} {:>9} {:>7} {:>6}",
                row.workload,
                row.arm,
                ready,
                range,
                row.median(|sample| sample.attach_seconds),
                row.median(|sample| sample.fetch_seconds),
                row.median(|sample| sample.busy_seconds),
                row.median(|sample| sample.registry_seconds),
                megabytes(row.count(|sample| sample.bytes)),
                row.count(|sample| sample.requests),
                reads(|reads| reads.hits),
                reads(|reads| reads.late_hits),
                reads(|reads| reads.misses),
                row.count(|sample| sample.duplicate_bytes),
                bound,
                ratio,
            )?;
        }
        Ok(())
    }
}

/// What is asked of starts with the hot blob, a line each.
pub(crate) struct Claims<'a>(pub(crate) &'a [Row]);

impl fmt::Display for Claims<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in self.0 {
            let (Some(packed), Some((bound, ratio))) = (row.packed.first(), row.bound()) else { continue };
            let (_, with_registry) = row.bound_with_registry().unwrap_or((bound, ratio));
            let share = row.median(|sample| {
                let reads = sample.reads.unwrap_or_default();
                float(reads.misses) / float((reads.hits + reads.late_hits + reads.misses).max(1))
            });
            let wanted_bytes = packed.hot_bytes + packed.attach_bytes;
            writeln!(
                f,
                "{}, {}: ready / T* {:.2}, {:.2} with the registry's processor time (T* {:.2} s, T_w {:.2} s); misses {:.2} % of first reads; bytes {:.2} of hot blob \
                 ({:.2} MB) and attach ({:.2} MB); fetched twice {} chunks; sent twice {} bytes; {} blocks read that are not packed",
                row.workload,
                row.arm,
                ratio,
                with_registry,
                bound,
                median(&row.packed.iter().map(|packed| packed.warm_seconds).collect::<Vec<_>>()),
                share * 100.0,
                row.median(|sample| float(sample.bytes) / float(wanted_bytes)),
                megabytes(packed.hot_bytes),
                megabytes(packed.attach_bytes),
                row.samples.iter().filter_map(|sample| sample.duplicates).max().unwrap_or(0),
                row.samples.iter().map(|sample| sample.duplicate_bytes).max().unwrap_or(0),
                packed.unpacked_blocks,
            )?;
        }
        Ok(())
    }
}

/// Exact enough for two digits.
#[allow(clippy::cast_precision_loss)]
fn float(count: u64) -> f64 {
    count as f64
}

pub(crate) fn megabytes(bytes: u64) -> f64 {
    float(bytes) / 1e6
}
