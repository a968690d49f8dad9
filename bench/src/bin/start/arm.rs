//! The ways in which an image is started.

use std::fmt;

use clap::ValueEnum;

/// One way. Arms alternate within a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Arm {
    /// Pull all layers of the source image, unpack them, start
    Pull,
    /// Attach without a profile
    None,
    /// Attach with the trace in a file: it gives the order, the image's own chunks are fetched
    Trace,
    /// Attach with the profile that the image's index lists
    Hot,
    /// As hot, and what arrives is pushed into the page cache: the other arms do without
    Warm,
    /// The whole image is in the store, nothing of it in a page cache
    Local,
    /// The exported image in a file, mounted over a loop device: no ublkimg
    Loop,
    /// Another command of the image, without a profile
    OtherNone,
    /// Another command of the image, with the profile of the first
    OtherWrong,
    /// As hot, while the registry gets slow, then asks for patience, then is away for 5 s
    Trouble,
}

impl Arm {
    /// What `--arms` calls it.
    pub(crate) fn option(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether the other command is started.
    pub(crate) fn is_other(self) -> bool {
        matches!(self, Self::OtherNone | Self::OtherWrong)
    }

    /// Whether a daemon of ours serves the image.
    pub(crate) fn is_served(self) -> bool {
        !matches!(self, Self::Pull | Self::Loop)
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pull => "full pull",
            Self::None => "no profile",
            Self::Trace => "trace only",
            Self::Hot => "hot blob",
            Self::Warm => "hot blob, pushed",
            Self::Local => "local",
            Self::Loop => "loop device",
            Self::OtherNone => "other, no profile",
            Self::OtherWrong => "other, wrong profile",
            Self::Trouble => "hot blob, trouble",
        })
    }
}
