//! `ublkimg cache`.

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct Cache {
    #[command(subcommand)]
    pub(crate) action: CacheAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheAction {
    /// List what is in the store, least recently used first
    Ls(CacheLs),
    /// Read everything and compare it with its checksums and digests; what is damaged is dropped, and fetched again when it
    /// is read
    Verify(CacheVerify),
    /// Evict what is beyond the limits, or beyond those of the daemon if none is given: blocks of 1 MiB, least recently read
    /// first, also of images in use, whose reads fetch them again
    Gc(CacheGc),
    /// Never evict what a device serves, also when it is removed
    Pin(CachePin),
    /// Take a pin away
    Unpin(CachePin),
}

#[derive(Debug, Args)]
pub(crate) struct CacheLs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CacheVerify {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CacheGc {
    #[command(flatten)]
    pub(crate) limits: LimitArguments,
    /// Also everything that no device has and nobody has pinned
    #[arg(long)]
    pub(crate) unused: bool,
    /// Say how much would be freed, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CachePin {
    /// The device's name; to unpin also the image's reference or manifest digest
    pub(crate) target: String,
}

/// How much room the store may take.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct LimitArguments {
    /// Bytes that the store may take, such as 20G (default: no limit)
    #[arg(long, env = "UBLKIMG_CACHE_LIMIT", value_name = "SIZE", value_parser = size)]
    pub(crate) cache_limit: Option<u64>,
    /// Bytes that stay free on its file system (default: a twentieth, at most 1G)
    #[arg(long, env = "UBLKIMG_FREE_FLOOR", value_name = "SIZE", value_parser = size)]
    pub(crate) free_floor: Option<u64>,
}

/// `20G`, `512M`, `64K`, with powers of 1024, or a plain number of bytes.
fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = text.find(|c: char| !c.is_ascii_digit()).map_or((text, ""), |at| text.split_at(at));
    let shift = match unit.trim_end_matches("iB") {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("unknown unit {unit:?}: use K, M, G or T")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no size: write 512M or 20G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "out of range".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("64K", 65536), ("512MiB", 512 << 20), ("20G", 20 << 30)] {
            assert_eq!(size(text), Ok(bytes));
        }
        for bad in ["", "G", "1.5G", "1X", "99999999999T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
