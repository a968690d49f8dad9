//! What starts took.

use serde::Serialize;
use ublkimg_driver::daemon::protocol::{DeviceStatus, StartFigures};
use ublkimg_driver::start_events::StartEvent;

/// One start.
#[derive(Serialize)]
pub(super) struct Sample {
    /// From the first request until the command is ready.
    pub(super) ready_us: u64,
    /// Of that: until the root file system is there.
    pub(super) root_us: u64,
    /// Bytes that came from the registry; of a full pull those of layers and config.
    pub(super) fetched_bytes: u64,
    /// First reads of the device; none after a full pull.
    pub(super) first_reads: Option<FirstReads>,
    /// What else is known of a lazy start.
    #[serde(skip)]
    pub(super) seen: Option<Seen>,
}

/// Requests of the device that read a block for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct FirstReads {
    pub(super) hits: u64,
    pub(super) late_hits: u64,
    pub(super) misses: u64,
}

/// A lazy start as the daemon saw it.
pub(super) struct Seen {
    pub(super) device: DeviceStatus,
    pub(super) figures: StartFigures,
    pub(super) events: Vec<StartEvent>,
}

/// Starts of one kind; at least one.
#[derive(Serialize)]
pub(super) struct Arm {
    pub(super) name: &'static str,
    pub(super) median: Summary,
    pub(super) samples: Vec<Sample>,
}

/// Medians, each by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Summary {
    pub(super) ready_us: u64,
    pub(super) least_us: u64,
    pub(super) most_us: u64,
    pub(super) root_us: u64,
    pub(super) fetched_bytes: u64,
    pub(super) first_reads: Option<FirstReads>,
}

impl Arm {
    /// Nothing of no starts.
    pub(super) fn new(name: &'static str, samples: Vec<Sample>) -> Option<Self> {
        let median = Summary::of(&samples)?;
        Some(Self { name, median, samples })
    }
}

impl Summary {
    fn of(samples: &[Sample]) -> Option<Self> {
        let ready = || samples.iter().map(|sample| sample.ready_us);
        let reads = |of: fn(&FirstReads) -> u64| median(samples.iter().filter_map(|s| s.first_reads.as_ref().map(of)));
        let first_reads = || {
            Some(FirstReads {
                hits: reads(|reads| reads.hits)?,
                late_hits: reads(|reads| reads.late_hits)?,
                misses: reads(|reads| reads.misses)?,
            })
        };
        Some(Self {
            ready_us: median(ready())?,
            least_us: ready().min()?,
            most_us: ready().max()?,
            root_us: median(samples.iter().map(|sample| sample.root_us))?,
            fetched_bytes: median(samples.iter().map(|sample| sample.fetched_bytes))?,
            first_reads: first_reads(),
        })
    }
}

/// The value in the middle; of two, the one between them.
fn median(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    let middle = values.len() / 2;
    match values.len() % 2 {
        1 => values.get(middle).copied(),
        _ => Some(u64::midpoint(*values.get(middle.checked_sub(1)?)?, *values.get(middle)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_each_column() {
        let sample = |ready_us, root_us, misses| Sample {
            ready_us,
            root_us,
            fetched_bytes: 7,
            first_reads: Some(FirstReads { hits: 1, late_hits: 0, misses }),
            seen: None,
        };
        let arm = Arm::new("lazy", vec![sample(30, 1, 9), sample(10, 3, 5), sample(20, 2, 7)]).unwrap();
        let first_reads = Some(FirstReads { hits: 1, late_hits: 0, misses: 7 });
        let expected = Summary { ready_us: 20, least_us: 10, most_us: 30, root_us: 2, fetched_bytes: 7, first_reads };
        assert_eq!(arm.median, expected);
        assert_eq!(median([10, 20].into_iter()), Some(15));
        assert!(Arm::new("none", Vec::new()).is_none());
    }
}
