//! `ublkimg report`: the start of a device as one HTML page, with its picture inside and nothing outside.

use std::path::Path;

use ublkimg_driver::daemon::protocol::{DeviceStatus, StartFigures};
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::start_events::{ReadOutcome, StartEvent};
use ublkimg_image::trace::Trace;

use super::trace::{self, Named, load, plot};
use super::{events, status};
use crate::args::report::Report;
use crate::args::{Global, RegistryOptions};
use crate::exit::one_line;
use crate::output;
use crate::page::Page;

/// Ends of the columns of the histogram, in microseconds; the last column is what took longer.
const BUCKETS_US: [u32; 8] = [100, 1_000, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000];
const BUCKET_NAMES: [&str; 9] = ["0.1 ms", "1 ms", "5 ms", "10 ms", "50 ms", "100 ms", "500 ms", "1 s", "longer"];

/// Files that are listed; a start of a large program reads tens of thousands.
const FILES_MAX: usize = 200;

pub(super) fn run(global: &Global, command: &Report) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let device = status::find(&directories, &command.target)?;
    let start = status::figures(&directories, &device.name)?;
    let events = events::of(&directories, &device.name)?;
    let mut page = Page::new(&format!("Start of {}", device.reference));
    add_start(&mut page, &device, &start, &events)?;
    let trace = command.trace.as_deref().or(start.recording.trace.as_deref()).map(load).transpose()?;
    match image_of(&device, &command.registry) {
        Ok(image) => {
            add_full_pull(&mut page, &device, &start, &image);
            add_files(&mut page, trace.as_ref(), &image);
        }
        // The registry may be away: the rest is worth having.
        Err(error) => page.paragraph(&format!("Files and full pull are left out: {}", one_line(&error))),
    }
    write(&command.output, page)
}

/// The image of a device, as long as its name still means it.
fn image_of(device: &DeviceStatus, registry: &RegistryOptions) -> anyhow::Result<Named> {
    let image = Named::fetch(&device.reference, registry)?;
    if image.stored.digest.to_string() == device.manifest {
        return Ok(image);
    }
    let text = format!("{} names another image by now, {}", device.reference, image.stored.digest);
    Err(Error::new(ErrorKind::NotFound, text).into())
}

/// What a full pull would have moved, and how long that takes the link that was measured.
fn add_full_pull(page: &mut Page, device: &DeviceStatus, start: &StartFigures, image: &Named) {
    let layers_bytes: u64 = image.stored.manifest.layers.iter().map(|layer| layer.size_bytes).sum();
    let fetched = output::bytes(device.counters.fetched_bytes);
    let mut rows = vec![
        ("layers of the image", output::bytes(layers_bytes)),
        (
            "fetched by this device",
            format!("{fetched} ({} %)", device.counters.fetched_bytes * 100 / layers_bytes.max(1)),
        ),
    ];
    if let Some(bound) = start.bound.filter(|bound| bound.bandwidth_bytes_per_s > 0) {
        let link = bound.bandwidth_bytes_per_s;
        let text = format!("{} s at {}/s, without unpacking", layers_bytes.div_ceil(link), output::bytes(link));
        rows.push(("to move all layers takes", text));
    }
    page.heading("Beside a full pull");
    page.figures(&rows);
    page.paragraph(
        "Computed, with the layers as they are stored for lazy starts; `ublkimg compare` makes both starts.",
    );
}

fn add_files(page: &mut Page, trace: Option<&Trace>, image: &Named) {
    page.heading("Files that were read");
    let Some(trace) = trace else {
        page.paragraph(
            "This start was not recorded on this host: `ublkimg record` makes a trace, and --trace names one.",
        );
        return;
    };
    let files = trace::show::files(trace, image);
    let rows: Vec<(&str, Vec<String>)> =
        files.iter().take(FILES_MAX).map(|(path, cells)| (path.as_str(), cells.to_vec())).collect();
    page.numbers(&["file", "read", "of the file", "first"], &rows);
    if let Some(more) = files.len().checked_sub(FILES_MAX).filter(|more| *more > 0) {
        page.paragraph(&format!("and {more} more"));
    }
}

/// Writes a page that is done.
pub(super) fn write(path: &Path, page: Page) -> anyhow::Result<()> {
    let written = std::fs::write(path, page.finish());
    Ok(written.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?)
}

/// Adds what is known of a start: its picture, how its reads waited, and figures.
pub(super) fn add_start(
    page: &mut Page,
    device: &DeviceStatus,
    start: &StartFigures,
    events: &[StartEvent],
) -> anyhow::Result<()> {
    page.picture(&plot::of_events(events::lines(events)?.as_bytes())?);
    page.heading("How long first reads waited");
    let header: Vec<&str> = ["at most"].into_iter().chain(BUCKET_NAMES).collect();
    let rows = histogram(events).map(|(name, counts)| (name, counts.map(|count| count.to_string()).to_vec()));
    page.numbers(&header, &rows);
    page.heading("Figures");
    let mut rows = status::device_rows(device);
    rows.extend(status::start_rows(start));
    page.figures(&rows);
    Ok(())
}

/// First reads by how they went and how long they waited.
fn histogram(events: &[StartEvent]) -> [(&'static str, [u64; BUCKET_NAMES.len()]); 3] {
    let mut rows = ["hits", "late hits", "misses"].map(|name| (name, [0; BUCKET_NAMES.len()]));
    for event in events {
        let StartEvent::Read { read, stall_us, .. } = event else { continue };
        let row = match read {
            ReadOutcome::Hit => 0,
            ReadOutcome::LateHit => 1,
            ReadOutcome::Miss => 2,
        };
        rows[row].1[BUCKETS_US.partition_point(|end| end < stall_us)] += 1;
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_counted_where_they_belong() {
        let read = |read, stall_us| StartEvent::Read { read, at_us: 0, blocks: 1, stall_us };
        let events = [
            read(ReadOutcome::Hit, 0),
            read(ReadOutcome::LateHit, 100),
            read(ReadOutcome::LateHit, 101),
            read(ReadOutcome::Miss, 5_000_000),
        ];
        let rows = histogram(&events);
        assert_eq!((rows[0].1[0], rows[1].1[0], rows[1].1[1], rows[2].1[8]), (1, 1, 1, 1));
    }
}
