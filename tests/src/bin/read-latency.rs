//! How long reads of cached blocks take while many other reads of the same device wait for the registry, compared with the
//! same reads on an idle device. Reads with O_DIRECT, so each is a request to the device.
//!
//! Prints one line; exit code 1 when the 99th percentile grew by more than the limit, 2 for bad usage or a
//! measurement that was none (nothing was pending, or a read failed).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

/// The unit of the device and the alignment that O_DIRECT wants.
const BLOCK_BYTES: usize = 4096;

/// Stored data is cut at this grain, so reads this far apart miss separately.
const CHUNK_BYTES: u64 = 256 * 1024;

/// Reads per window, see [`Percentiles`]: enough for a 99th percentile.
const WINDOW_READS: usize = 200;

/// Measures cached reads of a device, idle and with misses pending.
#[derive(Parser)]
struct Arguments {
    /// The device
    device: PathBuf,
    /// So much from the device's start is read first, and is what the measured reads hit
    #[arg(long, default_value_t = 2)]
    warm_mib: u64,
    /// Where the reads that miss begin: beyond what read-ahead may have fetched already
    #[arg(long, default_value_t = 5)]
    first_miss_mib: u64,
    /// Reads that must wait for the registry during the measurement; an eighth more are sent, as some may find their
    /// chunk here
    #[arg(long, default_value_t = 64)]
    misses: u64,
    /// Measured reads per round
    #[arg(long, default_value_t = 2000)]
    reads: usize,
    /// How often p99 with misses may exceed the idle p99
    #[arg(long, default_value_t = 2.0)]
    limit: f64,
    /// The registry's answers take this long: a measurement ends before
    #[arg(long, default_value_t = 1000)]
    answer_ms: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("read-latency: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let device = Device::open(arguments)?;
    let (warm_bytes, first_miss) = (arguments.warm_mib << 20, arguments.first_miss_mib << 20);
    let readers = arguments.misses + arguments.misses / 8;
    ensure!(device.size_bytes > first_miss + readers * CHUNK_BYTES, "the device is too small");
    let mut buffer = AlignedBlock::new();
    for block in 0..warm_bytes / BLOCK_BYTES as u64 {
        device.read(block * BLOCK_BYTES as u64, &mut buffer)?;
    }
    // A tail needs many samples: the first pass also brings code and tables into the processor's caches.
    device.latencies(warm_bytes, arguments.reads, Duration::MAX)?;
    let idle = Percentiles::of(&device.latencies(warm_bytes, arguments.reads, Duration::MAX)?);

    let (started, pending) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let missing: Vec<_> = (0..readers)
        .map(|i| {
            let (device, started, pending) = (device.clone(), Arc::clone(&started), Arc::clone(&pending));
            // Scattered, so that nothing takes them for a sequential reader and fetches ahead.
            let offset_bytes = first_miss + i * 37 % readers * CHUNK_BYTES;
            std::thread::spawn(move || {
                pending.fetch_add(1, Ordering::SeqCst);
                started.fetch_add(1, Ordering::SeqCst);
                let outcome = device.read(offset_bytes, &mut AlignedBlock::new());
                pending.fetch_sub(1, Ordering::SeqCst);
                outcome
            })
        })
        .collect();
    while started.load(Ordering::SeqCst) < missing.len() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let began = Instant::now();
    // The requests are sent by then: from here on the misses wait and need no processor, of which a guest has but one.
    std::thread::sleep(Duration::from_millis(arguments.answer_ms * 3 / 10));
    let limit = Duration::from_millis(arguments.answer_ms * 5 / 10);
    let busy = Percentiles::of(&device.latencies(warm_bytes, arguments.reads, limit)?);
    let took = began.elapsed();
    let still_pending = pending.load(Ordering::SeqCst);
    for reader in missing {
        reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?.context("a read that missed failed")?;
    }
    let ratio = busy.p99.as_secs_f64() / idle.p99.as_secs_f64();
    if arguments.json {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let (idle_p99_us, busy_p99_us) = (us(idle.p99), us(busy.p99));
        println!(
            "{}",
            serde_json::json!({"idle_p99_us": idle_p99_us, "busy_p99_us": busy_p99_us, "pending": still_pending})
        );
    } else {
        println!(
            "cached reads: idle p50 {:?} p99 {:?} ({} reads); with {still_pending} misses pending p50 {:?} p99 {:?} ({} reads in {took:?}); p99 ratio {ratio:.2}",
            idle.p50, idle.p99, idle.count, busy.p50, busy.p99, busy.count
        );
    }
    ensure!(still_pending as u64 >= arguments.misses, "only {still_pending} misses were still pending");
    ensure!(busy.count * 4 >= arguments.reads, "only {} reads were measured", busy.count);
    Ok(ratio <= arguments.limit)
}

#[derive(Clone)]
struct Device {
    file: Arc<File>,
    size_bytes: u64,
}

impl Device {
    fn open(arguments: &Arguments) -> Result<Self> {
        let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
        let mut file = File::options()
            .read(true)
            .custom_flags(direct)
            .open(&arguments.device)
            .with_context(|| format!("cannot open {}", arguments.device.display()))?;
        let size_bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(Self { file: Arc::new(file), size_bytes })
    }

    fn read(&self, offset_bytes: u64, block: &mut AlignedBlock) -> io::Result<()> {
        match self.file.read_at(block.bytes(), offset_bytes)? {
            BLOCK_BYTES => Ok(()),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Times of up to `count` reads of scattered blocks below `below_bytes`, until `limit` is over.
    fn latencies(&self, below_bytes: u64, count: usize, limit: Duration) -> io::Result<Vec<Duration>> {
        let mut block = AlignedBlock::new();
        let began = Instant::now();
        let mut times = Vec::with_capacity(count);
        // A full-period step through the blocks: scattered, and the same every time.
        let blocks = below_bytes / BLOCK_BYTES as u64;
        let mut at = 0;
        while times.len() < count && began.elapsed() < limit {
            at = (at + 127) % blocks;
            let start = Instant::now();
            self.read(at * BLOCK_BYTES as u64, &mut block)?;
            times.push(start.elapsed());
        }
        Ok(times)
    }
}

struct AlignedBlock {
    storage: Vec<u8>,
}

impl AlignedBlock {
    fn new() -> Self {
        Self { storage: vec![0; 2 * BLOCK_BYTES] }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.storage.as_ptr().align_offset(BLOCK_BYTES);
        &mut self.storage[start..start + BLOCK_BYTES]
    }
}

struct Percentiles {
    p50: Duration,
    p99: Duration,
    count: usize,
}

impl Percentiles {
    /// The median over windows of each window's percentile: when the host of a guest is busy elsewhere for a moment, that
    /// spoils one window and not the figure.
    fn of(times: &[Duration]) -> Self {
        let at = |percent: usize| {
            let mut windows: Vec<_> = times.chunks(WINDOW_READS).map(|window| percentile(window, percent)).collect();
            windows.sort_unstable();
            windows.get(windows.len() / 2).copied().unwrap_or_default()
        };
        Self { p50: at(50), p99: at(99), count: times.len() }
    }
}

fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or_default()
}
