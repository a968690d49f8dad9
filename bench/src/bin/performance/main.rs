//! How fast a device is: reads of what is here and of what is not, attaching, many devices. Each figure is made of
//! measurements of one run in one kernel, in alternation where there are two, and stands beside the bar that it is to meet.
//! Prints a table and writes JSON. See `docs/performance.md`.

mod attach;
mod cold;
mod devices;
mod hits;
mod hooks;
mod inputs;
mod machine;
mod pending;
mod rows;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use ublkimg_driver::device::Transport;

use machine::Machine;
use rows::{Row, Table};

/// A group of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Random and sequential reads, a whole tree
    Hits,
    /// Cached reads while others wait
    Pending,
    /// A small file that is not here
    Small,
    /// A large file that is not here
    Large,
    /// By digest and by tag
    Attach,
    /// What hooks cost a container
    Hooks,
    /// 64 of them
    Devices,
}

impl Group {
    /// The null target and the limit on devices are ublk's.
    fn wants_ublk(self) -> bool {
        matches!(self, Self::Hits | Self::Devices)
    }
}

/// Measures devices, and compares.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to measure
    #[arg(value_enum, default_values = ["hits", "pending", "small", "large", "attach", "hooks", "devices"])]
    groups: Vec<Group>,
    /// Rounds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..))]
    rounds: u8,
    /// Where the images are that this program makes: only makes them, with `--prepare`
    #[arg(long, default_value = "target/bench/images", value_name = "DIR")]
    images: PathBuf,
    /// The image whose tree is read: a layout of converted images, and the tag
    #[arg(long, default_value = "target/starts/erofs:node", value_name = "DIR:TAG")]
    tree: String,
    /// The `ublkimg` to measure; default: the one beside this program
    #[arg(long, value_name = "FILE")]
    ublkimg: Option<PathBuf>,
    /// Make the images, and end
    #[arg(long)]
    prepare: bool,
    /// A directory for this run; what is in it is deleted
    #[arg(long, default_value = "target/bench/run", value_name = "DIR")]
    work: PathBuf,
    /// What devices are made with: ublk, or fuse on a host without it, whose registry has a processor of its own; there are no
    /// hits and devices then
    #[arg(long, default_value_t = Transport::Ublk)]
    transport: Transport,
    /// More options for every `ublkimg add`, separated by blanks
    #[arg(long, default_value = "", value_name = "OPTIONS", allow_hyphen_values = true)]
    add: String,
    /// Where the JSON goes
    #[arg(long, default_value = "target/bench/performance.json", value_name = "FILE")]
    json: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("performance: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.prepare {
        return inputs::prepare(&arguments.images, &std::env::current_exe()?.with_file_name("ublkimg"));
    }
    ensure!(rustix::process::geteuid().is_root(), "devices and mounts need root");
    if arguments.transport == Transport::Ublk {
        let hint = "`modprobe ublk_drv`, or `make bench`, or --transport fuse";
        ensure!(std::fs::exists("/dev/ublk-control")?, "this kernel has no ublk: {hint}");
    }
    let (dir, tag) = arguments.tree.rsplit_once(':').context("--tree wants DIR:TAG")?;
    std::fs::create_dir_all(&arguments.work)?;
    let work = arguments.work.canonicalize()?;
    let tree = (PathBuf::from(dir), tag.to_owned());
    let (images, rounds) = (arguments.images.join("erofs"), usize::from(arguments.rounds));
    let program = arguments.ublkimg.clone();
    let machine = Machine::new(work.clone(), program, arguments.transport, images, tree, rounds)?;
    let options: Vec<&str> = arguments.add.split_whitespace().collect();
    let mut rows: Vec<Row> = Vec::new();
    for group in &arguments.groups {
        if group.wants_ublk() && arguments.transport != Transport::Ublk {
            eprintln!("performance: SKIP {group:?}: not without ublk");
            continue;
        }
        eprintln!("performance: {group:?}");
        let measured = match group {
            Group::Hits => hits::measure(&machine, &options),
            Group::Pending => pending::measure(&machine, &options),
            Group::Small => cold::small(&machine, &options),
            Group::Large => cold::sequential(&machine, &options),
            Group::Attach => attach::measure(&machine, &options),
            Group::Hooks => hooks::measure(&machine, &options),
            Group::Devices => devices::measure(&machine, &options),
        };
        let measured = measured.with_context(|| format!("{group:?} failed"))?;
        eprint!("{}", Table(&measured));
        rows.extend(measured);
        // What was measured is worth keeping whatever happens next.
        std::fs::write(&arguments.json, serde_json::to_vec_pretty(&rows)?)?;
    }
    print!("{}", Table(&rows));
    std::fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))
}
