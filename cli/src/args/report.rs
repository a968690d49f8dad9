//! The arguments of `report`.

use std::path::PathBuf;

use clap::Args;

/// Writes what a start took as a page that needs nothing else: it can be mailed, and kept.
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// The device's name, its mount point, or its path
    pub(crate) target: String,
    /// Where to write the page
    #[arg(short, long, value_name = "FILE.html")]
    pub(crate) output: PathBuf,
    /// The trace of the start, for the files that it read (default: what this host recorded of it)
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) registry: super::RegistryOptions,
}
