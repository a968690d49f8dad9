//! `ublkimg trace show`: what is in a trace.

use serde::Serialize;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_image::trace::{FileMap, Trace};

use super::image::Named;
use crate::args::trace::Show;
use crate::output;

/// Rows of the timeline.
const STEPS: u64 = 20;

/// Characters of the longest bar of the timeline.
const BAR_CHARS: u64 = 40;

/// What `trace show --json` prints.
#[derive(Serialize)]
struct Shown {
    manifest: String,
    command: Vec<String>,
    command_digest: String,
    runs: u32,
    read_ahead_kb: u32,
    ready_us: Option<u64>,
    span_us: u64,
    lost: u64,
    entries: usize,
    blocks: u64,
    bytes: u64,
    blobs: Vec<Blob>,
    timeline: Vec<Step>,
    /// `null` without the image.
    files: Option<Vec<FileShare>>,
    /// Blocks that no file of the image has; `null` without the image.
    blocks_of_no_file: Option<u64>,
}

#[derive(Serialize)]
struct Blob {
    digest: String,
    /// Number of the layer, from 1; `null` without the image or when it has no such layer.
    layer: Option<usize>,
    blocks: u64,
}

#[derive(Serialize)]
struct Step {
    start_us: u64,
    end_us: u64,
    blocks: u64,
}

#[derive(Serialize)]
struct FileShare {
    path: String,
    /// Blocks of the file in the trace.
    blocks: u64,
    /// All blocks of the file.
    file_blocks: u64,
    /// When the first of them was read.
    first_us: u64,
}

pub(super) fn run(command: &Show) -> anyhow::Result<()> {
    let trace = super::file::load(&command.file)?;
    let image = Named::read(&command.of)?;
    let shown = summarise(&trace, image.as_ref());
    if command.json {
        return output::json(&shown);
    }
    print_totals(&shown)?;
    if let Some(files) = &shown.files {
        let limit = if command.files == 0 { usize::MAX } else { command.files };
        print_files(&shown, files, limit)?;
    }
    Ok(())
}

fn summarise(trace: &Trace, image: Option<&Named>) -> Shown {
    let header = &trace.header;
    let mut blob_blocks = vec![0; header.blobs.len()];
    for entry in &trace.entries {
        blob_blocks[usize::from(entry.blob)] += u64::from(entry.blocks);
    }
    let layer_of = |digest| image?.stored.bundle.layers.iter().position(|layer| layer.digest == digest);
    let blobs = header.blobs.iter().zip(blob_blocks).map(|(digest, blocks)| Blob {
        digest: digest.to_string(),
        layer: layer_of(*digest).map(|layer| layer + 1),
        blocks,
    });
    let usage = image.map(|image| usage(trace, image));
    let blocks_of_no_file = usage.as_ref().map(|(_, blocks)| *blocks);
    Shown {
        manifest: header.manifest.to_string(),
        command: header.command.clone(),
        command_digest: trace.command_digest().to_string(),
        runs: header.runs,
        read_ahead_kb: header.read_ahead_kb,
        ready_us: header.ready_us,
        span_us: trace.span_us(),
        lost: header.lost,
        entries: trace.entries.len(),
        blocks: trace.blocks(),
        bytes: bytes(trace.blocks()),
        blobs: blobs.collect(),
        timeline: timeline(trace),
        files: usage.map(|(files, _)| files),
        blocks_of_no_file,
    }
}

/// The files of the image that the trace reads, those with the most blocks first, and its blocks of no file.
fn usage(trace: &Trace, image: &Named) -> (Vec<FileShare>, u64) {
    let map = FileMap::new(&image.tree, &image.geometry);
    let mut usage = map.usage(trace);
    // Stable: of equal ones the first read stays first.
    usage.files.sort_by_key(|file| std::cmp::Reverse(file.touched_blocks));
    let files = usage.files.iter().map(|file| FileShare {
        path: format!("/{}", String::from_utf8_lossy(&map.path(file.file))),
        blocks: file.touched_blocks,
        file_blocks: file.blocks(),
        first_us: file.first_us,
    });
    (files.collect(), usage.other_blocks + usage.unknown_blocks)
}

/// The files that a trace reads, for a page: of each what was read, how much of it that is, and when that began. Those with
/// the most blocks first.
pub(in crate::commands) fn files(trace: &Trace, image: &Named) -> Vec<(String, [String; 3])> {
    let (files, _) = usage(trace, image);
    let row = |file: FileShare| {
        let part = percent(file.blocks, file.file_blocks);
        (file.path, [output::bytes(bytes(file.blocks)), part, seconds(file.first_us)])
    };
    files.into_iter().map(row).collect()
}

/// Equal steps of time and the blocks that were read in each.
fn timeline(trace: &Trace) -> Vec<Step> {
    let span_us = trace.span_us().max(1);
    let start =
        |step: u64| u64::try_from(u128::from(step) * u128::from(span_us) / u128::from(STEPS)).unwrap_or(span_us);
    let mut steps: Vec<Step> =
        (0..STEPS).map(|step| Step { start_us: start(step), end_us: start(step + 1), blocks: 0 }).collect();
    let (mut at_us, mut step) = (0, 0);
    for entry in &trace.entries {
        at_us += entry.since_previous_us;
        while step + 1 < steps.len() && at_us >= steps[step].end_us {
            step += 1;
        }
        steps[step].blocks += u64::from(entry.blocks);
    }
    steps
}

fn print_totals(shown: &Shown) -> anyhow::Result<()> {
    let runs = if shown.runs == 1 { "1 run".to_owned() } else { format!("{} runs", shown.runs) };
    let lines = [
        ("image", shown.manifest.clone()),
        ("command", super::command_text(&shown.command)),
        ("recorded", format!("{runs}, read_ahead_kb {}", shown.read_ahead_kb)),
        ("ready", shown.ready_us.map_or_else(|| "not seen".to_owned(), seconds)),
        (
            "first reads",
            format!("{} blocks ({}) in {} entries", shown.blocks, output::bytes(shown.bytes), shown.entries),
        ),
        ("lost", format!("{} first reads", shown.lost)),
    ];
    for (label, value) in lines {
        output::line(&format!("{label:12}{value}"))?;
    }
    output::line("")?;
    let rows: Vec<[String; 3]> = shown
        .blobs
        .iter()
        .map(|blob| {
            let layer = blob.layer.map_or_else(|| "-".to_owned(), |layer| layer.to_string());
            [layer, output::bytes(bytes(blob.blocks)), blob.digest.clone()]
        })
        .collect();
    output::table(["LAYER", "READ", "BLOB"], &rows)?;
    // A list has no times.
    if shown.span_us == 0 {
        return Ok(());
    }
    output::line("")?;
    let highest = shown.timeline.iter().map(|step| step.blocks).max().unwrap_or(0).max(1);
    let rows: Vec<[String; 3]> = shown
        .timeline
        .iter()
        .map(|step| {
            let bar = "#".repeat(usize::try_from((step.blocks * BAR_CHARS).div_ceil(highest)).unwrap_or(0));
            [seconds(step.start_us), output::bytes(bytes(step.blocks)), bar]
        })
        .collect();
    output::table(["FROM", "READ", ""], &rows)
}

fn print_files(shown: &Shown, files: &[FileShare], limit: usize) -> anyhow::Result<()> {
    output::line("")?;
    let rows: Vec<[String; 5]> = files
        .iter()
        .take(limit)
        .map(|file| {
            [
                output::bytes(bytes(file.blocks)),
                percent(file.blocks, shown.blocks),
                percent(file.blocks, file.file_blocks),
                seconds(file.first_us),
                printable(&file.path),
            ]
        })
        .collect();
    output::table(["READ", "OF TRACE", "OF FILE", "FIRST", "FILE"], &rows)?;
    if let Some(rest) = files.len().checked_sub(limit).filter(|rest| *rest > 0) {
        output::line(&format!("and {rest} more files: --files 0 lists them all"))?;
    }
    match shown.blocks_of_no_file {
        Some(blocks) if blocks > 0 => output::line(&format!("{blocks} blocks are of no file of this image")),
        _ => Ok(()),
    }
}

/// A path for a terminal: the image chose it.
pub(super) fn printable(path: &str) -> String {
    path.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn bytes(blocks: u64) -> u64 {
    blocks * BLOCK_SIZE as u64
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds are shown")]
fn seconds(us: u64) -> String {
    format!("{:.3} s", us as f64 / 1e6)
}

#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64)
}
