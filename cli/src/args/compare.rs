//! The arguments of `compare`.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::Args;

use super::{ReadinessArguments, RegistryOptions, TransportArgument};

/// Starts a command of an image after a full pull, lazily, and with a profile, each on a host that has nothing of it, and
/// says how long each took.
///
/// The starts have a daemon and stores of their own; all of it is gone after. The page cache of this host is dropped before
/// each.
#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// The image, converted: registry reference or oci:DIR[:TAG]
    pub(crate) reference: String,
    /// The ordinary image that it was made of, for the full pull (default: the one that REFERENCE lists beside it)
    #[arg(long, value_name = "REF")]
    pub(crate) from: Option<String>,
    /// How often each start is made; they alternate
    #[arg(long, value_name = "N", default_value = "3")]
    pub(crate) rounds: NonZeroU32,
    /// The profile of the starts with one: see `add`. Where the image lists none, a start is recorded first and followed;
    /// `none` leaves these starts out
    #[arg(long, value_name = "PROFILE", default_value = "auto")]
    pub(crate) profile: String,
    #[command(flatten)]
    pub(crate) readiness: ReadinessArguments,
    /// How the device is served
    #[arg(long, env = "UBLKIMG_TRANSPORT", value_enum, default_value_t = TransportArgument::Auto)]
    pub(crate) transport: TransportArgument,
    /// Where the unpacked image and the stores are meanwhile (default: the directory of the store)
    #[arg(long, value_name = "DIR")]
    pub(crate) workdir: Option<PathBuf>,
    /// Also write the comparison as one page
    #[arg(short, long, value_name = "FILE.html")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
    /// Print all starts as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The command to run (default: the image's own)
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}
