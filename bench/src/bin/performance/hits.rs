//! Reads of what is here: against a target that does nothing, a loop device, and file-backed EROFS.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::machine::{Host, Loop, Machine, Mounted, NullTarget, export, run};
use crate::rows::{Bar, Row};

const BLOCK_BYTES: u64 = 4096;
const SEQUENTIAL_BYTES: u64 = 128 << 10;
/// Random reads of a round.
const READS: u64 = 20_000;
/// So much of a device is read sequentially in a round.
const SEQUENTIAL_SPAN_BYTES: u64 = 256 << 20;

/// The image with the tree, attached and whole, and the same bytes in a file.
struct Whole {
    host: Host,
    device: std::path::PathBuf,
    exported: std::path::PathBuf,
    size_bytes: u64,
}

impl Whole {
    fn new(machine: &Machine, options: &[&str]) -> Result<Self> {
        let (by_tag, _) = machine.load("tree")?;
        let host = machine.host("hits")?;
        let device = host.add_full(&by_tag, "tree", options)?;
        let exported = machine.work.join("tree.erofs");
        let size_bytes = export(&device, &exported)?;
        Ok(Self { host, device, exported, size_bytes })
    }
}

/// All of them; `options` of `add`.
pub(crate) fn measure(machine: &Machine, options: &[&str]) -> Result<Vec<Row>> {
    let whole = Whole::new(machine, options)?;
    let mut rows = vec![random(machine, &whole)?];
    rows.extend(sequential(machine, &whole)?);
    rows.extend(tree(machine, &whole)?);
    std::fs::remove_file(&whole.exported)?;
    Ok(rows)
}

fn random(machine: &Machine, whole: &Whole) -> Result<Row> {
    let null = NullTarget::new(&machine.bin, whole.size_bytes)?;
    let (mut ours, mut nothing) = (Vec::new(), Vec::new());
    for round in 0..=machine.rounds {
        let pair = (random_reads(&whole.device)?, random_reads(&null.device)?);
        // The first brings code and tables into the processor's caches.
        if round > 0 {
            ours.push(pair.0);
            nothing.push(pair.1);
        }
    }
    let what = "4 KiB random reads, depth 1: latency ÷ null target's";
    Ok(Row::ratio(what, "µs", Bar::AtMost(1.7), ("ours", ours), ("null target", nothing)))
}

/// Mean time of a read, in µs.
fn random_reads(device: &Path) -> Result<f64> {
    let (device, size_bytes) = open_direct(device)?;
    let mut buffer = Aligned::new(BLOCK_BYTES);
    let mut state = 88_172_645_463_325_252_u64;
    let began = Instant::now();
    for _ in 0..READS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        device.read_exact_at(buffer.bytes(), state % (size_bytes / BLOCK_BYTES) * BLOCK_BYTES)?;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(u32::try_from(READS)?))
}

fn sequential(machine: &Machine, whole: &Whole) -> Result<Vec<Row>> {
    let file = Loop::new(&whole.exported)?;
    let mut rows = Vec::new();
    // With automatic buffer registration 0.75 is asked for, else 0.6.
    let bar = if is_zero_copy(&whole.host)? { 0.75 } else { 0.6 };
    for (depth, bar) in [(4, Bar::AtLeast(bar)), (1, Bar::None)] {
        let (mut ours, mut looped) = (Vec::new(), Vec::new());
        for _ in 0..machine.rounds {
            ours.push(sequential_reads(&whole.device, depth)?);
            looped.push(sequential_reads(&file.0, depth)?);
        }
        let what = format!("128 KiB sequential reads, depth {depth}: rate ÷ loop device's");
        rows.push(Row::ratio(&what, "MB/s", bar, ("ours", ours), ("loop", looped)));
    }
    Ok(rows)
}

/// How the device's data gets into requests, as `status` says.
fn is_zero_copy(host: &Host) -> Result<bool> {
    let status: Value = host.ublkimg.status("tree")?;
    Ok(status["device"]["data_path"] == "zero-copy" || status["data_path"] == "zero-copy")
}

/// Reads a device once from start to end, so many requests at a time; MB/s.
fn sequential_reads(device: &Path, depth: u32) -> Result<f64> {
    let (device, size_bytes) = open_direct(device)?;
    let size_bytes = size_bytes.min(SEQUENTIAL_SPAN_BYTES);
    let next = AtomicU64::new(0);
    let began = Instant::now();
    let read = || -> Result<()> {
        let mut buffer = Aligned::new(SEQUENTIAL_BYTES);
        loop {
            let at = next.fetch_add(SEQUENTIAL_BYTES, Ordering::Relaxed);
            if at + SEQUENTIAL_BYTES > size_bytes {
                return Ok(());
            }
            device.read_exact_at(buffer.bytes(), at)?;
        }
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..depth).map(|_| scope.spawn(read)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a panic"))))
    })?;
    #[expect(clippy::cast_precision_loss, reason = "a figure of three digits")]
    Ok(size_bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

fn tree(machine: &Machine, whole: &Whole) -> Result<Vec<Row>> {
    let (mut ours, mut file_backed, mut looped) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..machine.rounds {
        ours.push(tar(&whole.host.mounted("tree"))?);
        let file = Mounted::new(&whole.exported, machine.work.join("file-backed"))?;
        file_backed.push(tar(&file.0)?);
        drop(file);
        let device = Loop::new(&whole.exported)?;
        let on_loop = Mounted::new(&device.0, machine.work.join("on-loop"))?;
        looped.push(tar(&on_loop.0)?);
    }
    let what = "tar of the tree, store full, page cache cold: time ÷ file-backed EROFS's";
    let of_loop = Row::ratio(
        "the same on a loop device: time ÷ file-backed EROFS's",
        "s",
        Bar::None,
        ("loop", looped),
        ("file-backed", file_backed.clone()),
    );
    Ok(vec![Row::ratio(what, "s", Bar::AtMost(1.2), ("ours", ours), ("file-backed", file_backed)), of_loop])
}

/// Seconds that tar takes to read a tree. Written to /dev/null it would not read.
fn tar(directory: &Path) -> Result<f64> {
    Machine::drop_caches()?;
    let began = Instant::now();
    run("tar", &["-C", directory.to_str().context("a path that is not UTF-8")?, "-cf", "/dev/zero", "."])?;
    Ok(began.elapsed().as_secs_f64())
}

fn open_direct(device: &Path) -> Result<(File, u64)> {
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
    let mut file = File::options().read(true).custom_flags(direct).open(device)?;
    let size_bytes = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
    ensure!(size_bytes >= SEQUENTIAL_BYTES, "{} is too small", device.display());
    Ok((file, size_bytes))
}

/// A buffer as O_DIRECT wants it.
struct Aligned {
    storage: Vec<u8>,
    len_bytes: usize,
}

impl Aligned {
    fn new(len_bytes: u64) -> Self {
        let len_bytes = usize::try_from(len_bytes).unwrap_or(0);
        Self { storage: vec![0; len_bytes + 4096], len_bytes }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.storage.as_ptr().align_offset(4096);
        &mut self.storage[start..start + self.len_bytes]
    }
}
