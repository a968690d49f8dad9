//! Arguments of the commands on traces and profiles.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::RegistryOptions;

#[derive(Debug, Args)]
pub(crate) struct Optimize {
    /// The image, converted: registry reference with a tag, or oci:DIR:TAG
    pub(crate) reference: String,
    /// A trace of a start of it; several of one command are merged
    #[arg(long = "trace", required = true, num_args = 1.., value_name = "FILE")]
    pub(crate) traces: Vec<PathBuf>,
    /// A name to choose the profile by: `add --profile NAME`
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Use the profile for commands that have none of their own
    #[arg(long)]
    pub(crate) default: bool,
    /// No hot blob: the trace gives the order in which chunks are fetched
    #[arg(long)]
    pub(crate) order_only: bool,
    /// zstd level of the hot blob: made once, fetched at every start
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(i32).range(1..=19), conflicts_with = "order_only")]
    pub(crate) level: i32,
    /// Threads that compress (default: all cores)
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<std::num::NonZeroUsize>,
    /// Directory for unlinked temporary files, at most twice the raw size of what the traces name
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/var/tmp")]
    pub(crate) tmpdir: PathBuf,
    /// Merge traces of different commands too
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Trace {
    #[command(subcommand)]
    pub(crate) command: TraceCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TraceCommand {
    /// Say what is in a trace: totals, a timeline and, given the image, the files
    Show(Show),
    /// Make one trace of several of the same command
    Merge(Merge),
    /// Say how two traces differ
    Diff(Diff),
    /// Draw a trace, or the events of a start, as SVG
    Plot(Plot),
    /// Hang a trace on an image in a registry or layout, as a referrer
    Push(Push),
    /// Get a trace of an image: from a profile that its index lists, else from a referrer
    Pull(Pull),
    /// Make a trace of a list of paths, one a line, in the order in which they are to be fetched
    FromList(FromList),
}

/// The image that a trace is of.
#[derive(Debug, Args)]
pub(crate) struct OfImage {
    /// The image that the trace is of, to name files and layers: registry reference or oci:DIR[:TAG]
    #[arg(long, value_name = "REF")]
    pub(crate) image: Option<String>,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The trace
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) of: OfImage,
    /// How many files to list, those with the most blocks first; 0 for all
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) files: usize,
    /// Print JSON: all files, and the timeline
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Merge {
    /// The traces
    #[arg(required = true, num_args = 2.., value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Where to write the merged trace
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Merge traces of different commands too
    #[arg(long)]
    pub(crate) force: bool,
    /// Print what came out as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// One trace
    pub(crate) left: PathBuf,
    /// The other
    pub(crate) right: PathBuf,
    #[command(flatten)]
    pub(crate) of: OfImage,
    /// How many files to list that they differ in, those with the most such blocks first; 0 for all
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) files: usize,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Plot {
    /// A trace, or the events of a start
    pub(crate) file: PathBuf,
    /// Where to write the picture
    #[arg(short, long, value_name = "FILE.svg")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) of: OfImage,
}

#[derive(Debug, Args)]
pub(crate) struct Push {
    /// The trace
    pub(crate) file: PathBuf,
    /// The image: registry reference or oci:DIR[:TAG]
    pub(crate) reference: String,
    /// A name to find it by: `trace pull --name NAME`
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The image: registry reference or oci:DIR[:TAG]
    pub(crate) reference: String,
    /// The trace of this name
    #[arg(long, conflicts_with = "command")]
    pub(crate) name: Option<String>,
    /// The trace of this command. Takes all arguments that follow, up to a `;`: give it last
    #[arg(long, value_name = "ARGV", num_args = 1.., allow_hyphen_values = true, value_terminator = ";")]
    pub(crate) command: Vec<String>,
    /// Where to write it
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print what was found as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FromList {
    /// The list; `-` for stdin
    pub(crate) list: PathBuf,
    /// The image whose files they are: registry reference or oci:DIR[:TAG]
    #[arg(long, value_name = "REF")]
    pub(crate) image: String,
    /// The command that the trace is for. Takes all arguments that follow, up to a `;`: give it last
    #[arg(long, value_name = "ARGV", num_args = 1.., allow_hyphen_values = true, value_terminator = ";")]
    pub(crate) command: Vec<String>,
    /// Where to write the trace
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print what came out as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
