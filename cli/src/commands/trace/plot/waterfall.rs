//! A finished start: above, every fetch as a bar from its request to its last byte, as high as it has bytes, one above the
//! other; below, how the first reads went.

use super::events::{Class, Event, Outcome};
use super::{HEIGHT, LOWER_HEIGHT, seconds};
use crate::svg::{Axis, Picture, Plot};

/// Classes of fetches in the order of the legend.
const CLASSES: [(Class, &str, &str); 6] = [
    (Class::Attach, "#2f8f8f", "to attach"),
    (Class::Demand, "#c2410c", "fetched on demand"),
    (Class::Trace, "#2563ad", "by trace"),
    (Class::ReadAhead, "#7c5cbf", "read-ahead"),
    (Class::Fill, "#9a9a9a", "fill"),
    (Class::Other, "#555555", "other"),
];

/// Outcomes of first reads, in the order in which they are stacked.
const OUTCOMES: [(Outcome, &str, &str); 3] =
    [(Outcome::Hit, "#3f9142", "hit"), (Outcome::LateHit, "#e0a100", "late hit"), (Outcome::Miss, "#b91c1c", "miss")];

/// Columns of the lower plot.
const COLUMNS: u32 = 130;

pub(super) fn draw(events: &[Event]) -> String {
    let end_us = events.iter().map(Event::end_us).max().unwrap_or(0).max(1);
    let mut picture = Picture::new("A start: fetches and first reads");
    let time = Axis { max: seconds(end_us), label: "time, s" };
    let fetched: u64 = events.iter().map(bytes).sum();
    let fetches = picture.plot(HEIGHT, &time, &Axis { max: mib(fetched), label: "fetched, MiB" });
    draw_fetches(&mut picture, &fetches, events);
    draw_reads(&mut picture, events, &time, end_us);
    for (mark, at_us) in events.iter().filter_map(|event| match event {
        Event::Mark { mark, at_us } => Some((mark, *at_us)),
        _ => None,
    }) {
        picture.moment(&fetches, seconds(at_us), mark);
    }
    picture.finish()
}

fn draw_fetches(picture: &mut Picture, plot: &Plot, events: &[Event]) {
    let mut sorted: Vec<(Class, u64, u64, u64)> = events
        .iter()
        .filter_map(|event| match event {
            Event::Fetch { fetch, start_us, end_us, bytes, .. } => Some((*fetch, *start_us, *end_us, *bytes)),
            _ => None,
        })
        .collect();
    sorted.sort_by_key(|(_, start_us, end_us, _)| (*start_us, *end_us));
    for (class, color, name) in CLASSES {
        let mut below = 0;
        let mut bars = Vec::new();
        for (own, start_us, end_us, bytes) in &sorted {
            if *own == class {
                bars.push(((seconds(*start_us), mib(below)), (seconds(*end_us), mib(below + bytes))));
            }
            below += bytes;
        }
        if !bars.is_empty() {
            picture.legend(color, name);
            picture.bars(plot, color, 1.0, bars.into_iter());
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
        picture.bars(&plot, color, 0.0, bars);
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
