//! The test registry as a program, for demos, guests and trying things out.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use clap::Parser;
use ublkimg_tests::registry::{Auth, Config, Credentials, LinkConfig, TestRegistry};

/// An OCI registry with a shaped link. Counters: GET /_stats, POST /_stats/reset. Faults: POST /_faults.
#[derive(Parser)]
#[command(name = "test-registry")]
struct Arguments {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,

    /// An image to serve, from an OCI layout directory. May be given several times.
    #[arg(long, value_name = "NAME[:TAG]=DIR[:TAG]")]
    load: Vec<Load>,

    /// Delay each way.
    #[arg(long, value_name = "N", default_value_t = 0)]
    delay_ms: u64,

    /// Rate of the bottleneck that all answers pass; 0 = no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    rate_mbit: u64,

    /// Keep what is pushed in this directory instead of in memory.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Ask for this user and password (Basic).
    #[arg(long, value_name = "USER:PASSWORD")]
    user: Option<String>,

    /// Have no referrers API, as docker's registry.
    #[arg(long)]
    no_referrers: bool,
}

/// An image of a layout, and the name it gets.
#[derive(Clone)]
struct Load {
    repository: String,
    tag: String,
    layout: PathBuf,
    layout_tag: Option<String>,
}

impl FromStr for Load {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let Some((name, layout)) = text.split_once('=') else { bail!("NAME[:TAG]=DIR[:TAG] is expected") };
        let (repository, tag) = name.rsplit_once(':').unwrap_or((name, "latest"));
        // A directory may have a colon in its name.
        let (layout, layout_tag) = match layout.rsplit_once(':') {
            Some((dir, tag)) if !Path::new(layout).exists() => (dir, Some(tag.to_owned())),
            _ => (layout, None),
        };
        Ok(Self { repository: repository.into(), tag: tag.into(), layout: layout.into(), layout_tag })
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let auth = match arguments.user.as_deref().map(|user| user.split_once(':').context("--user USER:PASSWORD")) {
        Some(user) => {
            let (user, password) = user?;
            Auth::Basic(Credentials::new(user, password))
        }
        None => Auth::Anonymous,
    };
    let registry = TestRegistry::start(Config {
        listen: arguments.listen,
        link: LinkConfig::new(arguments.rate_mbit, arguments.delay_ms),
        auth,
        store_dir: arguments.store,
        referrers: !arguments.no_referrers,
    })?;
    for load in &arguments.load {
        registry.load_layout(&load.layout, load.layout_tag.as_deref(), &load.repository, &load.tag)?;
    }
    println!("listening on http://{}", registry.addr());
    std::io::stdout().flush()?;
    loop {
        std::thread::park();
    }
}
