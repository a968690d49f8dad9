//! The arguments of `up`.

use std::path::PathBuf;

use clap::Args;

/// Adds the images that files of this host name, as services do at boot.
#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Names of files, without `.toml` (default: all)
    pub(crate) name: Vec<String>,
    /// Directory of the files
    #[arg(long, value_name = "DIR", env = "UBLKIMG_IMAGES_DIR", default_value = "/etc/ublkimg/images.d")]
    pub(crate) images_dir: PathBuf,
    /// Print the commands that it would run
    #[arg(long)]
    pub(crate) dry_run: bool,
}
