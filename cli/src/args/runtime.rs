//! The arguments of `runtime`, which `ublkimg-runc` is.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::AttachArguments;

/// An OCI runtime that supplies the root of a container and leaves the rest to another one.
#[derive(Debug, Args)]
pub(crate) struct Runtime {
    /// The runtime that does the rest: a path, or a name in PATH
    #[arg(long = "runtime", env = "UBLKIMG_RUNTIME", value_name = "PROGRAM", default_value = "runc")]
    pub(crate) program: PathBuf,
    #[command(flatten)]
    pub(crate) attach: AttachArguments,
    /// What it is called with
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub(crate) arguments: Vec<OsString>,
}
