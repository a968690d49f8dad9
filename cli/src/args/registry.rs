//! How registries are spoken to.

use std::path::PathBuf;

use clap::Args;

/// How registries are spoken to.
#[derive(Clone, Debug, Args)]
pub(crate) struct RegistryOptions {
    /// Speak plain HTTP also to registries that are not on this machine
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// Read credentials from this file (docker's config.json or containers' auth.json)
    #[arg(long, value_name = "FILE", env = "REGISTRY_AUTH_FILE")]
    pub(crate) auth_file: Option<PathBuf>,
    /// Directories with HOST/hosts.toml, which names the mirrors of a registry as containerd has it; `:` between several
    #[arg(
        long = "hosts-dir",
        value_name = "DIR",
        env = "UBLKIMG_HOSTS_DIR",
        value_delimiter = ':',
        default_value = "/etc/ublkimg/certs.d",
        value_parser = super::absolute
    )]
    pub(crate) hosts_dirs: Vec<PathBuf>,
}
