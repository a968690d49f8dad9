//! `ublkimg report`: the start of a device as one HTML page, with its picture inside and nothing outside.

use std::fmt::Write as _;

use ublkimg_driver::error::Error;
use ublkimg_driver::start_events::{ReadOutcome, StartEvent};

use super::trace::plot;
use super::{events, status};
use crate::args::Global;
use crate::args::report::Report;
use crate::svg::escape;

/// Ends of the columns of the histogram, in microseconds; the last column is what took longer.
const BUCKETS_US: [u32; 8] = [100, 1_000, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000];
const BUCKET_NAMES: [&str; 9] = ["0.1 ms", "1 ms", "5 ms", "10 ms", "50 ms", "100 ms", "500 ms", "1 s", "longer"];

/// Readable on light and dark systems, without a script or a font of its own.
const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color-scheme:light dark}\
    table{border-collapse:collapse}td,th{padding:.15em 1em .15em 0;text-align:left;vertical-align:top;font-weight:400}\
    th{opacity:.7}.number{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}h2{margin-top:2em}";

pub(super) fn run(global: &Global, command: &Report) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let device = status::find(&directories, &command.target)?;
    let start = status::figures(&directories, &device.name)?;
    let events = events::of(&directories, &device.name)?;
    let picture = plot::of_events(events::lines(&events)?.as_bytes())?;
    let mut rows = status::device_rows(&device);
    rows.extend(status::start_rows(&start));
    let page = page(&device.reference, &rows, &events, &picture);
    let path = &command.output;
    Ok(std::fs::write(path, page).map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?)
}

fn page(title: &str, rows: &[(&str, String)], events: &[StartEvent], picture: &str) -> String {
    let title = escape(title);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>Start of {title}</title>\n<style>{STYLE}</style>\n<h1>Start of {title}</h1>\n{picture}"
    );
    page.push_str("<h2>How long first reads waited</h2>\n<table>\n<tr><th>at most");
    for name in BUCKET_NAMES {
        let _ = write!(page, "<th class=\"number\">{name}");
    }
    for (name, counts) in histogram(events) {
        let _ = write!(page, "\n<tr><th>{name}");
        for count in counts {
            let _ = write!(page, "<td class=\"number\">{count}");
        }
    }
    page.push_str("\n</table>\n<h2>Figures</h2>\n<table>\n");
    for (label, value) in rows {
        let _ = writeln!(page, "<tr><th>{}<td>{}", escape(label), escape(value));
    }
    page.push_str("</table>\n</html>\n");
    page
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
    fn reads_are_counted_where_they_belong_and_names_cannot_break_the_page() {
        let read = |read, stall_us| StartEvent::Read { read, at_us: 0, blocks: 1, stall_us };
        let events = [
            read(ReadOutcome::Hit, 0),
            read(ReadOutcome::LateHit, 100),
            read(ReadOutcome::LateHit, 101),
            read(ReadOutcome::Miss, 5_000_000),
        ];
        let rows = histogram(&events);
        assert_eq!((rows[0].1[0], rows[1].1[0], rows[1].1[1], rows[2].1[8]), (1, 1, 1, 1));
        let page = page("r/<x>", &[("name", "<script>".to_owned())], &events, "<svg></svg>");
        assert!(page.contains("Start of r/&lt;x&gt;</title>") && !page.contains("<script>"), "{page}");
        for outside in ["http:", "https:", "src=", "href="] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
