//! When a program that is run counts as started.

use std::time::Duration;

use clap::Args;

use super::duration;

/// When a program that is run counts as started.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReadinessArguments {
    /// Ready when this URL (plain HTTP) answers with 200 to 399; the container has the host's network
    #[arg(long, value_name = "URL", group = "readiness")]
    pub(crate) ready_http: Option<String>,
    /// Ready when this shell command, run on this host again and again, ends with 0; the container has the host's network
    #[arg(long, value_name = "CMD", group = "readiness")]
    pub(crate) ready_cmd: Option<String>,
    /// Ready when the command has ended with 0; the default
    #[arg(long, group = "readiness")]
    pub(crate) ready_exit: bool,
    /// Ready after this time
    #[arg(long, value_name = "TIME", group = "readiness", value_parser = duration)]
    pub(crate) period: Option<Duration>,
    /// How long it may take until it is ready
    #[arg(long, value_name = "TIME", default_value = "600s", value_parser = duration)]
    pub(crate) timeout: Duration,
}
