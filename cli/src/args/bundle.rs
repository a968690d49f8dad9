//! The arguments of `bundle`.

use std::path::PathBuf;

use clap::Args;

use super::AttachArguments;
use crate::bundle::BindMount;
use crate::cdi::DeviceName;

/// A bundle that `runc run -b DIR NAME` runs: the image attached, a writable root over it, and the configuration.
#[derive(Debug, Args)]
pub(crate) struct Bundle {
    /// The image: registry reference or oci:DIR[:TAG]
    pub(crate) reference: String,
    /// The bundle's directory; it is made if it is missing
    pub(crate) directory: PathBuf,
    /// Name of the device (default: made of the reference)
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) attach: AttachArguments,
    /// Keep what the container changes in this directory (default: in memory)
    #[arg(long, value_name = "DIR")]
    pub(crate) upper: Option<PathBuf>,
    /// The profile to follow: see `add`
    #[arg(long, value_name = "PROFILE", default_value = "auto")]
    pub(crate) profile: String,
    /// USER[:GROUP] of the command, names or numbers (default: the image's)
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Variable of the environment; without a value that of this command's own environment. Can be repeated
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Directory in which the command starts (default: the image's)
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Name of the host in the container
    #[arg(long, value_name = "NAME", conflicts_with = "host_network")]
    pub(crate) hostname: Option<String>,
    /// Directory or file of this host in the container; can be repeated
    #[arg(short, long, value_name = "SOURCE:DESTINATION[:ro]", value_parser = bind_mount)]
    pub(crate) volume: Vec<BindMount>,
    /// Image that the container finds read-only at PATH, attached when it starts and removed after it; can be repeated
    #[arg(short, long, value_name = "PATH=REF", value_parser = image_mount)]
    pub(crate) mount_image: Vec<(String, String)>,
    /// Device of this host, by a CDI specification of its vendor: its nodes, mounts, variables and hooks; can be repeated
    #[arg(long, value_name = "VENDOR/CLASS=NAME")]
    pub(crate) device: Vec<DeviceName>,
    /// Directories with CDI specifications, the one that counts most last; `:` between several
    #[arg(
        long = "cdi-dir",
        value_name = "DIR",
        env = "UBLKIMG_CDI_DIR",
        value_delimiter = ':',
        default_value = "/etc/cdi:/var/run/cdi"
    )]
    pub(crate) cdi_dirs: Vec<PathBuf>,
    /// Leave out the hooks, which keep the device from being removed while the container lives
    #[arg(long, conflicts_with = "mount_image")]
    pub(crate) no_hooks: bool,
    /// Use this host's network instead of one with nothing but loopback
    #[arg(long)]
    pub(crate) host_network: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Say what would be attached, mounted and written, and do nothing
    #[arg(long, conflicts_with = "json")]
    pub(crate) dry_run: bool,
    /// Print what was made as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The command to run (default: the image's own)
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// `SOURCE:DESTINATION[:ro|:rw]`, both absolute.
fn bind_mount(text: &str) -> Result<BindMount, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, destination, read_only) = match parts[..] {
        [source, destination] | [source, destination, "rw"] => (source, destination, false),
        [source, destination, "ro"] => (source, destination, true),
        _ => return Err(format!("{text:?} is not SOURCE:DESTINATION[:ro]")),
    };
    if !source.starts_with('/') || !destination.starts_with('/') {
        return Err(format!("{text:?}: both paths must be absolute"));
    }
    Ok(BindMount { source: source.into(), destination: destination.to_owned(), read_only })
}

/// `PATH=REF`, the path absolute.
fn image_mount(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((path, reference)) if path.starts_with('/') && !reference.is_empty() => {
            Ok((path.to_owned(), reference.to_owned()))
        }
        _ => Err(format!("{text:?} is not PATH=REF with an absolute path")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_the_host() {
        let mount = bind_mount("/a:/b:ro").unwrap();
        assert_eq!((mount.source, &*mount.destination, mount.read_only), (PathBuf::from("/a"), "/b", true));
        assert!(!bind_mount("/a:/b").unwrap().read_only);
        for text in ["/a", "a:/b", "/a:b", "/a:/b:x", "/a:/b:ro:x"] {
            assert!(bind_mount(text).is_err(), "{text}");
        }
    }

    #[test]
    fn images_in_the_container() {
        assert_eq!(image_mount("/m=r/x:1").unwrap(), ("/m".to_owned(), "r/x:1".to_owned()));
        for text in ["/m", "m=r", "/m="] {
            assert!(image_mount(text).is_err(), "{text}");
        }
    }
}
