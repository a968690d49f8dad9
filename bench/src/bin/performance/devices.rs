//! What many idle devices cost, and the error for one too many.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::machine::{Host, Machine};
use crate::rows::{Bar, Row};

/// The most there can be.
const DEVICES: u32 = 64;
const IDLE: Duration = Duration::from_secs(60);
/// A first run is recorded until nothing new was read for 30 s; connections that nobody uses are closed after 90 s.
const SETTLED: Duration = Duration::from_secs(110);

pub(crate) fn measure(machine: &Machine, options: &[&str]) -> Result<Vec<Row>> {
    let (by_tag, _) = machine.load("sample")?;
    let host = machine.host("devices")?;
    let read = |number: u32| -> Result<()> {
        let name = format!("d{number}");
        let device = host.add(&by_tag, &name, options)?;
        // A device that was never read from would have touched nothing.
        std::io::copy(&mut std::fs::File::open(device)?, &mut std::io::sink())?;
        Ok(())
    };
    read(1)?;
    let first = Spent::of(&host)?;
    for number in 2..=DEVICES {
        read(number)?;
    }
    // What was read goes, what serves stays; buffers that are no longer used are given back, and recordings and connections end.
    std::thread::sleep(SETTLED);
    Machine::drop_caches()?;
    let all = Spent::of(&host)?;
    std::thread::sleep(IDLE);
    let idle = Spent::of(&host)?;
    let error = one_too_many(&host, &by_tag)?;
    let beyond = f64::from(DEVICES - 1);
    let mib = |bytes: u64| f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) / 1024.0;
    let of_each = mib(all.memory_bytes.saturating_sub(first.memory_bytes)) / beyond;
    let row = Row::of(
        format!("{DEVICES} idle devices: MiB of the daemon for each beyond the first"),
        vec![of_each],
        Bar::AtMost(4.0),
    );
    let row = row.with("the first", "MiB", vec![mib(first.memory_bytes)]);
    let ticks = f64::from(u32::try_from(idle.ticks - all.ticks)?);
    let wakes = idle.wakes_since(&all);
    println!("threads that woke up in a minute: {wakes:?}");
    let wakes = f64::from(u32::try_from(wakes.values().sum::<u64>())?);
    println!("one device too many: {error}");
    Ok(vec![
        row,
        Row::of("64 idle devices: processor ms in a minute", vec![ticks * 10.0], Bar::AtMost(10.0)).with(
            "times that a thread of the daemon woke up",
            "",
            vec![wakes],
        ),
    ])
}

/// What the daemon's processes have taken.
struct Spent {
    memory_bytes: u64,
    /// Hundredths of a second.
    ticks: u64,
    /// Of each thread, with its name.
    wakes: BTreeMap<u64, (String, u64)>,
}

impl Spent {
    /// By names of threads, without numbers. Those of threads that have ended meanwhile are lost.
    fn wakes_since(&self, earlier: &Self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for (thread, (name, wakes)) in &self.wakes {
            let before = earlier.wakes.get(thread).map_or(0, |(_, wakes)| *wakes);
            if *wakes > before {
                *all.entry(name.trim_end_matches(|letter: char| letter.is_ascii_digit()).to_owned()).or_default() +=
                    wakes - before;
            }
        }
        all
    }

    fn of(host: &Host) -> Result<Self> {
        let mut spent = Self { memory_bytes: 0, ticks: 0, wakes: BTreeMap::new() };
        for pid in host.processes()? {
            let dir = Path::new("/proc").join(pid.to_string());
            let line = |file: &str, name: &str| -> Result<u64> {
                let text = std::fs::read_to_string(dir.join(file))?;
                let line = text.lines().find_map(|line| line.strip_prefix(name));
                let word =
                    line.and_then(|line| line.split_whitespace().next()).with_context(|| format!("no {name}"))?;
                Ok(word.parse()?)
            };
            spent.memory_bytes += line("smaps_rollup", "Pss:")? << 10;
            let stat = std::fs::read_to_string(dir.join("stat"))?;
            let (_, fields) = stat.rsplit_once(") ").context("a process without a name")?;
            for field in fields.split_whitespace().skip(11).take(2) {
                spent.ticks += field.parse::<u64>()?;
            }
            for task in std::fs::read_dir(dir.join("task"))? {
                let task = task?;
                let thread = task.file_name().to_string_lossy().parse()?;
                let status = std::fs::read_to_string(task.path().join("status"))?;
                let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
                let name =
                    status.lines().find_map(|line| line.strip_prefix("Name:")).unwrap_or_default().trim().to_owned();
                spent.wakes.insert(thread, (name, line.context("no switches")?.trim().parse()?));
            }
        }
        Ok(spent)
    }
}

/// What `add` says when there are as many devices as there can be.
fn one_too_many(host: &Host, reference: &str) -> Result<String> {
    let output = std::process::Command::new(&host.ublkimg.program)
        .arg("--root")
        .arg(&host.ublkimg.root)
        .arg("--run-dir")
        .arg(&host.ublkimg.run_dir)
        .args(["add", reference, "--name", "too-many", "--transport", "ublk"])
        .stdin(Stdio::null())
        .output()?;
    ensure!(output.status.code() == Some(9), "one device too many ended with {}", output.status);
    Ok(String::from_utf8_lossy(&output.stderr).trim_end().to_owned())
}
