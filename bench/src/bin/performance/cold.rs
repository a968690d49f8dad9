//! Reads of what is not here: a small file, and a large one from start to end.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use ublkimg_image::Sha256;
use ublkimg_tests::registry::LinkConfig;
use ublkimg_tests::sample_image::noise;

use crate::machine::Machine;
use crate::rows::{Bar, Row};

const RATE_MBIT_PER_S: u64 = 1000;
const ROUND_TRIP_MS: u64 = 2;
/// Raw bytes of a chunk, and chunks that are decoded to find out how fast that is.
const CHUNK_BYTES: usize = 256 << 10;
const CHUNKS: u32 = 256;
/// The large file.
const FILE_MB: f64 = 1_073.741_824;
/// A file of about 1 KB has so many bytes.
const SMALL: std::ops::RangeInclusive<u64> = 900..=1100;

pub(crate) fn small(machine: &Machine, options: &[&str]) -> Result<Vec<Row>> {
    let (by_tag, _) = machine.load("tree")?;
    let (mut requests, mut kilobytes) = (Vec::new(), Vec::new());
    for round in 0..machine.rounds {
        let host = machine.host("cold")?;
        host.add(&by_tag, "tree", options)?;
        let mut files = Vec::new();
        small_files(&host.mounted("tree"), &mut files)?;
        ensure!(files.len() >= machine.rounds, "the tree has {} files of about 1 KB", files.len());
        let file = &files[round * files.len() / machine.rounds];
        Machine::drop_caches()?;
        machine.registry.reset_stats();
        std::fs::read(file)?;
        let stats = machine.registry.stats();
        requests.push(f64::from(u32::try_from(stats.requests.values().sum::<u64>())?));
        kilobytes.push(f64::from(u32::try_from(stats.bytes_sent)?) / 1e3);
    }
    Ok(vec![
        Row::of("a file of 1 KB, cold, without a profile: requests", requests, Bar::AtMost(1.0)),
        Row::of("a file of 1 KB, cold, without a profile: KB on the wire", kilobytes, Bar::AtMost(150.0)),
    ])
}

/// Every file below a directory that is small.
fn small_files(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries = std::fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() {
            small_files(&entry.path(), found)?;
        } else if kind.is_file() && SMALL.contains(&entry.metadata()?.len()) {
            found.push(entry.path());
        }
    }
    Ok(())
}

pub(crate) fn sequential(machine: &Machine, options: &[&str]) -> Result<Vec<Row>> {
    let (by_tag, _) = machine.load("gigabyte")?;
    let (mut shaped, mut unshaped, mut decode) = (Vec::new(), Vec::new(), Vec::new());
    let (mut machine_s, mut own_s, mut server_s) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..machine.rounds.min(3) {
        for (link, rates) in
            [(LinkConfig::new(RATE_MBIT_PER_S, ROUND_TRIP_MS / 2), &mut shaped), (LinkConfig::default(), &mut unshaped)]
        {
            let host = machine.host("cold")?;
            host.add(&by_tag, "gigabyte", options)?;
            machine.registry.set_link(link);
            let before = (busy_ms()?, process_ms("self")?, server_ms(&host)?);
            let rate = read_through(&host.mounted("gigabyte").join("data"))?;
            rates.push(rate);
            machine.registry.set_link(LinkConfig::default());
            if link.rate_bits_per_s > 0 {
                machine_s.push((busy_ms()? - before.0) / 1e3);
                own_s.push((process_ms("self")? - before.1) / 1e3);
                server_s.push((server_ms(&host)? - before.2) / 1e3);
                decode.push(decode_mb_per_s()?);
            }
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let of_link: Vec<f64> = shaped.iter().map(|rate| rate / (RATE_MBIT_PER_S as f64 / 8.0)).collect();
    // On one processor the reader waits while the registry runs.
    let without = |(rate, own_s): (&f64, &f64)| FILE_MB / (FILE_MB / rate - own_s);
    let without_registry = shaped.iter().zip(&own_s).map(without).collect();
    Ok(vec![
        Row::of("a file of 1 GB from start to end, cold, 1 Gbit/s: share of the link", of_link, Bar::AtLeast(0.9))
            .with("rate", "MB/s", shaped)
            .with("no limit on the link", "MB/s", unshaped)
            .with("one thread verifies and decodes", "MB/s", decode)
            .with("rate without the registry's processor time", "MB/s", without_registry)
            .with("busy: machine", "s", machine_s)
            .with("registry", "s", own_s)
            .with("daemon", "s", server_s),
    ])
}

/// Reads a file from start to end; MB/s.
fn read_through(path: &Path) -> Result<f64> {
    Machine::drop_caches()?;
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut buffer = vec![0; 1 << 20];
    let (mut bytes, began) = (0_u64, Instant::now());
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => bytes += read as u64,
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a figure of three digits")]
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// The rate at which one thread here checks and decodes chunks of such a file.
fn decode_mb_per_s() -> Result<f64> {
    let raw = noise(1, CHUNK_BYTES);
    let stored = zstd::bulk::compress(&raw, 3)?;
    let (digest, began) = (Sha256::of(&stored), Instant::now());
    for _ in 0..CHUNKS {
        ensure!(Sha256::of(&stored) == digest, "a digest that differs");
        ensure!(zstd::bulk::decompress(&stored, CHUNK_BYTES)?.len() == CHUNK_BYTES, "a chunk that differs");
    }
    Ok(f64::from(CHUNKS) * 0.262_144 / began.elapsed().as_secs_f64())
}

fn server_ms(host: &crate::machine::Host) -> Result<f64> {
    host.processes()?.iter().map(|pid| process_ms(&pid.to_string())).sum()
}

/// Processor time of a process.
fn process_ms(pid: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(") ").context("a process without a name")?;
    let ticks: u32 = fields.split_whitespace().skip(11).take(2).map(|field| field.parse().unwrap_or(0)).sum();
    Ok(f64::from(ticks) * 10.0)
}

/// Processor time of the machine, without idling.
fn busy_ms() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let fields: Vec<u64> = text.split_whitespace().skip(1).take(8).map(|field| field.parse().unwrap_or(0)).collect();
    ensure!(fields.len() == 8, "/proc/stat is short");
    // user, nice, system, idle, iowait, irq, softirq, steal
    let ticks = [0, 1, 2, 5, 6].into_iter().map(|field| fields[field]).sum::<u64>();
    #[expect(clippy::cast_precision_loss, reason = "a figure of three digits")]
    Ok(ticks as f64 * 10.0)
}
