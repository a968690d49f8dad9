//! Real starts, side by side: how long a container takes to be ready when its image is pulled whole, attached without a
//! profile, with a trace, with a hot blob, and when it is all there already. One registry behind a shaped link, one kernel,
//! arms alternating within a round; every start begins on a host with an empty store (`local`: a full one), no daemon, and
//! an empty page cache. Prints a table and writes JSON. See `docs/starts.md`.

mod arm;
mod bench;
mod figures;
mod limit;
mod local;
mod processor;
mod profile;
mod trouble;
mod workload;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

use arm::Arm;
use bench::{Bench, Setup};
use figures::{Claims, Row, Sample, Table};
use local::Locals;
use profile::Profile;
use trouble::Trouble;
use workload::Workload;

/// Starts containers in several ways over one shaped link, and compares.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to start: scipy, scipy-stats, nginx, node, numpy
    #[arg(default_values = ["scipy", "nginx", "node"])]
    workloads: Vec<String>,
    /// In which ways
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["pull", "none", "trace", "hot", "local"])]
    arms: Vec<Arm>,
    /// Rounds: starts of each kind
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Rate of the link to the registry, in Mbit/s
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    rate_mbit: u64,
    /// Round trip on that link
    #[arg(long, default_value_t = 20)]
    rtt_ms: u64,
    /// Passed on to `ublkimg add`
    #[arg(long, default_value = "auto")]
    transport: String,
    /// Read-ahead window of the device when the profile is recorded and followed: 0 packs the blocks that are touched,
    /// more also those that the kernel reads beyond them
    #[arg(long, default_value_t = 16, value_name = "KIB")]
    read_ahead_kb: u32,
    /// Hosts have used this registry before: each keeps what the one before it found out about the link
    #[arg(long)]
    known_link: bool,
    /// Stores and exported images lie on a block device, an ext4 file system over a loop device, whose page cache is dropped
    /// before each start; else wherever `--work` is
    #[arg(long)]
    disk: bool,
    /// Nothing else runs on this machine: the processor time that a start took is known, and T* has its term for it
    #[arg(long)]
    alone: bool,
    /// Layouts of the source images, by name, and `erofs` with the converted ones as tags
    #[arg(long, default_value = "target/starts", value_name = "DIR")]
    images: PathBuf,
    /// A directory for this run; what is in it is deleted
    #[arg(long, default_value = "target/starts/run", value_name = "DIR")]
    work: PathBuf,
    /// The program; default: beside this one
    #[arg(long, value_name = "FILE")]
    ublkimg: Option<PathBuf>,
    /// Where what happened in the last start of each kind is left, for `ublkimg trace plot`: WORKLOAD.ARM.events
    #[arg(long, value_name = "DIR")]
    events: Option<PathBuf>,
    /// Where the JSON goes; the recorded traces are left beside it
    #[arg(long, default_value = "target/starts/starts.json", value_name = "FILE")]
    json: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("start: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "mounts and containers need root");
    let program = match &arguments.ublkimg {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("ublkimg"),
    };
    ensure!(program.exists(), "there is no {}", program.display());
    std::fs::create_dir_all(&arguments.work)?;
    let work = arguments.work.canonicalize()?;
    let workloads = arguments.workloads.iter().map(|name| Workload::named(name)).collect::<Result<Vec<_>>>()?;
    let setup = Setup {
        images: &arguments.images,
        work: &work,
        program: &program,
        transport: &arguments.transport,
        link: (arguments.rate_mbit, arguments.rtt_ms / 2),
        read_ahead_kb: arguments.read_ahead_kb,
        has_disk: arguments.disk,
        knows_link: arguments.known_link,
    };
    let bench = Bench::new(&setup, &workloads)?;
    let mut rows = Vec::new();
    for workload in &workloads {
        let measured = measure(arguments, &bench, workload).with_context(|| format!("{} failed", workload.name))?;
        rows.extend(measured);
        // What was measured is worth keeping whatever happens next.
        std::fs::write(&arguments.json, serde_json::to_vec_pretty(&rows)?)?;
    }
    print!("{}\n{}{}", Table(&rows), Claims(&rows), Locals(&rows));
    println!("JSON: {}", arguments.json.display());
    // The disk is on it.
    drop(bench);
    std::fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))
}

/// All rows of one workload.
fn measure(arguments: &Arguments, bench: &Bench, workload: &Workload) -> Result<Vec<Row>> {
    eprintln!("start: {}: recording a profile", workload.name);
    let mut profile = Profile::record(bench, workload)?;
    let kept = arguments.json.with_file_name(format!("{}.trace", workload.name));
    if arguments.arms.contains(&Arm::Loop) {
        bench.export(workload)?;
    }
    std::fs::copy(profile.trace_file()?, &kept).with_context(|| format!("cannot write {}", kept.display()))?;
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); arguments.arms.len()];
    for round in 1..=arguments.rounds {
        for (arm, samples) in arguments.arms.iter().zip(&mut samples) {
            let sample = one(bench, workload, &mut profile, *arm).with_context(|| arm.to_string())?;
            eprintln!(
                "start: {} {round}/{}: {arm}: {:.2} s, {:.2} MB, {:?}",
                workload.name,
                arguments.rounds,
                sample.ready_seconds,
                figures::megabytes(sample.bytes),
                sample.reads
            );
            samples.push(sample);
            if let Some(dir) = arguments.events.as_deref().filter(|_| arm.is_served()) {
                keep_events(bench, dir, workload, *arm)?;
            }
        }
    }
    let packed = profile.packed(bench, arguments.alone)?;
    let rows = arguments.arms.iter().zip(samples).map(|(arm, samples)| Row {
        workload: workload.name.to_owned(),
        arm: arm.to_string(),
        link: format!("{} Mbit/s, {} ms", arguments.rate_mbit, arguments.rtt_ms),
        transport: arguments.transport.clone(),
        samples,
        packed: if matches!(arm, Arm::Hot | Arm::Warm | Arm::Local | Arm::Trouble) {
            packed.clone()
        } else {
            Vec::new()
        },
    });
    Ok(rows.collect())
}

fn keep_events(bench: &Bench, dir: &Path, workload: &Workload, arm: Arm) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let kept = dir.join(format!("{}.{}.events", workload.name, arm.option()));
    std::fs::copy(bench.events_file(), &kept).with_context(|| format!("cannot write {}", kept.display()))?;
    Ok(())
}

/// One start.
fn one(bench: &Bench, workload: &Workload, profile: &mut Profile, arm: Arm) -> Result<Sample> {
    let image = bench.image(workload);
    let host = bench.host()?;
    let start = if arm.is_other() { &workload.other } else { &workload.start };
    let nothing = || Ok(());
    match arm {
        Arm::Pull => host.pull(workload),
        Arm::None | Arm::OtherNone => host.start(&image, &["--profile", "none"], start, nothing),
        Arm::Trace => host.start(&image, &["--profile", profile.trace_file()?], start, nothing),
        Arm::Warm => host.start(&image, &["--profile", profile.name(), "--warm", "on"], start, nothing),
        Arm::Hot | Arm::OtherWrong => host.start(&image, &["--profile", profile.name()], start, nothing),
        Arm::Local => profile.local(bench, workload),
        Arm::Loop => host.mounted(workload),
        Arm::Trouble => {
            // Its beginning is told by the bytes of this start.
            bench.registry.reset_stats();
            let trouble = Trouble::begin(&bench.registry, bench.link, profile.hot_bytes() + profile.attach_bytes);
            let sample = host.start(&image, &["--profile", profile.name()], start, nothing);
            let met = trouble.end();
            Ok(Sample { trouble: met, ..sample? })
        }
    }
}
