//! A finished start: above, every fetch as a bar from its request to its last byte, pale until its first one, as high as it
//! has bytes, one above the other; below, how the first reads went.

use super::events::{Class, Event, Outcome};
use super::{BLUE, HEIGHT, LOWER_HEIGHT, seconds};
use crate::svg::{Axis, Ink, Picture, Plot};

/// Classes of fetches in the order of the legend.
const CLASSES: [(Class, &str, &str); 6] = [
    (Class::Attach, "#2a9d94", "to attach"),
    (Class::Demand, "#dd6b20", "fetched on demand"),
    (Class::Trace, BLUE, "by trace"),
    (Class::ReadAhead, "#9073d6", "read-ahead"),
    (Class::Fill, "#8c8c8c", "fill"),
    (Class::Other, "#6e7781", "other"),
];

/// Outcomes of first reads, in the order in which they are stacked.
const OUTCOMES: [(Outcome, &str, &str); 3] =
    [(Outcome::Hit, "#43a047", "hit"), (Outcome::LateHit, "#d9a300", "late hit"), (Outcome::Miss, "#d9363e", "miss")];

/// Opacity of a bar before the first byte.
const PALE: f64 = 0.35;

/// Columns of the lower plot.
const COLUMNS: u32 = 130;

pub(super) fn draw(events: &[Event]) -> String {
    let end_us = events.iter().map(Event::end_us).max().unwrap_or(0).max(1);
    let mut picture = Picture::new(&title(events));
    let time = Axis { max: seconds(end_us), label: "time, s" };
    let fetched: u64 = events.iter().map(bytes).sum();
    let fetches = picture.plot(HEIGHT, &time, &Axis { max: mib(fetched), label: "fetched, MiB" });
    draw_fetches(&mut picture, &fetches, events);
    draw_reads(&mut picture, events, &time, end_us);
    let mut marks: Vec<(u64, &str)> = events.iter().filter_map(mark).collect();
    marks.sort_unstable();
    picture.moments(&fetches, marks.into_iter().map(|(at_us, name)| (seconds(at_us), name)));
    picture.finish()
}

/// What it came to.
fn title(events: &[Event]) -> String {
    let ready_us = events.iter().filter_map(mark).find(|(_, name)| *name == "ready").map(|(at_us, _)| at_us);
    let start = ready_us.map_or_else(|| "A start".to_owned(), |us| format!("Ready after {:.2} s", seconds(us)));
    let fetched: u64 = events.iter().map(bytes).sum();
    let stall_us: u64 = events.iter().map(stall_us).sum();
    format!("{start}: {:.1} MiB fetched, reads waited for {:.2} s in all", mib(fetched), seconds(stall_us))
}

fn draw_fetches(picture: &mut Picture, plot: &Plot, events: &[Event]) {
    let mut sorted: Vec<&Event> = events.iter().filter(|event| matches!(event, Event::Fetch { .. })).collect();
    sorted.sort_by_key(|event| (event.start_us(), event.end_us()));
    for (class, color, name) in CLASSES {
        let mut below = 0;
        let (mut waited, mut came) = (Vec::new(), Vec::new());
        for event in &sorted {
            let Event::Fetch { fetch, start_us, first_byte_us, end_us, bytes } = event else { continue };
            if *fetch == class {
                let (bottom, top) = (mib(below), mib(below + bytes));
                let first_us = first_byte_us.unwrap_or(*start_us);
                waited.push(((seconds(*start_us), bottom), (seconds(first_us), top)));
                came.push(((seconds(first_us), bottom), (seconds(*end_us), top)));
            }
            below += bytes;
        }
        if !came.is_empty() {
            picture.legend(color, name);
            let ink = Ink { color, opacity: 1.0, least: (2.0, 2.0) };
            picture.bars(plot, &Ink { opacity: PALE, ..ink }, waited.into_iter());
            picture.bars(plot, &ink, came.into_iter());
        }
    }
}

fn draw_reads(picture: &mut Picture, events: &[Event], time: &Axis<'_>, end_us: u64) {
    let mut counts = vec![[0u32; OUTCOMES.len()]; COLUMNS as usize];
    for event in events {
        if let Event::Read { read, at_us, .. } = event {
            let column = (at_us.saturating_mul(u64::from(COLUMNS)) / end_us).min(u64::from(COLUMNS) - 1);
            let outcome = OUTCOMES.iter().position(|(outcome, ..)| outcome == read).unwrap_or(0);
            counts[usize::try_from(column).unwrap_or(0)][outcome] += 1;
        }
    }
    let highest = counts.iter().map(|column| column.iter().sum::<u32>()).max().unwrap_or(0);
    let label = "first reads";
    let plot = picture.plot(LOWER_HEIGHT, time, &Axis { max: f64::from(highest), label });
    let width = time.max / f64::from(COLUMNS);
    for (number, (_, color, name)) in OUTCOMES.iter().enumerate() {
        let total: u32 = counts.iter().map(|column| column[number]).sum();
        picture.legend(color, &format!("{name}: {total}"));
        let bars = (0u32..).zip(&counts).filter(|(_, column)| column[number] > 0).map(|(at, column)| {
            let below: u32 = column[..number].iter().sum();
            let left = f64::from(at) * width;
            ((left, f64::from(below)), (left + width * 0.9, f64::from(below + column[number])))
        });
        picture.bars(&plot, &Ink { color, opacity: 1.0, least: (1.0, 0.0) }, bars);
    }
}

fn mark(event: &Event) -> Option<(u64, &str)> {
    match event {
        Event::Mark { mark, at_us } => Some((*at_us, mark)),
        _ => None,
    }
}

fn stall_us(event: &Event) -> u64 {
    match event {
        Event::Read { stall_us, .. } => *stall_us,
        _ => 0,
    }
}

fn bytes(event: &Event) -> u64 {
    match event {
        Event::Fetch { bytes, .. } => *bytes,
        _ => 0,
    }
}

#[expect(clippy::cast_precision_loss, reason = "for a picture")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
