//! `ublkimg status`: one device in detail.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use ublkimg_driver::daemon::protocol::{Answer, DeviceStatus, FillMode, Request, StartFigures, Waiting};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::{mounts, verity};

use super::ls;
use crate::args::{Global, Status};
use crate::output;

/// What `status --json` prints.
#[derive(Serialize)]
struct Detail<'a> {
    #[serde(flatten)]
    device: &'a DeviceStatus,
    start: &'a StartFigures,
}

pub(super) fn run(global: &Global, command: &Status) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let device = find(&directories, &command.target)?;
    show(&directories, command, &device)?;
    let Some(pause) = command.watch else { return Ok(()) };
    loop {
        std::thread::sleep(pause);
        // By its name: what is mounted where it was mounted may be another one by now.
        let device = match find(&directories, &device.name) {
            Err(error) if super::hook::is_not_found(&error) => return Ok(()),
            other => other?,
        };
        if std::io::stdout().is_terminal() && !command.json {
            output::line(output::CLEARED)?;
        }
        match show(&directories, command, &device) {
            Err(error) if super::hook::is_not_found(&error) => return Ok(()),
            shown => shown?,
        }
    }
}

fn show(directories: &Directories, command: &Status, device: &DeviceStatus) -> anyhow::Result<()> {
    let start = figures(directories, &device.name)?;
    if let Some(path) = &command.events {
        super::events::write(directories, &device.name, path)?;
    }
    if command.json {
        return output::json(&Detail { device, start: &start });
    }
    print(&device_rows(device))?;
    print_start(&start)
}

/// What a device has done, one figure a line.
pub(super) fn device_rows(device: &DeviceStatus) -> Vec<(&'static str, String)> {
    let counters = &device.counters;
    let mounts: Vec<String> = device.mounts.iter().map(|path| path.display().to_string()).collect();
    vec![
        ("name", device.name.clone()),
        ("reference", device.reference.clone()),
        ("manifest", device.manifest.clone()),
        ("device", device.device.display().to_string()),
        ("transport", device.transport.to_string()),
        ("mounts", mounts.join(" ")),
        ("verity root", device.verity.as_ref().map_or_else(|| "none".to_owned(), |verity| verity.root.clone())),
        ("size", output::bytes(device.size_bytes)),
        ("reads", format!("{} ({})", counters.reads, output::bytes(counters.read_bytes))),
        ("hits", counters.hits.to_string()),
        ("late hits", counters.late_hits.to_string()),
        ("misses", counters.misses.to_string()),
        ("errors", counters.errors.to_string()),
        ("fetched", format!("{} chunks ({})", counters.fetched_chunks, output::bytes(counters.fetched_bytes))),
        ("copied", format!("{} chunks ({})", counters.copied_chunks, output::bytes(counters.copied_bytes))),
        ("registry requests", counters.registry_requests.to_string()),
        ("stored", output::bytes(device.stored_bytes)),
        ("waiting", device.waiting.as_ref().map_or_else(|| "nobody".to_owned(), waiting)),
        ("verification failures", counters.verification_failures.to_string()),
    ]
}

fn print(rows: &[(&str, String)]) -> anyhow::Result<()> {
    rows.iter().try_for_each(|(label, value)| output::line(format!("{label:22}{value}").trim_end()))
}

/// Who waits for the registry, since when and why.
fn waiting(waiting: &Waiting) -> String {
    let since = Duration::from_millis(waiting.since_ms).as_secs_f64();
    format!("{} fetches, since {since:.0} s, first of {}: {}", waiting.fetches, waiting.what, waiting.cause)
}

/// What is known of the start of a device.
pub(super) fn figures(directories: &Directories, name: &str) -> anyhow::Result<StartFigures> {
    let request = Request::Figures { name: name.to_owned() };
    match client::ask(directories, &request, client::ANSWER_MARGIN)? {
        Some(Answer::Figures(figures)) => Ok(*figures),
        Some(answer) => Err(super::unexpected(&answer)),
        None => Err(Error::new(ErrorKind::NotFound, format!("no device {name}: the daemon has ended")).into()),
    }
}

/// Prints what is known of a start, one figure a line.
pub(super) fn print_start(start: &StartFigures) -> anyhow::Result<()> {
    print(&start_rows(start))
}

/// The same, as labels and values.
pub(super) fn start_rows(start: &StartFigures) -> Vec<(&'static str, String)> {
    let reads = &start.first_reads;
    let profile = start.profile.as_ref().map_or_else(
        || "none".to_owned(),
        |profile| {
            let hot = if profile.has_hot_blob { ", with its hot blob" } else { "" };
            let end = if profile.is_used_up { ", used up" } else { "" };
            format!("{} ({} blocks{hot}{end})", profile.source, profile.blocks)
        },
    );
    let bound = start.bound.map_or_else(
        || "unknown: no trace of this start, or nothing fetched yet".to_owned(),
        |bound| {
            let ratio = bound.ratio.map_or_else(String::new, |ratio| format!(", ready at {ratio:.2} times that"));
            let link = output::bytes(bound.bandwidth_bytes_per_s);
            let round_trip = milliseconds(bound.round_trip_us);
            format!("{} for {link}/s and {round_trip}{ratio}", milliseconds(bound.bound_us))
        },
    );
    let recording = match (&start.recording.trace, start.recording.is_running) {
        (_, true) => format!("under way, {} entries", start.recording.entries),
        (Some(path), false) => format!("{} entries in {}", start.recording.entries, path.display()),
        (None, false) => "none".to_owned(),
    };
    let (present, total) = (output::bytes(start.fill.present_bytes), output::bytes(start.fill.total_bytes));
    vec![
        ("time to ready", start.ready_us.map_or_else(|| "not ready yet".to_owned(), milliseconds)),
        ("lower bound", bound),
        ("first reads", format!("{} hits, {} late hits, {} misses", reads.hits, reads.late_hits, reads.misses)),
        ("pushed", format!("{} requests ({} blocks)", reads.pushed, reads.pushed_blocks)),
        ("stall", milliseconds(reads.stall_us)),
        ("demand", format!("{} requests ({})", start.demand_requests, output::bytes(start.demand_bytes))),
        ("prefetch", format!("{} requests ({})", start.prefetch_requests, output::bytes(start.prefetch_bytes))),
        ("prefetched, not read", output::bytes(start.waste_bytes)),
        ("fetched twice", format!("{} chunks", start.duplicates)),
        ("profile", profile),
        ("read-ahead", format!("{} KiB", start.read_ahead_kb)),
        ("recording", recording),
        ("fill", format!("{}, {present} of {total}", fill_name(start.fill.mode))),
    ]
}

fn fill_name(mode: FillMode) -> &'static str {
    match mode {
        FillMode::Off => "off",
        FillMode::Idle => "idle",
        FillMode::Full => "full",
    }
}

fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

/// The device that `target` names: by its name, its path, or a mount point of it. What is mounted there now, in this mount
/// namespace, counts before what was mounted there once.
pub(super) fn find(directories: &Directories, target: &str) -> anyhow::Result<DeviceStatus> {
    let devices = ls::list(directories)?.unwrap_or_default();
    let path = super::resolved(Path::new(target))?;
    let by_name = || devices.iter().position(|device| device.name == target);
    let is_at = |device: &DeviceStatus| device.device == path || verity::path(&device.name) == Path::new(target);
    let by_path = || devices.iter().position(is_at);
    let recorded = || devices.iter().position(|device| device.mounts.contains(&path));
    let mounted = super::mounted_device(&path)?;
    let by_mount = || {
        let number = mounted?;
        let is_own = |device: &DeviceStatus| mounts::device_number(&device.device).is_ok_and(|own| own == number);
        let is_mapped = |device: &DeviceStatus| {
            device.verity.is_some()
                && verity::find(&device.name).is_ok_and(|mapped| mapped.is_some_and(|it| it.number == number))
        };
        devices.iter().position(is_own).or_else(|| devices.iter().position(is_mapped))
    };
    let found = by_name().or_else(by_path).or_else(by_mount).or_else(recorded);
    found.and_then(|index| devices.into_iter().nth(index)).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("no device {target}: `ublkimg ls` lists those there are")).into()
    })
}
