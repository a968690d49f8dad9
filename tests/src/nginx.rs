//! nginx as the cache of docs/mirrors.md, started for one test with the configuration that stands there.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::http::Connection;

/// The page with the configuration.
const PAGE: &str = include_str!("../../docs/mirrors.md");

/// How long it remembers whom the registry lets in; shorter than on the page, which a test would have to wait for.
pub const ACCESS_VALID: Duration = Duration::from_secs(1);

/// It takes about 20 ms on an idle machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A port that somebody else took between choosing and listening is a reason to choose another.
const ATTEMPTS: u32 = 5;

/// A running nginx; ends when dropped.
pub struct Nginx {
    process: Child,
    address: SocketAddr,
}

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
        let mut outcome = Self::start_once(dir, registry);
        for _ in 1..ATTEMPTS {
            if outcome.is_ok() {
                break;
            }
            outcome = Self::start_once(dir, registry);
        }
        outcome
    }

    fn start_once(dir: &Path, registry: SocketAddr) -> anyhow::Result<Self> {
        let free_port = || TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let (address, inner) = (free_port()?, free_port()?);
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("image-cache.conf"), configuration(dir, registry, address, inner)?)?;
        // What Debian's own nginx.conf says, as far as it matters, with all that is written below `dir`.
        let temporary =
            ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|of| format!("{of}_temp_path {of};\n"));
        let main = format!(
            "worker_processes 2;\npid nginx.pid;\nerror_log error.log;\nevents {{}}\n\
             http {{\naccess_log access.log;\n{}include image-cache.conf;\n}}\n",
            temporary.concat()
        );
        std::fs::write(dir.join("nginx.conf"), main)?;
        let process = Command::new("nginx")
            .args(["-e", "error.log", "-g", "daemon off;", "-c", "nginx.conf", "-p"])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("nginx")?;
        let mut nginx = Self { process, address };
        let deadline = Instant::now() + START_TIMEOUT;
        while Connection::open(address).and_then(|mut client| client.get("/v2/")).is_err() {
            if Instant::now() > deadline || nginx.process.try_wait()?.is_some() {
                let log = std::fs::read_to_string(dir.join("error.log")).unwrap_or_default();
                bail!("nginx does not answer; its log:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(nginx)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Not the child's own `kill`, which would leave the workers. Fails only when it has ended already.
        if let Ok(Some(pid)) = i32::try_from(self.process.id()).map(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        drop(self.process.wait());
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
