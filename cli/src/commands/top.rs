//! `ublkimg top`: what all devices do, second by second.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ublkimg_driver::ImageStatistics;
use ublkimg_driver::daemon::protocol::DeviceStatus;

use super::ls;
use crate::args::Global;
use crate::args::top::Top;
use crate::output;

const HEADER: [&str; 8] = ["NAME", "READS/s", "READ/s", "HITS", "WAITED", "FETCHED/s", "HERE", "REGISTRY"];

pub(super) fn run(global: &Global, command: &Top) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let is_terminal = std::io::stdout().is_terminal();
    let mut before = Counted::now(ls::list(&directories)?.unwrap_or_default());
    let mut shown = 0;
    while command.count.is_none_or(|count| shown < count.get()) {
        std::thread::sleep(command.delay);
        let now = Counted::now(ls::list(&directories)?.unwrap_or_default());
        if is_terminal {
            output::line(output::CLEARED)?;
        }
        output::table(HEADER, &now.rows_since(&before))?;
        before = now;
        shown += 1;
    }
    Ok(())
}

/// The devices at one moment.
struct Counted {
    at: Instant,
    devices: Vec<DeviceStatus>,
}

impl Counted {
    fn now(devices: Vec<DeviceStatus>) -> Self {
        Self { at: Instant::now(), devices }
    }

    /// What was done since `before`; a device that is new began with nothing.
    fn rows_since(&self, before: &Self) -> Vec<[String; 8]> {
        let took = self.at.duration_since(before.at);
        let old: HashMap<&str, &DeviceStatus> = before.devices.iter().map(|it| (it.name.as_str(), it)).collect();
        let since = |device: &DeviceStatus| old.get(device.name.as_str()).map(|old| old.counters).unwrap_or_default();
        self.devices.iter().map(|device| row(device, &since(device), took)).collect()
    }
}

fn row(device: &DeviceStatus, before: &ImageStatistics, took: Duration) -> [String; 8] {
    let now = &device.counters;
    // Counters of a server that has just started are smaller than those of the one before.
    let more = |of: fn(&ImageStatistics) -> u64| of(now).saturating_sub(of(before));
    let (reads, waited) = (more(|it| it.reads), more(|it| it.misses + it.late_hits));
    [
        device.name.clone(),
        per_second(reads, took).to_string(),
        output::bytes(per_second(more(|it| it.read_bytes), took)),
        percent(reads.saturating_sub(waited), reads),
        waited.to_string(),
        output::bytes(per_second(more(|it| it.fetched_bytes), took)),
        percent(device.stored_bytes, device.layer_bytes),
        device
            .waiting
            .as_ref()
            .map_or_else(|| "-".to_owned(), |waiting| format!("waiting {} s", waiting.since_ms / 1000)),
    ]
}

fn per_second(count: u64, took: Duration) -> u64 {
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
    count.saturating_mul(1000) / took_ms
}

fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        _ => format!("{} %", part.saturating_mul(100) / whole),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_shares() {
        assert_eq!(per_second(3, Duration::from_millis(1500)), 2);
        assert_eq!(per_second(3, Duration::ZERO), 3000);
        assert_eq!((percent(1, 3), percent(0, 0)), ("33 %".to_owned(), "-".to_owned()));
    }
}
