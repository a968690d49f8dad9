//! What a conversion costs beside `tar | zstd -3` of the same tree: time, processor time, peak memory, stored bytes.
//!
//! Both read the same files from the page cache and write to the same disk; arms alternate within a round, so that a slow
//! moment of the machine hits all of them. Peak memory and processor time are the kernel's own counts (`VmHWM`, `stat`),
//! read while the program runs, every few milliseconds: what happens after the last look is not in them.

mod layers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use serde::Serialize;
use ublkimg_bench::median;

/// Time between two looks at a program.
const LOOK: Duration = Duration::from_millis(5);
/// Ticks of processor time a second: fixed for programs (`USER_HZ`).
const TICKS_PER_S: f64 = 100.0;

#[derive(Parser)]
struct Arguments {
    /// Directory to pack and to convert; `make bench-convert` prepares one
    #[arg(long)]
    tree: PathBuf,
    /// The program
    #[arg(long)]
    program: PathBuf,
    /// zstd levels to convert with
    #[arg(long, value_delimiter = ',', default_value = "3")]
    levels: Vec<i32>,
    /// Sizes of chunks to convert with
    #[arg(long, value_delimiter = ',', default_value = "256K")]
    chunk_sizes: Vec<String>,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Converts an image of so many zstd layers of the tree, too
    #[arg(long)]
    layers: Option<usize>,
    /// Where temporary files and what comes out go
    #[arg(long, default_value = "target/bench")]
    directory: PathBuf,
    /// Where the JSON goes
    #[arg(long, default_value = "target/bench/convert.json")]
    json: PathBuf,
}

/// One way to pack, and its figures by round.
#[derive(Serialize)]
struct Arm {
    name: String,
    /// What is converted, and the options; none packs the tree otherwise.
    #[serde(skip)]
    source: Option<(String, Vec<String>)>,
    wall_s: Vec<f64>,
    cpu_s: Vec<f64>,
    peak_mb: Vec<f64>,
    stored_mb: Vec<f64>,
}

/// What a program took.
#[derive(Default)]
struct Usage {
    cpu_s: f64,
    peak_mb: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let work = arguments.directory.join("convert");
    fs::create_dir_all(&work)?;
    let (files, bytes) = count(&arguments.tree)?;
    println!("{}: {files} files, {:.1} MB", arguments.tree.display(), mb(bytes));
    let mut sources = vec![(String::new(), format!("dir:{}", arguments.tree.display()))];
    if let Some(count) = arguments.layers {
        let image = work.join("image");
        let _ = fs::remove_dir_all(&image);
        layers::pack(&arguments.tree, count, &image)?;
        sources.push((format!(", {count} layers"), format!("oci:{}:bench", image.display())));
    }
    let mut arms = vec![Arm::new("tar, zstd -3".to_owned(), None)];
    for (of, source) in &sources {
        for (level, size) in
            arguments.levels.iter().flat_map(|level| arguments.chunk_sizes.iter().map(move |size| (level, size)))
        {
            let options = ["--level", &level.to_string(), "--chunk-size", size].map(str::to_owned).to_vec();
            let name = format!("ublkimg convert {}{of}", options.join(" "));
            arms.push(Arm::new(name, Some((source.clone(), options))));
        }
    }
    for _ in 0..arguments.rounds {
        for arm in &mut arms {
            arm.round(&arguments, &work)?;
        }
    }
    print(&arms);
    fs::write(&arguments.json, serde_json::to_vec_pretty(&arms)?)?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

impl Arm {
    fn new(name: String, source: Option<(String, Vec<String>)>) -> Self {
        Self { name, source, wall_s: Vec::new(), cpu_s: Vec::new(), peak_mb: Vec::new(), stored_mb: Vec::new() }
    }

    fn round(&mut self, arguments: &Arguments, work: &Path) -> Result<()> {
        let out = work.join("out");
        let _ = fs::remove_dir_all(&out);
        fs::create_dir(&out)?;
        let began = Instant::now();
        let usage = match &self.source {
            None => {
                let mut tar = Command::new("tar")
                    .arg("-C")
                    .arg(&arguments.tree)
                    .args(["-c", "."])
                    .stdout(Stdio::piped())
                    .spawn()?;
                let packed = tar.stdout.take().context("tar has no output")?;
                let zstd =
                    Command::new("zstd").args(["-q", "-3", "-o"]).arg(out.join("tar.zst")).stdin(packed).spawn()?;
                watch(vec![tar, zstd])?
            }
            Some((source, options)) => {
                let convert = Command::new(&arguments.program)
                    .args(["convert", "--no-cache"])
                    .args(options)
                    .arg("--tmpdir")
                    .arg(work)
                    .arg(source)
                    .arg(format!("oci:{}:bench", out.join("layout").display()))
                    .stdout(Stdio::null())
                    .spawn()
                    .with_context(|| arguments.program.display().to_string())?;
                watch(vec![convert])?
            }
        };
        self.wall_s.push(began.elapsed().as_secs_f64());
        self.cpu_s.push(usage.cpu_s);
        self.peak_mb.push(usage.peak_mb);
        self.stored_mb.push(mb(count(&out)?.1));
        Ok(())
    }
}

/// Waits for all of them; memory is that of the largest, processor time that of all.
fn watch(programs: Vec<Child>) -> Result<Usage> {
    let mut usage = Usage::default();
    let mut running: Vec<(Child, Usage)> = programs.into_iter().map(|child| (child, Usage::default())).collect();
    while !running.is_empty() {
        let mut still = Vec::new();
        for (mut child, mut last) in running {
            if let Some(now) = look(child.id()) {
                last = now;
            }
            match child.try_wait()? {
                None => still.push((child, last)),
                Some(status) => {
                    ensure!(status.success(), "a program ended with {status}");
                    usage.cpu_s += last.cpu_s;
                    usage.peak_mb = usage.peak_mb.max(last.peak_mb);
                }
            }
        }
        running = still;
        std::thread::sleep(LOOK);
    }
    Ok(usage)
}

/// What the kernel knows of a program that runs; `None` once it has ended.
fn look(pid: u32) -> Option<Usage> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let peak_kib: f64 = peak.trim().strip_suffix("kB")?.trim().parse().ok()?;
    // proc(5): the name ends with the last parenthesis; utime and stime are fields 14 and 15.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks: [f64; 2] = [fields.next()?.parse().ok()?, fields.next()?.parse().ok()?];
    Some(Usage { cpu_s: (ticks[0] + ticks[1]) / TICKS_PER_S, peak_mb: peak_kib * 1024.0 / 1e6 })
}

fn print(arms: &[Arm]) {
    println!("| | wall s | processor s | cores busy | peak MB | stored MB | wall ratio | stored ratio |");
    println!("|---|---|---|---|---|---|---|---|");
    let base = &arms[0];
    for arm in arms {
        let [wall, cpu, peak, stored] =
            [&arm.wall_s, &arm.cpu_s, &arm.peak_mb, &arm.stored_mb].map(|values| median(values));
        let ratio = |of: fn(&Arm) -> &Vec<f64>| median(of(arm)) / median(of(base));
        println!(
            "| {} | {wall:.2} | {cpu:.2} | {:.2} | {peak:.1} | {stored:.1} | {:.2} | {:.3} |",
            arm.name,
            cpu / wall,
            ratio(|arm| &arm.wall_s),
            ratio(|arm| &arm.stored_mb)
        );
    }
}

/// Number and length of the files below `directory`.
fn count(directory: &Path) -> Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0);
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            let metadata = path.symlink_metadata()?;
            if metadata.is_dir() {
                todo.push(path);
            } else if metadata.is_file() {
                files += 1;
                bytes += metadata.len();
            }
        }
    }
    Ok((files, bytes))
}

#[expect(clippy::cast_precision_loss, reason = "far from 2^53")]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
