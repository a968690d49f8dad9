//! How to write fetched chunks to the store: tokio-uring, tokio's blocking pool, or one plain thread.
//!
//! Each arm writes the same 256 KiB chunks at the same scattered offsets into a new sparse file, a few writes under way
//! at a time as fetches complete, with one fdatasync per batch, as the store does it. Arms alternate within a round, so
//! that a slow moment of the machine hits all of them. Reported: chunks per second, CPU time, medians over the rounds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use ublkimg_bench::median;

/// Raw bytes of a chunk.
const CHUNK_BYTES: usize = 256 << 10;
/// Writes under way at a time: what fetches of one window complete close together.
const CONCURRENCY: usize = 8;

#[derive(Parser)]
struct Arguments {
    /// Directory on the file system to measure
    #[arg(long, default_value = "target/bench")]
    directory: PathBuf,
    /// Chunks per arm and round
    #[arg(long, default_value_t = 512)]
    chunks: usize,
    /// Chunks per fdatasync
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Rounds
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Where the JSON goes
    #[arg(long, default_value = "target/bench/store_writes.json")]
    json: PathBuf,
}

#[derive(Default)]
struct Arm {
    name: &'static str,
    chunks_per_s: Vec<f64>,
    cpu_ms: Vec<f64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    std::fs::create_dir_all(&arguments.directory)?;
    let mut arms = ["blocking-pool", "tokio-uring", "thread"].map(|name| Arm { name, ..Arm::default() });
    for _ in 0..arguments.rounds {
        for arm in &mut arms {
            let path = arguments.directory.join("store_writes.data");
            let file = File::create(&path)?;
            file.set_len((arguments.chunks * CHUNK_BYTES) as u64)?;
            let (cpu, start) = (cpu_time()?, Instant::now());
            match arm.name {
                "blocking-pool" => blocking_pool(file, &arguments)?,
                "tokio-uring" => uring(&path, &arguments)?,
                _ => thread(&file, &arguments)?,
            }
            arm.chunks_per_s.push(arguments.chunks as f64 / start.elapsed().as_secs_f64());
            arm.cpu_ms.push((cpu_time()? - cpu).as_secs_f64() * 1000.0);
            std::fs::remove_file(&path)?;
        }
    }
    report(&arms, &arguments)
}

/// Offsets in the order of a prime stride: scattered, each once.
fn offset_bytes(index: usize, chunks: usize) -> u64 {
    ((index * 7919 % chunks) * CHUNK_BYTES) as u64
}

fn chunk(index: usize) -> Vec<u8> {
    vec![u8::try_from(index % 251).unwrap_or(0); CHUNK_BYTES]
}

fn blocking_pool(file: File, arguments: &Arguments) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build()?;
    let (file, chunks, batch) = (Arc::new(file), arguments.chunks, arguments.batch);
    runtime.block_on(async {
        for start in (0..chunks).step_by(batch) {
            let mut under_way = tokio::task::JoinSet::new();
            for index in start..(start + batch).min(chunks) {
                if under_way.len() == CONCURRENCY {
                    finish_one(&mut under_way).await?;
                }
                let file = Arc::clone(&file);
                under_way.spawn_blocking(move || Ok(file.write_all_at(&chunk(index), offset_bytes(index, chunks))?));
            }
            while !under_way.is_empty() {
                finish_one(&mut under_way).await?;
            }
            let file = Arc::clone(&file);
            tokio::task::spawn_blocking(move || file.sync_data()).await??;
        }
        Ok(())
    })
}

async fn finish_one(under_way: &mut tokio::task::JoinSet<Result<()>>) -> Result<()> {
    under_way.join_next().await.context("nothing is under way")??
}

fn uring(path: &Path, arguments: &Arguments) -> Result<()> {
    let (chunks, batch) = (arguments.chunks, arguments.batch);
    tokio_uring::start(async {
        let file = std::rc::Rc::new(tokio_uring::fs::OpenOptions::new().write(true).open(path).await?);
        for start in (0..chunks).step_by(batch) {
            let mut under_way = tokio::task::JoinSet::new();
            let local = tokio::task::LocalSet::new();
            let end = (start + batch).min(chunks);
            let file_ref = &file;
            local
                .run_until(async {
                    for index in start..end {
                        if under_way.len() == CONCURRENCY {
                            finish_one(&mut under_way).await?;
                        }
                        let file = std::rc::Rc::clone(file_ref);
                        under_way.spawn_local(async move {
                            let (written, _) = file.write_all_at(chunk(index), offset_bytes(index, chunks)).await;
                            anyhow::Ok(written?)
                        });
                    }
                    while !under_way.is_empty() {
                        finish_one(&mut under_way).await?;
                    }
                    anyhow::Ok(())
                })
                .await?;
            file.sync_data().await?;
        }
        anyhow::Ok(())
    })
}

fn thread(file: &File, arguments: &Arguments) -> Result<()> {
    for start in (0..arguments.chunks).step_by(arguments.batch) {
        for index in start..(start + arguments.batch).min(arguments.chunks) {
            file.write_all_at(&chunk(index), offset_bytes(index, arguments.chunks))?;
        }
        file.sync_data()?;
    }
    Ok(())
}

/// User and system time of this process so far; io_uring's kernel workers count as its threads.
fn cpu_time() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("no stat")?.split_whitespace().collect();
    let ticks: u64 = fields.get(11..13).context("no times")?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 10))
}

fn report(arms: &[Arm], arguments: &Arguments) -> Result<()> {
    let base = median(&arms[0].chunks_per_s);
    println!("{:15} {:>12} {:>10} {:>10}", "arm", "chunks/s", "ratio", "CPU ms");
    let mut rows = Vec::new();
    for arm in arms {
        let (rate, cpu) = (median(&arm.chunks_per_s), median(&arm.cpu_ms));
        println!("{:15} {rate:>12.0} {:>10.2} {cpu:>10.0}", arm.name, rate / base);
        rows.push(serde_json::json!({
            "arm": arm.name, "chunks_per_s": arm.chunks_per_s, "median": rate, "ratio": rate / base, "cpu_ms": arm.cpu_ms,
        }));
    }
    let all = serde_json::json!({
        "benchmark": "store_writes", "chunk_bytes": CHUNK_BYTES, "concurrency": CONCURRENCY,
        "chunks": arguments.chunks, "batch": arguments.batch, "rounds": arguments.rounds, "arms": rows,
    });
    if let Some(parent) = arguments.json.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(&arguments.json, serde_json::to_vec_pretty(&all)?).context(arguments.json.display().to_string())
}
