//! Reads a device at random until a file appears, and compares all that it reads: for tests that kill and break what is
//! below it meanwhile. Reads with O_DIRECT, so each is a request to the device.
//!
//! Prints one line: reads, errors, wrong blocks, and how long reads took. Exit code 1 with an error or a wrong block.

use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

/// The unit of the device and the alignment that O_DIRECT wants.
const BLOCK_BYTES: usize = 4096;

/// O_DIRECT as `open` takes it.
const DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits().cast_signed();

/// The longest read.
const BLOCKS_MAX: usize = 32;

/// A pause between reads, so that others get the only processor too.
const PAUSE: Duration = Duration::from_millis(2);

/// Reads a device until a file appears.
#[derive(Parser)]
struct Arguments {
    /// The device
    device: PathBuf,
    /// A copy of it
    reference: PathBuf,
    /// It ends when this file is there
    until: PathBuf,
}

#[derive(Default)]
struct Seen {
    errors: u64,
    wrong: u64,
    took: Vec<Duration>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(seen) => {
            println!("{}", report(&seen));
            if seen.errors + seen.wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("steady-reader: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<Seen> {
    let opened = File::options().read(true).custom_flags(DIRECT).open(&arguments.device);
    let device = opened.with_context(|| format!("cannot open {}", arguments.device.display()))?;
    let reference = File::open(&arguments.reference).context("cannot open the reference")?;
    let blocks = reference.metadata()?.len() / BLOCK_BYTES as u64;
    ensure!(blocks > BLOCKS_MAX as u64, "the reference is too short");
    // One block more than is read, to find an aligned place in it.
    let mut buffer = vec![0; (BLOCKS_MAX + 1) * BLOCK_BYTES];
    let mut expected = vec![0; BLOCKS_MAX * BLOCK_BYTES];
    let (random, mut seen) = (RandomState::new(), Seen::default());
    while !arguments.until.exists() {
        let number = random.hash_one(seen.took.len());
        let len = BLOCK_BYTES * (1 + usize::try_from(number % BLOCKS_MAX as u64)?);
        let offset_bytes = (number >> 8) % (blocks - BLOCKS_MAX as u64) * BLOCK_BYTES as u64;
        let start = buffer.as_ptr().align_offset(BLOCK_BYTES);
        let part = &mut buffer[start..start + len];
        let began = Instant::now();
        let read: io::Result<()> = device.read_exact_at(part, offset_bytes);
        seen.took.push(began.elapsed());
        reference.read_exact_at(&mut expected[..len], offset_bytes)?;
        match read {
            Err(error) => {
                eprintln!("steady-reader: {len} bytes at {offset_bytes}: {error}");
                seen.errors += 1;
            }
            Ok(()) if *part != expected[..len] => {
                eprintln!("steady-reader: {len} bytes at {offset_bytes} are wrong");
                seen.wrong += 1;
            }
            Ok(()) => {}
        }
        std::thread::sleep(PAUSE);
    }
    Ok(seen)
}

fn report(seen: &Seen) -> String {
    let mut took = seen.took.clone();
    took.sort_unstable();
    let at = |share: usize| took.get(took.len().saturating_sub(1) * share / 1000).copied().unwrap_or_default();
    let longer = |limit_ms| took.iter().filter(|took| **took > Duration::from_millis(limit_ms)).count();
    let (reads, errors, wrong) = (took.len(), seen.errors, seen.wrong);
    format!(
        "{reads} reads, {errors} errors, {wrong} wrong; p50 {:?}, p99 {:?}, p99.9 {:?}, longest {:?}; pauses over 100 ms: {}, over 1 s: {}, over 5 s: {}",
        at(500),
        at(990),
        at(999),
        at(1000),
        longer(100),
        longer(1000),
        longer(5000)
    )
}
