//! `ublkimg compare`: one command of an image, started after a full pull, lazily, and with a profile.
//!
//! Each start begins on a host that has nothing of the image: an empty directory or an empty store with a daemon of its own,
//! and no page cache. The clock runs from the first request to the registry until the command is ready. What stays between
//! starts is what a host has anyway: the programs, and a daemon that runs.

mod host;
mod page;
mod sample;
mod starts;

use serde::Serialize;
use ublkimg_driver::daemon::protocol::ProfileRequest;

use super::trial::Interrupt;
use super::{add, report};
use crate::args::Global;
use crate::args::compare::Compare;
use crate::output;
use sample::{Arm, Sample, Summary};
use starts::Starts;

/// All starts, and what they took.
#[derive(Serialize)]
struct Comparison {
    reference: String,
    command: Vec<String>,
    rounds: u32,
    starts: Vec<Arm>,
}

pub(super) fn run(global: &Global, command: &Compare) -> anyhow::Result<()> {
    let interrupt = Interrupt::watch()?;
    let outcome = compare(global, command, &interrupt);
    interrupt.end_if_set("the comparison");
    let comparison = outcome?;
    if let Some(path) = &command.output {
        report::write(path, page::page(&comparison)?)?;
    }
    if command.json {
        return output::json(&comparison);
    }
    print(&comparison)
}

fn compare(global: &Global, command: &Compare, interrupt: &Interrupt) -> anyhow::Result<Comparison> {
    let starts = Starts::new(global, command, interrupt)?;
    let mut profile = match add::profile(&command.profile)? {
        ProfileRequest::None => None,
        wanted => Some(wanted),
    };
    let [mut pulled, mut lazy, mut followed] = [const { Vec::<Sample>::new() }; 3];
    for round in 1..=command.rounds.get() {
        eprintln!("round {round} of {}", command.rounds);
        pulled.push(starts.full_pull()?);
        lazy.push(starts.lazy(&ProfileRequest::None)?);
        if round == 1
            && let Some(wanted) = &profile
        {
            profile = Some(starts.profile(wanted)?);
        }
        if let Some(profile) = &profile {
            followed.push(starts.lazy(profile)?);
        }
    }
    let arms = [("full pull", pulled), ("lazy", lazy), ("with profile", followed)];
    Ok(Comparison {
        reference: command.reference.clone(),
        command: starts.command(),
        rounds: command.rounds.get(),
        starts: arms.into_iter().filter_map(|(name, samples)| Arm::new(name, samples)).collect(),
    })
}

/// The columns of the table, on the terminal and on the page.
const HEADER: [&str; 9] =
    ["start", "ready", "least..most", "root there", "command", "fetched", "hits", "late hits", "misses"];

fn cells(summary: &Summary) -> [String; 8] {
    let reads = summary.first_reads.map_or([const { String::new() }; 3], |reads| {
        [reads.hits, reads.late_hits, reads.misses].map(|count| count.to_string())
    });
    let [hits, late_hits, misses] = reads;
    [
        seconds(summary.ready_us),
        format!("{}..{}", seconds(summary.least_us), seconds(summary.most_us)),
        seconds(summary.root_us),
        seconds(summary.ready_us.saturating_sub(summary.root_us)),
        output::bytes(summary.fetched_bytes),
        hits,
        late_hits,
        misses,
    ]
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds are shown")]
fn seconds(us: u64) -> String {
    format!("{:.3} s", us as f64 / 1e6)
}

fn print(comparison: &Comparison) -> anyhow::Result<()> {
    let rows: Vec<[String; 9]> = comparison
        .starts
        .iter()
        .map(|arm| {
            let [ready, range, root, command, fetched, hits, late_hits, misses] = cells(&arm.median);
            [arm.name.to_owned(), ready, range, root, command, fetched, hits, late_hits, misses]
        })
        .collect();
    output::table(HEADER, &rows)?;
    output::line(&format!("\n{}", verdict(comparison)))
}

/// What the table says, in one sentence.
#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn verdict(comparison: &Comparison) -> String {
    let Some((pull, others)) = comparison.starts.split_first() else { return String::new() };
    let than_pull = others.iter().map(|arm| {
        let times = pull.median.ready_us as f64 / arm.median.ready_us.max(1) as f64;
        format!(
            "{} is ready in {}, {times:.1} times as fast as after a full pull",
            arm.name,
            seconds(arm.median.ready_us)
        )
    });
    format!("{}; medians of {}.", than_pull.collect::<Vec<_>>().join("; "), comparison.rounds)
}
