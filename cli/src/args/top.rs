//! The arguments of `top`.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::Args;

/// Shows all devices at work, again and again: how much is read, how much of it waits, and what is fetched.
#[derive(Debug, Args)]
pub(crate) struct Top {
    /// How long to count before it is shown
    #[arg(short, long, value_name = "TIME", default_value = "1s", value_parser = super::duration)]
    pub(crate) delay: Duration,
    /// End after it was shown so often (default: never)
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) count: Option<NonZeroU32>,
}
