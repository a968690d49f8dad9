//! The arguments of `hook`, and of the process that it starts.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

/// One call of an OCI hook; the container's state comes on stdin.
#[derive(Clone, Debug, Args)]
pub(crate) struct Hook {
    /// prestart, createRuntime, createContainer, poststart or poststop; anything else does nothing
    pub(crate) phase: String,
    /// How long attaching and mounting may take in all
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = super::duration)]
    pub(crate) timeout: Duration,
    /// How long a read may wait for a registry that does not answer
    #[arg(long, env = "UBLKIMG_IO_TIMEOUT", value_name = "TIME", default_value = "300s", value_parser = super::duration)]
    pub(crate) io_timeout: Duration,
    /// How the devices are served
    #[arg(long, env = "UBLKIMG_TRANSPORT", value_enum, default_value_t = super::TransportArgument::Auto)]
    pub(crate) transport: super::TransportArgument,
    /// Say what would be done for this container, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) registry: super::RegistryOptions,
}

/// Puts a mount of this namespace into a container that is being made.
#[derive(Debug, Args)]
pub(crate) struct MountInto {
    /// A process in the container's mount namespace (default: it is this one)
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// The mount
    pub(crate) source: PathBuf,
    /// The container's root, as its mount namespace has it
    pub(crate) root: PathBuf,
    /// Where, below that; the directory is made if it is missing
    pub(crate) path: String,
}
