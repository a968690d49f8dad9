//! The command line, as clap derives it; help texts, man pages and completions come from here.

pub(crate) mod attach;
pub(crate) mod bundle;
pub(crate) mod cache;
pub(crate) mod cdi;
pub(crate) mod compare;
#[cfg(test)]
mod documentation_tests;
pub(crate) mod hook;
pub(crate) mod pull;
pub(crate) mod readiness;
pub(crate) mod registry;
pub(crate) mod report;
pub(crate) mod runtime;
pub(crate) mod top;
pub(crate) mod trace;
pub(crate) mod up;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ublkimg_convert::ChunkSize;

pub(crate) use self::attach::{AttachArguments, DataPathArgument, OnTimeout};
pub(crate) use self::readiness::ReadinessArguments;
pub(crate) use self::registry::RegistryOptions;

/// Container images from a registry as read-only block devices: the container starts at once, its bytes stream in.
#[derive(Debug, Parser)]
#[command(name = "ublkimg", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The documented exit codes; README carries the same table and a test compares them.
pub(crate) const EXIT_CODES: &str = "Exit codes:
  0   done
  1   internal error: please report it
  2   bad usage
  3   not found: image, tag, file or device
  4   credentials are missing or were refused
  5   not an ublkimg image: convert it first
  6   verification failed: bytes are not what their digest says
  7   timed out, or the registry is not reachable
  8   the kernel lacks something: see `ublkimg doctor`
  9   busy: mounted, or another command is at work on it
  10  the disk is full
  11  the source image is malformed
  12  a file or system call failed
  130 interrupted: nothing is left of what was begun";

#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// File with other defaults for options (default: /etc/ublkimg/config.toml, if it is there)
    #[arg(long, global = true, env = "UBLKIMG_CONFIG", value_name = "FILE", value_parser = absolute)]
    pub(crate) config: Option<PathBuf>,
    /// Directory of the store and the device records
    #[arg(long, global = true, env = "UBLKIMG_ROOT", default_value = "/var/lib/ublkimg", value_name = "DIR")]
    pub(crate) root: PathBuf,
    /// Directory of the daemon's socket and log
    #[arg(long, global = true, env = "UBLKIMG_RUN_DIR", default_value = "/run/ublkimg", value_name = "DIR")]
    pub(crate) run_dir: PathBuf,
    /// What to log to stderr: error, warn, info, debug, trace, or a filter such as `ublkimg_driver=debug`
    #[arg(long, global = true, env = "UBLKIMG_LOG", default_value = "warn", value_name = "FILTER")]
    pub(crate) log: String,
    /// How to log: text for people, json with one object a line, or journal, which hands fields to systemd's journal
    #[arg(long, global = true, env = "UBLKIMG_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// One line for people
    Text,
    /// One JSON object a line
    Json,
    /// Entries of systemd's journal, their fields with the prefix UBLKIMG_
    Journal,
}

impl LogFormat {
    /// As the option has it.
    pub(crate) fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an ublkimg image of a container image or a directory
    Convert(Convert),
    /// Fetch an image into the store of this host, without a device
    Pull(pull::Pull),
    /// Attach an image as a block device, and mount it
    Add(Add),
    /// Add the images that files in /etc/ublkimg/images.d name
    Up(up::Up),
    /// Make a bundle for runc or crun of an image: attached, with a writable root and a configuration
    Bundle(bundle::Bundle),
    /// Unmount and remove a device, and the root and bundle that were made over it
    Rm(Rm),
    /// List the devices
    Ls(Ls),
    /// Show one device in detail: reads, what its start took, and how far from the best possible that was
    Status(Status),
    /// Show what all devices do, second by second
    Top(top::Top),
    /// Write what a start took as one page
    Report(report::Report),
    /// Record the order in which a program reads the image: the trace that later starts follow
    Record(Record),
    /// Start a command after a full pull, lazily, and with a profile, and say how long each took
    Compare(compare::Compare),
    /// Say that the program that runs from a device is ready, which ends its start
    Ready(Ready),
    /// Fetch the rest of an image
    Fill(Fill),
    /// Show what an image in a registry or layout consists of, and what it costs
    Inspect(Inspect),
    /// Check a whole converted image against its digests, and against what it was converted from
    Check(Check),
    /// Write an image as a plain EROFS file, for `mount -o loop`
    Export(Export),
    /// Make a profile of recorded starts and list it beside the image: the next start fetches in that order
    Optimize(trace::Optimize),
    /// Look at, merge, compare, draw and pass on recorded starts
    Trace(trace::Trace),
    /// Look at, check, and make room in the store of this host
    Cache(cache::Cache),
    /// Give attached images to container tools as devices of the Container Device Interface
    Cdi(cdi::Cdi),
    /// Print what the daemon has done, for Prometheus
    Metrics(Metrics),
    /// Say what this host has and lacks
    Doctor(Doctor),
    /// Run the daemon that serves the devices (`add` starts it when needed)
    Daemon(Daemon),
    /// Be an OCI hook: mount images in containers, as their annotations say
    Hook(hook::Hook),
    /// Be an OCI runtime whose containers have their root from an image; also under the name ublkimg-runc
    Runtime(runtime::Runtime),
    /// Write man pages, shell completions and a sample configuration
    #[command(hide = true)]
    Docs(Docs),
    /// Mount or unmount in a process that may be killed
    #[command(hide = true, name = "mount-helper")]
    MountHelper(MountHelper),
    /// Put a mount into a container that is being made
    #[command(hide = true, name = "mount-into")]
    MountInto(hook::MountInto),
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// Registry reference, oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE or dir:PATH
    pub(crate) source: String,
    /// Registry reference or oci:DIR[:TAG]
    pub(crate) destination: String,
    /// Platform to take from a multi-platform image, such as linux/arm64 or linux/arm/v7 (default: this machine's)
    #[arg(long, value_name = "OS/ARCH", conflicts_with = "all_platforms")]
    pub(crate) platform: Option<String>,
    /// Add a dm-verity tree over the device, for `add --verity`; reads the converted layers back
    #[arg(long)]
    pub(crate) verity: bool,
    /// Convert the images for all platforms of Linux
    #[arg(long)]
    pub(crate) all_platforms: bool,
    /// List the original image before the converted one, so that ordinary runtimes keep working with DESTINATION, which may
    /// then be SOURCE itself
    #[arg(long)]
    pub(crate) index: bool,
    /// Directory for unlinked temporary files, at most the raw size of the layers at work
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/var/tmp")]
    pub(crate) tmpdir: PathBuf,
    /// zstd level of the chunks; those of small files get one more
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(crate) level: i32,
    /// Most bytes of a chunk, which is what a read that misses fetches: 64K, 128K or 256K. Smaller ones compress worse
    #[arg(long, value_name = "SIZE", default_value = "256K")]
    pub(crate) chunk_size: ChunkSize,
    /// Threads that compress (default: all cores)
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<std::num::NonZeroUsize>,
    /// Converted image whose layers may be used again, beside the one that DESTINATION names now; can be repeated. It is
    /// taken at its word: name only what is trusted as DESTINATION is
    #[arg(long, value_name = "REF")]
    pub(crate) reuse: Vec<String>,
    /// Directory that remembers the layers converted on this host, at most 1 GiB (default: $XDG_CACHE_HOME/ublkimg/convert, else
    /// ~/.cache/ublkimg/convert)
    #[arg(long = "convert-cache", visible_alias = "cache", value_name = "DIR", env = "UBLKIMG_CONVERT_CACHE")]
    pub(crate) cache: Option<PathBuf>,
    /// Neither use that directory nor write it
    #[arg(long, conflicts_with = "cache")]
    pub(crate) no_cache: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// The image: registry reference or oci:DIR[:TAG]
    pub(crate) reference: String,
    /// Pull an image that nobody converted, and convert it into this host's store first. What no device uses of it is
    /// removed when newer ones come
    #[arg(long)]
    pub(crate) convert: bool,
    /// Name of the device (default: made of the reference)
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) attach: AttachArguments,
    /// Mount the file system here, read-only; the directory is made if it is missing
    #[arg(long, value_name = "DIR")]
    pub(crate) mount: Option<PathBuf>,
    /// Make the mount writable: an overlay, whose changes go into UPPER, or into memory if that is not given
    #[arg(long, value_name = "UPPER", num_args = 0..=1, require_equals = true, requires = "mount")]
    pub(crate) overlay: Option<Option<PathBuf>>,
    /// Have the kernel check each block that is read, by dm-verity; for an image that was converted with --verity
    #[arg(long)]
    pub(crate) verity: bool,
    #[command(flatten)]
    pub(crate) start: StartArguments,
    /// Return only when the whole image is on this host; fetches at full rate
    #[arg(long, value_enum, value_name = "FOR")]
    pub(crate) wait: Option<WaitArgument>,
    /// Print the device as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How an image is started.
#[derive(Clone, Debug, Args)]
pub(crate) struct StartArguments {
    /// In which order to fetch before it is asked for: auto (the image's profile for --command, else its default, else what
    /// this host recorded), none, a profile's name or digest, or the path of a trace (with a slash)
    #[arg(long, value_name = "PROFILE", default_value = "auto")]
    pub(crate) profile: String,
    /// The command that is about to run, which chooses the profile. Takes all arguments that follow, up to a `;`: give it last
    #[arg(long, value_name = "ARGV", num_args = 1.., allow_hyphen_values = true, value_terminator = ";")]
    pub(crate) command: Vec<String>,
    /// Read-ahead window of the device once the start is over; while a profile is followed it is that of the trace
    /// (default: 128)
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(..=131_072))]
    pub(crate) read_ahead_kb: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FillArgument {
    /// Only what is read, and what the profile says
    Off,
    /// The rest at a share of the link, when nobody waits
    Idle,
    /// The rest at full rate
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WaitArgument {
    /// Until the whole image is on this host
    Full,
}

/// Where starts were ready first, with the hot blob and the image's own bytes: docs/decisions/002-read-ahead.md.
pub(crate) const RECORD_READ_AHEAD_KB: u32 = 16;

/// `record start NAME`, `record stop NAME -o FILE`, or `record REF -o FILE -- COMMAND`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Record {
    #[command(subcommand)]
    pub(crate) action: Option<RecordAction>,
    #[command(flatten)]
    pub(crate) run: RecordRun,
}

#[derive(Debug, Subcommand)]
pub(crate) enum RecordAction {
    /// Record what is read from a device from now on
    Start(RecordStart),
    /// End the recording of a device and write its trace
    Stop(RecordStop),
}

#[derive(Debug, Args)]
pub(crate) struct RecordStart {
    /// The device's name, its mount point, or its path
    pub(crate) target: String,
    /// Read-ahead window of the device while it is recorded, and while the trace is followed: 0 gives exactly what the
    /// program touches, more gives fewer and larger reads, and blocks that nobody needs
    #[arg(long, value_name = "KIB", default_value_t = RECORD_READ_AHEAD_KB, value_parser = clap::value_parser!(u32).range(..=131_072))]
    pub(crate) read_ahead_kb: u32,
    /// The command that is about to run, named in the trace (default: that of `add`). Takes all arguments that follow, up
    /// to a `;`: give it last
    #[arg(long, value_name = "ARGV", num_args = 1.., allow_hyphen_values = true, value_terminator = ";")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RecordStop {
    /// The device's name, its mount point, or its path
    pub(crate) target: String,
    /// Where to write the trace
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Also write what happened since the image was attached, for `trace plot` to draw
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,
}

/// One recorded run of the image: attached, mounted below a writable layer in memory, run by runc, all of it gone after.
#[derive(Debug, Args)]
pub(crate) struct RecordRun {
    /// The image: registry reference or oci:DIR[:TAG]
    #[arg(required = true)]
    pub(crate) reference: Option<String>,
    /// Where to write the trace
    #[arg(short, long, value_name = "FILE", required = true)]
    pub(crate) output: Option<PathBuf>,
    /// Also write what happened since the image was attached, for `trace plot` to draw
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) readiness: ReadinessArguments,
    /// Read-ahead window while it is recorded, and while the trace is followed: 0 gives exactly what the program touches,
    /// more gives fewer and larger reads, and blocks that nobody needs
    #[arg(long, value_name = "KIB", default_value_t = RECORD_READ_AHEAD_KB, value_parser = clap::value_parser!(u32).range(..=131_072))]
    pub(crate) read_ahead_kb: u32,
    /// The profile to follow meanwhile: see `add`
    #[arg(long, value_name = "PROFILE", default_value = "none")]
    pub(crate) profile: String,
    /// How the device is served
    #[arg(long, env = "UBLKIMG_TRANSPORT", value_enum, default_value_t = TransportArgument::Auto)]
    pub(crate) transport: TransportArgument,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The command to run (default: the image's own)
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ready {
    /// The device's name, its mount point, or its path
    pub(crate) target: String,
}

#[derive(Debug, Args)]
pub(crate) struct Fill {
    /// The device's name, its mount point, or its path
    pub(crate) target: String,
    /// full fetches the rest at full rate and waits for it; idle fetches it when nobody waits, off ends a fill: these return
    /// at once
    #[arg(long, value_enum, default_value_t = FillArgument::Full)]
    pub(crate) mode: FillArgument,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum TransportArgument {
    /// ublk where the kernel has it, else fuse
    Auto,
    /// A ublk device
    Ublk,
    /// A FUSE file behind a loop device
    Fuse,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// A device's name, its mount point, or its path
    pub(crate) target: String,
    /// Remove it even if it is mounted: the mounts are detached, their readers get errors
    #[arg(long)]
    pub(crate) force: bool,
    /// Say what would be unmounted and removed, or why it would be refused, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// The device's name, its mount point, or its path
    pub(crate) target: String,
    /// Also write what happened since the image was attached, for `trace plot` to draw
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,
    /// Show it again and again, until the device is removed; 1s apart if no time is given
    #[arg(
        long,
        value_name = "TIME",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1s",
        value_parser = duration,
        conflicts_with = "events"
    )]
    pub(crate) watch: Option<Duration>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The image: registry reference, oci:DIR[:TAG], or the path of a layout directory
    pub(crate) reference: String,
    /// Platform to take from a multi-platform image (default: this machine's)
    #[arg(long, value_name = "OS/ARCH")]
    pub(crate) platform: Option<String>,
    /// Number of the largest files to list
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) largest: usize,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// The image: registry reference, oci:DIR[:TAG], or the path of a layout directory
    pub(crate) reference: String,
    /// Compare it with this, which it was converted from, object by object
    #[arg(long, value_name = "SOURCE")]
    pub(crate) source: Option<String>,
    /// Directory for unlinked temporary files: with --source the largest layer twice, unpacked
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/var/tmp")]
    pub(crate) tmpdir: PathBuf,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// The image: registry reference, oci:DIR[:TAG], or the path of a layout directory
    pub(crate) reference: String,
    /// The file to write, or a directory for a file named after the image
    pub(crate) path: PathBuf,
    /// Platform to take from a multi-platform image (default: this machine's)
    #[arg(long, value_name = "OS/ARCH")]
    pub(crate) platform: Option<String>,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Metrics {
    /// Write them to this file, whole at once, as the textfile collector of node_exporter wants it (default: stdout)
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Daemon {
    /// End the daemon; refused while it has devices
    #[arg(long, conflicts_with = "server")]
    pub(crate) stop: bool,
    /// With --stop: leave the devices to the next daemon; their readers wait for it
    #[arg(long, requires = "stop")]
    pub(crate) keep_devices: bool,
    /// Have this program take over the devices of the daemon that runs, with that daemon's options; readers see no error, and
    /// if it fails the old daemon serves on
    #[arg(long, conflicts_with = "stop")]
    pub(crate) takeover: bool,
    /// How much room the store may take
    #[command(flatten)]
    pub(crate) limits: cache::LimitArguments,
    /// How long readers of a device may wait for a server when none comes to serve; then the device is deleted and they get
    /// errors
    #[arg(long, env = "UBLKIMG_RECOVERY_TIMEOUT", value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub(crate) recovery_timeout: Duration,
    /// Run in a session of its own, as `add` starts it
    #[arg(long, hide = true, conflicts_with = "stop")]
    pub(crate) background: bool,
    /// Be the server, without a guard
    #[arg(long, hide = true)]
    pub(crate) server: bool,
    /// Be the guard of the server with this process id, which this process has started as another program
    #[arg(long, hide = true, conflicts_with_all = ["stop", "server", "takeover"])]
    pub(crate) guard_of: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Docs {
    /// Where to write them
    pub(crate) directory: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct MountHelper {
    /// The block device; without it, unmount
    #[arg(long)]
    pub(crate) device: Option<PathBuf>,
    /// Read this many bytes from the start of the device into its page cache
    #[arg(long, default_value_t = 0)]
    pub(crate) warm_bytes: u64,
    /// Go on in the background, pushing what the profile of the device of this name foretells into the page cache
    #[arg(long, value_name = "NAME")]
    pub(crate) warm: Option<String>,
    /// Detach a mount that is in use
    #[arg(long)]
    pub(crate) detach: bool,
    /// The mount point
    pub(crate) directory: PathBuf,
}

/// A path that stays the same in another working directory.
fn absolute(text: &str) -> std::io::Result<PathBuf> {
    std::path::absolute(text)
}

/// `500ms`, `60s`, `5m` or a plain number of seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit_ms) = match text.find(|c: char| !c.is_ascii_digit()) {
        None => (text, 1000),
        Some(at) => match &text[at..] {
            "ms" => (&text[..at], 1),
            "s" => (&text[..at], 1000),
            "m" => (&text[..at], 60_000),
            unit => return Err(format!("unknown unit {unit:?}: use ms, s or m")),
        },
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no time: write 500ms, 60s or 5m"))?;
    number.checked_mul(unit_ms).filter(|ms| *ms > 0).map(Duration::from_millis).ok_or_else(|| "out of range".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn clap_accepts_the_definition() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        for bad in ["", "s", "0s", "1h", "-1s", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
