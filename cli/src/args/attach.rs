//! How an image is attached: what `add` and `bundle` have in common.

use std::time::Duration;

use clap::Args;

use super::{FillArgument, RegistryOptions, TransportArgument, duration};

/// How an image is attached.
#[derive(Clone, Debug, Args)]
pub(crate) struct AttachArguments {
    /// How the device is served: ublk survives a crash of the daemon, fuse does not
    #[arg(long, env = "UBLKIMG_TRANSPORT", value_enum, default_value_t = TransportArgument::Auto)]
    pub(crate) transport: TransportArgument,
    /// How data gets into the requests of a ublk device: auto takes zero copy where the kernel has it (6.16)
    #[arg(long, value_enum, default_value_t = DataPathArgument::Auto, value_name = "HOW")]
    pub(crate) data_path: DataPathArgument,
    /// Requests of a ublk device at a time, so the most misses that wait at a time (default: 128)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=128))]
    pub(crate) queue_depth: Option<u16>,
    /// How long attaching and mounting may take
    #[arg(
        long = "attach-timeout",
        visible_alias = "timeout",
        env = "UBLKIMG_ATTACH_TIMEOUT",
        value_name = "TIME",
        default_value = "60s",
        value_parser = duration
    )]
    pub(crate) timeout: Duration,
    /// How long a read may wait for a registry that does not answer
    #[arg(
        long,
        alias = "read-timeout",
        env = "UBLKIMG_IO_TIMEOUT",
        value_name = "TIME",
        default_value = "300s",
        value_parser = duration
    )]
    pub(crate) io_timeout: Duration,
    /// What becomes of it then: it fails, and the next read tries afresh, or it goes on waiting
    #[arg(long, env = "UBLKIMG_ON_TIMEOUT", value_enum, default_value_t = OnTimeout::Eio, value_name = "WHAT")]
    pub(crate) on_timeout: OnTimeout,
    /// Do not keep the order of the first run on this host; without a published profile it is kept for the next `add`
    #[arg(long)]
    pub(crate) no_record: bool,
    /// Fetch what nobody asked for: not at all, when the link is idle, or at full rate
    #[arg(long, env = "UBLKIMG_FILL", value_enum, default_value_t = FillArgument::Off, value_name = "MODE")]
    pub(crate) fill: FillArgument,
    /// Push what the profile foretells into the page cache of the mounted image as it arrives; not while it is recorded
    #[arg(long, env = "UBLKIMG_WARM", value_enum, default_value_t = WarmArgument::Auto, value_name = "WHEN")]
    pub(crate) warm: WarmArgument,
    #[command(flatten)]
    pub(crate) registry: RegistryOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WarmArgument {
    /// Where there is more than one processor
    Auto,
    /// Whatever there is
    On,
    /// Not at all
    Off,
}

impl WarmArgument {
    /// Whether blocks are pushed on this machine.
    pub(crate) fn is_on(self) -> bool {
        match self {
            // With one, what the warmer does is taken from the program: docs/decisions/004-warmer.md
            Self::Auto => std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1),
            Self::On => true,
            Self::Off => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum DataPathArgument {
    /// The best that the kernel has
    Auto,
    /// Into the pages of the request; refused where the kernel cannot
    ZeroCopy,
    /// Into a buffer that the kernel copies
    Copy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OnTimeout {
    /// Readers get EIO
    Eio,
    /// Readers wait until the registry answers or the device is removed
    Hold,
}
