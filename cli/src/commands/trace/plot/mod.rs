//! `ublkimg trace plot`: a trace as blocks over time, the events of a start as a waterfall.

mod events;
mod waterfall;

use anyhow::Context;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_image::BLOCK_SIZE;
use ublkimg_image::trace::Trace;

use super::image::Named;
use crate::args::trace::Plot;
use crate::svg::{Axis, Ink, Picture};

/// What is drawn in the first colour, which stands out from light and from dark paper as all of them do.
const BLUE: &str = "#3b82c9";

/// Height of the main plot of a picture, in pixels.
const HEIGHT: f64 = 360.0;

/// Height of the plot below it.
const LOWER_HEIGHT: f64 = 120.0;

pub(super) fn run(command: &Plot) -> anyhow::Result<()> {
    let bytes = super::file::read(&command.file)?;
    let text = if bytes.first() == Some(&b'{') {
        waterfall::draw(&events::parse(&bytes).with_context(|| command.file.display().to_string())?)
    } else {
        let trace = super::file::parse(&command.file, &bytes)?;
        draw(&trace, Named::read(&command.of)?.as_ref())?
    };
    super::file::write(&command.output, text.as_bytes())
}

/// A picture of the events of a start, one JSON object a line.
pub(in crate::commands) fn of_events(lines: &[u8]) -> anyhow::Result<String> {
    Ok(waterfall::draw(&events::parse(lines)?))
}

/// Where a blob is on the vertical axis, in blocks.
struct Band {
    start: u64,
    blocks: u64,
    name: String,
}

fn draw(trace: &Trace, image: Option<&Named>) -> anyhow::Result<String> {
    if trace.entries.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "the trace is empty: there is nothing to draw").into());
    }
    let (bands, of_blob) = bands(trace, image);
    let (time, at) = horizontal(trace);
    let mut picture = Picture::new(&title(trace));
    picture.legend(BLUE, "blocks read for the first time");
    let top = bands.last().map_or(1, |band| band.start + band.blocks);
    let place = picture.plot(HEIGHT, &time, &Axis { max: mib(top), label: "place in the layers, MiB" });
    for band in &bands {
        picture.band(&place, mib(band.start), mib(band.start + band.blocks), &band.name);
    }
    let marks = trace.entries.iter().zip(&at).map(|(entry, x)| {
        let start = bands[of_blob[usize::from(entry.blob)]].start + u64::from(entry.block);
        ((*x, mib(start)), (*x, mib(start + u64::from(entry.blocks))))
    });
    picture.bars(&place, &Ink { color: BLUE, opacity: 1.0, least: (2.0, 2.0) }, marks);
    if trace.span_us() == 0 {
        return Ok(picture.finish());
    }
    let sum = Axis { max: mib(trace.blocks()), label: "read so far, MiB" };
    let sums = picture.plot(LOWER_HEIGHT, &time, &sum);
    let mut read = 0;
    let steps = trace.entries.iter().zip(&at).map(|(entry, x)| {
        read += u64::from(entry.blocks);
        (*x, mib(read))
    });
    picture.steps(&sums, BLUE, std::iter::once((0.0, 0.0)).chain(steps));
    if let Some(ready_us) = trace.header.ready_us {
        picture.moments(&place, std::iter::once((seconds(ready_us), "ready")));
        picture.moments(&sums, std::iter::once((seconds(ready_us), "")));
    }
    Ok(picture.finish())
}

/// The horizontal axis, and where on it each entry is: its time or, when the trace has none (a list has none), what was
/// read before it.
fn horizontal(trace: &Trace) -> (Axis<'static>, Vec<f64>) {
    let mut at = Vec::with_capacity(trace.entries.len());
    let (mut clock_us, mut read) = (0, 0);
    let has_times = trace.span_us() > 0;
    for entry in &trace.entries {
        clock_us += entry.since_previous_us;
        at.push(if has_times { seconds(clock_us) } else { mib(read) });
        read += u64::from(entry.blocks);
    }
    if has_times {
        let end_us = clock_us.max(trace.header.ready_us.unwrap_or(0));
        return (Axis { max: seconds(end_us), label: "time, s" }, at);
    }
    (Axis { max: mib(read), label: "read before, MiB" }, at)
}

/// The layers of the image, or what is known of the blobs without it; and the band of each blob of the trace.
fn bands(trace: &Trace, image: Option<&Named>) -> (Vec<Band>, Vec<usize>) {
    let mut bands: Vec<Band> = Vec::new();
    let mut add = |blocks: u64, name: String| {
        let start = bands.last().map_or(0, |band| band.start + band.blocks);
        bands.push(Band { start, blocks, name });
        bands.len() - 1
    };
    let mut layers = std::collections::HashMap::new();
    for (number, layer) in image.iter().flat_map(|image| image.stored.bundle.layers.iter().enumerate()) {
        let band = add(u64::from(layer.index.raw_len_blocks()), format!("layer {}", number + 1));
        layers.entry(layer.digest).or_insert(band);
    }
    let of_blob = (0..).zip(&trace.header.blobs).map(|(number, digest): (u16, _)| {
        layers.get(digest).copied().unwrap_or_else(|| {
            let own = trace.entries.iter().filter(|entry| entry.blob == number);
            let end = own.map(|entry| u64::from(entry.block) + u64::from(entry.blocks)).max();
            add(end.unwrap_or(0), digest.hex()[..12].to_owned())
        })
    });
    let of_blob = of_blob.collect();
    (bands, of_blob)
}

fn title(trace: &Trace) -> String {
    let command = match trace.header.command.as_slice() {
        [] => "a start".to_owned(),
        command => super::command_text(command),
    };
    let read_ahead_kb = trace.header.read_ahead_kb;
    format!("First reads of {command} (read_ahead_kb {read_ahead_kb})")
}

#[expect(clippy::cast_precision_loss, reason = "for a picture")]
fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "for a picture")]
fn mib(blocks: u64) -> f64 {
    blocks as f64 * BLOCK_SIZE as f64 / f64::from(1 << 20)
}
