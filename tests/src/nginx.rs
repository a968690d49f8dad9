//! nginx as the cache of docs/mirrors.md, started for one test with the configuration that stands there.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::foreign_server::{ForeignServer, free_address};

/// The page with the configuration.
const PAGE: &str = include_str!("../../docs/mirrors.md");

/// How long it remembers whom the registry lets in; shorter than on the page, which a test would have to wait for.
pub const ACCESS_VALID: Duration = Duration::from_secs(1);

/// A running nginx; ends when dropped.
pub struct Nginx(ForeignServer);

impl Nginx {
    /// Whether the program is installed, and can cut answers into slices.
    pub fn is_installed() -> bool {
        let said = Command::new("nginx").arg("-V").output();
        said.is_ok_and(|said| String::from_utf8_lossy(&said.stderr).contains("--with-http_slice_module"))
    }

    /// An empty cache of `registry`, with its files below `dir`; it answers when this returns.
    ///
    /// # Errors
    ///
    /// The page has no configuration, or nginx does not start with it.
    pub fn start_cache(dir: &Path, registry: SocketAddr) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let command = |address| {
            let pages = configuration(dir, registry, address, free_address()?)?;
            std::fs::write(dir.join("image-cache.conf"), pages)?;
            // What Debian's own nginx.conf says, as far as it matters, with all that is written below `dir`.
            let temporary =
                ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|of| format!("{of}_temp_path {of};\n"));
            let main = format!(
                "worker_processes 2;\npid nginx.pid;\nerror_log error.log;\nevents {{}}\n\
                 http {{\naccess_log access.log;\n{}include image-cache.conf;\n}}\n",
                temporary.concat()
            );
            std::fs::write(dir.join("nginx.conf"), main)?;
            let mut command = Command::new("nginx");
            command.args(["-e", "error.log", "-g", "daemon off;", "-c", "nginx.conf", "-p"]).arg(dir);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            Ok(command)
        };
        ForeignServer::start(command, &dir.join("error.log")).map(Self)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }
}

/// The page's configuration with other places in it.
fn configuration(dir: &Path, registry: SocketAddr, address: SocketAddr, inner: SocketAddr) -> anyhow::Result<String> {
    let block = PAGE.split_once("```nginx\n").and_then(|(_, rest)| rest.split_once("```\n")).map(|(block, _)| block);
    let mut text = block.context("docs/mirrors.md has no configuration for nginx")?.to_owned();
    let places = [
        ("https://registry;", "http://registry;".to_owned()),
        ("registry.example:443", registry.to_string()),
        ("registry.example", registry.to_string()),
        ("listen 5000;", format!("listen {address};")),
        ("127.0.0.1:5001", inner.to_string()),
        ("200 10s;", format!("200 {}s;", ACCESS_VALID.as_secs())),
        ("/var/cache/nginx/images", dir.join("images").display().to_string()),
    ];
    for (of_page, of_test) in places {
        if !text.contains(of_page) {
            bail!("the configuration of docs/mirrors.md does not say {of_page:?}");
        }
        text = text.replace(of_page, &of_test);
    }
    Ok(text)
}
