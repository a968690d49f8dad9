//! The arguments of `pull`.

use std::time::Duration;

use clap::Args;

/// Brings an image onto this host; a later `add` needs no registry for what is here.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The image: registry reference or oci:DIR[:TAG]
    pub(crate) reference: String,
    /// How much of it
    #[arg(long, value_enum, default_value_t = What::All)]
    pub(crate) what: What,
    /// The profile: see `add`
    #[arg(long, value_name = "PROFILE", default_value = "auto")]
    pub(crate) profile: String,
    /// How long the registry may be silent
    #[arg(long, env = "UBLKIMG_IO_TIMEOUT", value_name = "TIME", default_value = "300s", value_parser = super::duration)]
    pub(crate) io_timeout: Duration,
    #[command(flatten)]
    pub(crate) registry: super::RegistryOptions,
    /// Print what is here as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The command that will run, which chooses the profile
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum What {
    /// What its profile names: a start like the recorded one misses nothing
    Profile,
    /// All of it
    All,
}
