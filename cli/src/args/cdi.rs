//! The arguments of `cdi`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct Cdi {
    #[command(subcommand)]
    pub(crate) action: CdiAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CdiAction {
    /// Write a CDI specification by which container tools mount an attached image: `podman run --device KIND=NAME`
    Generate(CdiGenerate),
}

#[derive(Debug, Args)]
pub(crate) struct CdiGenerate {
    /// The device's name, its mount point, or its path; it must be mounted, read-only as `add --mount` does it
    pub(crate) target: String,
    /// Where containers find it (default: at its mount point)
    #[arg(long, value_name = "PATH")]
    pub(crate) path: Option<String>,
    /// Vendor and class under which they ask for it
    #[arg(long, value_name = "VENDOR/CLASS", default_value = "ublkimg.dev/tree")]
    pub(crate) kind: String,
    /// Write it to this file, such as /var/run/cdi/NAME.json (default: stdout)
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}
