//! Recorded starts, replayed over simulated links: how near the scheduler comes to the lower bound.
//!
//! Without a machine's noise: virtual time, a fluid link, the same policy code as in the driver. Every run is replayed
//! with the trace of the first. With `--wrong`, also with traces that do not fit, beside the same start without any.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::Value;
use ublkimg_bench::simulation::{Layout, Row, WrongRow, rows, wrong_rows};
use ublkimg_bench::traces::{Workload, read_directory};

#[derive(Parser)]
struct Arguments {
    /// Directory of recorded starts; bench/README.md says what it holds
    #[arg(long)]
    traces: PathBuf,
    /// Where the JSON goes
    #[arg(long)]
    out: PathBuf,
    /// Replay with wrong traces too, and write those rows here
    #[arg(long)]
    wrong: Option<PathBuf>,
    /// Fail if any start is further from its bound than promised
    #[arg(long)]
    check: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let workloads = read_directory(&arguments.traces)?;
    let mut kept = replay_all(&workloads, &arguments.out)?;
    if let Some(path) = &arguments.wrong {
        kept &= replay_wrong(&workloads, path)?;
    }
    if arguments.check && !kept {
        bail!("not all starts are as near to their bound as promised");
    }
    Ok(())
}

fn replay_all(workloads: &[Workload], path: &Path) -> Result<bool> {
    println!(
        "{:9} {:3} {:11} {:16} {:>8} {:>16} {:>16} {:>16} {:>16} {:>8} {:>9}",
        "workload",
        "run",
        "layout",
        "link",
        "bound s",
        "demand-only",
        "fifo-16",
        "ublkimg",
        "ublkimg cold",
        "requests",
        "MB",
    );
    let mut all = Vec::new();
    for workload in workloads {
        for layout in Layout::ALL {
            for run in &workload.runs {
                let rows = rows(workload, run, layout)?;
                rows.chunk_by(|a, b| a.link == b.link).for_each(print_line);
                all.extend(rows);
            }
        }
    }
    write_json(path, all.iter().map(Row::json).collect())?;
    let ours: Vec<&Row> = all.iter().filter(|row| row.policy == "ublkimg").collect();
    let worst = |estimator| {
        let ratios = ours.iter().filter(|row| row.estimator == estimator).map(|row| row.ratio());
        ratios.fold(0.0, f64::max)
    };
    let broken = ours.iter().filter(|row| !row.keeps_promise()).count();
    let duplicate_bytes: u64 = ours.iter().map(|row| row.outcome.duplicate_bytes).sum();
    println!(
        "ublkimg: at most {:.3} x the bound with the link known, {:.3} x with the estimator cold; \
         {broken} of {} starts past their promise; {duplicate_bytes} bytes twice",
        worst("known"),
        worst("cold"),
        ours.len(),
    );
    Ok(broken == 0 && duplicate_bytes == 0)
}

/// One link: the policies side by side, seconds and ratio to the bound; requests and bytes are ours.
fn print_line(rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    print!(
        "{:9} {:3} {:11} {:16} {:8.3}",
        first.workload,
        first.run,
        first.layout,
        first.link,
        first.bound.as_secs_f64()
    );
    for row in rows {
        let broken = row.policy == "ublkimg" && !row.keeps_promise();
        let mark = if broken { '!' } else { ' ' };
        print!(" {:8.3} {:5.2}x{mark}", row.outcome.ready.as_secs_f64(), row.ratio());
    }
    if let Some(ours) = rows.iter().find(|row| row.policy == "ublkimg") {
        print!(" {:8} {:9.1}", ours.outcome.requests, megabytes(ours.outcome.bytes));
    }
    println!();
}

fn replay_wrong(workloads: &[Workload], path: &Path) -> Result<bool> {
    println!(
        "\n{:9} {:11} {:16} {:5} {:8} {:>11} {:>10} {:>7} {:>9} {:>8}",
        "workload", "layout", "link", "link", "trace", "no trace s", "wrong s", "ratio", "wasted MB", "cap MB",
    );
    let mut all = Vec::new();
    for (index, workload) in workloads.iter().enumerate() {
        // The workload after it in the directory, or before the last.
        let other = workloads.get(index + 1).or_else(|| workloads.get(index.checked_sub(1)?)).unwrap_or(workload);
        for layout in Layout::ALL {
            let run = workload.runs.first().context("no runs")?;
            let rows = wrong_rows(workload, other, run, layout)?;
            rows.iter().for_each(print_wrong);
            all.extend(rows);
        }
    }
    write_json(path, all.iter().map(WrongRow::json).collect())?;
    let worst = all.iter().map(WrongRow::against_no_trace).fold(0.0, f64::max);
    let broken = all.iter().filter(|row| !row.keeps_promise()).count();
    println!("wrong traces: at most {worst:.3} x no trace; {broken} of {} past their promise", all.len());
    Ok(broken == 0)
}

fn print_wrong(wrong: &WrongRow) {
    let (row, outcome) = (&wrong.row, &wrong.row.outcome);
    println!(
        "{:9} {:11} {:16} {:5} {:8} {:11.3} {:10.3} {:6.2}x{} {:9.1} {:8.1}",
        row.workload,
        row.layout,
        row.link,
        row.estimator,
        wrong.trace,
        wrong.no_trace.ready.as_secs_f64(),
        outcome.ready.as_secs_f64(),
        wrong.against_no_trace(),
        if wrong.keeps_promise() { ' ' } else { '!' },
        megabytes(outcome.wasted_bytes),
        megabytes(wrong.cap_bytes),
    );
}

/// Of a million bytes, for people.
#[allow(clippy::cast_precision_loss)]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn write_json(path: &Path, rows: Vec<Value>) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    }
    let mut file = std::fs::File::create(path).with_context(|| path.display().to_string())?;
    serde_json::to_writer_pretty(&mut file, &Value::Array(rows))?;
    file.write_all(b"\n").with_context(|| path.display().to_string())
}
