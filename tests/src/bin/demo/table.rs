//! The figures side by side.

use std::fmt;
use std::time::Duration;

/// What one of the two ways cost.
#[derive(Debug, Clone)]
pub(crate) struct Figures {
    /// From the first request to a mounted image: the pull, or the attach.
    pub(crate) prepare: Duration,
    /// The container alone.
    pub(crate) run: Duration,
    /// Bodies that the registry sent, in bytes.
    pub(crate) fetched_bytes: u64,
    /// Requests that the registry answered.
    pub(crate) requests: u64,
    /// Reads of the device that found their blocks here, and those that had to wait for the registry.
    pub(crate) reads: Option<Reads>,
    /// How the bytes came to the kernel.
    pub(crate) transport: String,
}

/// Reads at the block device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reads {
    /// All blocks were in the store.
    pub(crate) hit: u64,
    /// Some had to be fetched.
    pub(crate) missed: u64,
}

impl Figures {
    /// From nothing to a container whose command has done its work.
    pub(crate) fn ready(&self) -> Duration {
        self.prepare + self.run
    }
}

/// Both ways as a table for people.
pub(crate) struct Table<'a> {
    /// Pull, unpack, start.
    pub(crate) classic: &'a Figures,
    /// Attach, start.
    pub(crate) lazy: &'a Figures,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
        let reads = |figures: &Figures, pick: fn(Reads) -> u64| {
            figures.reads.map_or_else(|| "-".to_owned(), |reads| pick(reads).to_string())
        };
        let mut row = |title: &str, cell: &dyn Fn(&Figures) -> String| {
            writeln!(f, "{title:<22}{:>20}{:>20}", cell(self.classic), cell(self.lazy))
        };
        row("", &|figures| if figures.reads.is_some() { "ublkimg add" } else { "classic pull" }.to_owned())?;
        row("time to ready", &|figures| seconds(figures.ready()))?;
        row("  pull or attach", &|figures| seconds(figures.prepare))?;
        row("  container", &|figures| seconds(figures.run))?;
        row("bytes fetched", &|figures| megabytes(figures.fetched_bytes))?;
        row("requests", &|figures| figures.requests.to_string())?;
        row("device reads: hit", &|figures| reads(figures, |reads| reads.hit))?;
        row("device reads: missed", &|figures| reads(figures, |reads| reads.missed))?;
        row("transport", &|figures| figures.transport.clone())
    }
}

/// A size as people read it.
pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10)
}
