//! `ublkimg metrics`: what the daemon has done, in the text format of Prometheus (version 0.0.4).
//!
//! Names follow its conventions: base units, `_total` for counters. Counters of a device begin at zero when its server does,
//! as those of any process.

use std::fmt::{Display, Write as _};
use std::path::Path;

use ublkimg_driver::daemon::protocol::{CacheAnswer, CacheRequest, DeviceStatus, StartFigures};
use ublkimg_driver::error::Error;
use ublkimg_driver::latency::{BUCKETS_US, Histogram, ReadLatencies};

use super::{cache, ls, status};
use crate::args::{Global, Metrics};
use crate::output;

pub(super) fn run(global: &Global, command: &Metrics) -> anyhow::Result<()> {
    let text = collect(global)?;
    match &command.output {
        Some(path) => replace(path, &text),
        None => output::line(text.trim_end()),
    }
}

fn collect(global: &Global) -> anyhow::Result<String> {
    let directories = super::directories(global)?;
    let devices = ls::list(&directories)?;
    let mut page = Page::default();
    page.gauge("ublkimg_up", "Whether the daemon answers.", [(String::new(), u8::from(devices.is_some()))]);
    let Some(devices) = devices else { return Ok(page.0) };
    let mut figures = Vec::new();
    for device in &devices {
        // One that was removed meanwhile is left out.
        if let Ok(start) = status::figures(&directories, &device.name) {
            figures.push((device, start));
        }
    }
    of_devices(&mut page, &devices);
    of_reads(&mut page, &devices);
    of_starts(&mut page, &figures);
    if let CacheAnswer::Status(status) = cache::ask(global, CacheRequest::Status)? {
        let room = &status.room;
        page.gauge("ublkimg_store_bytes", "Bytes of blobs in the store.", [(String::new(), room.used_bytes)]);
        page.gauge("ublkimg_store_free_bytes", "Free bytes of the store's disk.", [(String::new(), room.free_bytes)]);
        let help = "Chunks that the store's disk did not take, full or broken: they were served from memory.";
        page.counter("ublkimg_store_overflowed_chunks_total", help, [(String::new(), room.overflowed_chunks)]);
    }
    Ok(page.0)
}

fn of_devices(page: &mut Page, devices: &[DeviceStatus]) {
    let info = devices.iter().map(|device| {
        let labels = [
            ("name", device.name.clone()),
            ("reference", device.reference.clone()),
            ("manifest", device.manifest.clone()),
            ("device", device.device.display().to_string()),
            ("transport", device.transport.to_string()),
        ];
        (labels_of(&labels), 1)
    });
    page.gauge("ublkimg_device_info", "What a device is.", info);
    let of = |value: fn(&DeviceStatus) -> u64| devices.iter().map(move |device| (name_of(device), value(device)));
    page.gauge("ublkimg_device_size_bytes", "Size of the device.", of(|device| device.size_bytes));
    page.gauge("ublkimg_layer_bytes", "Bytes of the image's layers.", of(|device| device.layer_bytes));
    page.gauge("ublkimg_stored_bytes", "Those of them that are on this host.", of(|device| device.stored_bytes));
    let help = "Whether reads wait for a registry that does not answer.";
    page.gauge("ublkimg_waiting_for_registry", help, of(|device| u64::from(device.waiting.is_some())));
}

fn of_reads(page: &mut Page, devices: &[DeviceStatus]) {
    let by_result = |values: fn(&DeviceStatus) -> [u64; 3]| {
        devices.iter().flat_map(move |device| {
            ["hit", "late_hit", "miss"].into_iter().zip(values(device)).map(|(result, value)| {
                (labels_of(&[("name", device.name.clone()), ("result", result.to_owned())]), value)
            })
        })
    };
    let help = "Read requests: answered at once, after waiting for bytes under way, after waiting for bytes nobody had asked for.";
    page.counter(
        "ublkimg_reads_total",
        help,
        by_result(|device| {
            let counters = &device.counters;
            [counters.hits, counters.late_hits, counters.misses]
        }),
    );
    page.counter(
        "ublkimg_first_reads_total",
        "Those that read a block for the first time.",
        by_result(|device| {
            let first = &device.counters.first_reads;
            [first.hits, first.late_hits, first.misses]
        }),
    );
    page.counter(
        "ublkimg_pushed_reads_total",
        "Read requests that pushed blocks into the page cache before anybody read them; not among the first reads.",
        devices.iter().map(|device| (name_of(device), device.counters.first_reads.pushed)),
    );
    let durations = devices.iter().flat_map(|device| {
        let ReadLatencies { hits, late_hits, misses } = device.counters.latencies;
        [("hit", hits), ("late_hit", late_hits), ("miss", misses)]
            .map(|(result, histogram)| ([("name", device.name.clone()), ("result", result.to_owned())], histogram))
    });
    page.histogram(
        "ublkimg_read_duration_seconds",
        "How long read requests took: all that waited, and those hits that read a block for the first time.",
        durations,
    );
    let of = |value: fn(&DeviceStatus) -> u64| devices.iter().map(move |device| (name_of(device), value(device)));
    page.counter("ublkimg_read_bytes_total", "Bytes read from the device.", of(|device| device.counters.read_bytes));
    page.counter("ublkimg_read_errors_total", "Reads that failed.", of(|device| device.counters.errors));
    page.counter(
        "ublkimg_registry_requests_total",
        "Requests to registries.",
        of(|device| device.counters.registry_requests),
    );
    page.counter(
        "ublkimg_fetched_bytes_total",
        "Bytes that came from registries.",
        of(|device| device.counters.fetched_bytes),
    );
    page.counter(
        "ublkimg_copied_bytes_total",
        "Raw bytes that other images of this host had.",
        of(|device| device.counters.copied_bytes),
    );
    let help = "Chunks that were not what their digest says.";
    page.counter("ublkimg_verification_failures_total", help, of(|device| device.counters.verification_failures));
    let stall = devices.iter().map(|device| (name_of(device), seconds(device.counters.first_reads.stall_us)));
    page.counter("ublkimg_stall_seconds_total", "Time that first reads waited, summed over requests.", stall);
}

fn of_starts(page: &mut Page, figures: &[(&DeviceStatus, StartFigures)]) {
    let of =
        |value: fn(&StartFigures) -> u64| figures.iter().map(move |(device, start)| (name_of(device), value(start)));
    page.counter(
        "ublkimg_prefetched_bytes_total",
        "Bytes fetched before they were asked for.",
        of(|start| start.prefetch_bytes),
    );
    page.gauge("ublkimg_prefetched_unread_bytes", "Those that nobody has read so far.", of(|start| start.waste_bytes));
    let ready = figures.iter().filter_map(|(device, start)| Some((name_of(device), seconds(start.ready_us?))));
    page.gauge("ublkimg_ready_seconds", "How long it took from attaching until the program was ready.", ready);
    let bound =
        figures.iter().filter_map(|(device, start)| Some((name_of(device), seconds(start.bound.as_ref()?.bound_us))));
    page.gauge("ublkimg_ready_bound_seconds", "The earliest that it could have been, for the measured link.", bound);
}

/// The metrics so far.
#[derive(Default)]
struct Page(String);

impl Page {
    fn counter<V: Display>(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (String, V)>) {
        self.metric(name, "counter", help, samples);
    }

    fn gauge<V: Display>(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (String, V)>) {
        self.metric(name, "gauge", help, samples);
    }

    /// Buckets are of all that took at most so long, as the format wants it.
    fn histogram<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([(&'static str, String); N], Histogram)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (labels, histogram) in samples {
            let ends = BUCKETS_US.iter().map(|end_us| seconds(*end_us)).chain(["+Inf".to_owned()]);
            let mut count = 0;
            for (end, bucket) in ends.zip(histogram.buckets) {
                count += bucket;
                let labels: Vec<_> = labels.iter().cloned().chain([("le", end)]).collect();
                let _ = writeln!(self.0, "{name}_bucket{} {count}", labels_of(&labels));
            }
            let labels = labels_of(&labels);
            let _ = writeln!(self.0, "{name}_sum{labels} {}\n{name}_count{labels} {count}", seconds(histogram.sum_us));
        }
    }

    /// All samples of a name stand together, as the format wants it; a name without samples is left out.
    fn metric<V: Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (String, V)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }
}

fn name_of(device: &DeviceStatus) -> String {
    labels_of(&[("name", device.name.clone())])
}

fn labels_of(labels: &[(&str, String)]) -> String {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", labels.join(","))
}

/// Exact: microseconds are six decimals.
fn seconds(time_us: u64) -> String {
    format!("{}.{:06}", time_us / 1_000_000, time_us % 1_000_000)
}

/// Readers of the file see the old text or all of the new one.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let draft = path.with_extension("prom.tmp");
    let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
    std::fs::write(&draft, text).map_err(failed)?;
    Ok(std::fs::rename(&draft, path).map_err(failed)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_cannot_break_the_format() {
        assert_eq!(labels_of(&[("a", "x\"\\\n".to_owned())]), r#"{a="x\"\\\n"}"#);
        assert_eq!(seconds(1_000_001), "1.000001");
    }

    #[test]
    fn buckets_of_a_histogram_add_up() {
        let mut histogram = Histogram { sum_us: 1_500_000, ..Histogram::default() };
        (histogram.buckets[0], histogram.buckets[2], histogram.buckets[15]) = (1, 2, 4);
        let mut page = Page::default();
        page.histogram("t", "T.", [([("name", "a".to_owned())], histogram)]);
        let lines: Vec<&str> = page.0.lines().collect();
        assert_eq!(lines[..2], ["# HELP t T.", "# TYPE t histogram"]);
        for line in [
            r#"t_bucket{name="a",le="0.000010"} 1"#,
            r#"t_bucket{name="a",le="0.000050"} 1"#,
            r#"t_bucket{name="a",le="0.000100"} 3"#,
            r#"t_bucket{name="a",le="30.000000"} 3"#,
            r#"t_bucket{name="a",le="+Inf"} 7"#,
            r#"t_sum{name="a"} 1.500000"#,
            r#"t_count{name="a"} 7"#,
        ] {
            assert!(lines.contains(&line), "{line}: {}", page.0);
        }
    }

    #[test]
    fn a_name_without_samples_is_left_out() {
        let mut page = Page::default();
        page.gauge("x", "X.", Vec::<(String, u64)>::new());
        page.counter("y_total", "Y.", [(String::new(), 7)]);
        page.histogram("z", "Z.", Vec::<([(&str, String); 1], Histogram)>::new());
        assert_eq!(page.0, "# HELP y_total Y.\n# TYPE y_total counter\ny_total 7\n");
    }
}
