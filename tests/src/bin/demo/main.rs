//! The demonstration: one container, started twice from an image that is not on this machine, once by pulling it whole and
//! once through `ublkimg add`, over the same shaped link to a registry in this process. Ends with a table, and with exit
//! code 1 if a container failed or if the lazy start fetched a large part of the image after all.

mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use ublkimg_tests::registry::{Config, LinkConfig, TestRegistry};
use ublkimg_tests::start::cleanup::Mount;
use ublkimg_tests::start::container::{Bundle, Ready};
use ublkimg_tests::start::program::Ublkimg;
use ublkimg_tests::start::{classic, push};

use table::{Figures, Reads, Table};

/// A start that fetches this share of the layers is not lazy. `import numpy` needs about a quarter of the demo's image.
const LARGE_PART_PERCENT: u64 = 40;

/// The container's command takes a second or two; on a slow emulated machine a hundred times that.
const CONTAINER_LIMIT: Duration = Duration::from_secs(300);

/// For what the container writes: logs, compiled modules.
const SCRATCH_MB: u32 = 256;

/// Starts one container twice, pulled whole and attached lazily, and compares.
#[derive(Debug, Parser)]
struct Arguments {
    /// The source image: an OCI layout with the tag "latest"
    #[arg(long, default_value = "target/demo/source", value_name = "DIR")]
    source: PathBuf,
    /// A directory for this run; what is in it is deleted
    #[arg(long, default_value = "target/demo/run", value_name = "DIR")]
    work: PathBuf,
    /// Rate of the link to the registry; 0 = no limit
    #[arg(long, default_value_t = 100)]
    rate_mbit: u64,
    /// Delay of the link each way
    #[arg(long, default_value_t = 20)]
    delay_ms: u64,
    /// Passed on to `ublkimg add`
    #[arg(long, default_value = "auto")]
    transport: String,
    /// The program; default: beside this one
    #[arg(long, value_name = "FILE")]
    ublkimg: Option<PathBuf>,
    /// The container's command
    #[arg(last = true, default_values = ["python3", "-c", "import numpy"])]
    command: Vec<String>,
}

fn main() -> ExitCode {
    match Demo::prepare(Arguments::parse()).and_then(|demo| demo.run().and_then(|()| demo.remove_work())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Demo {
    arguments: Arguments,
    work: PathBuf,
    runtime: Runtime,
    registry: TestRegistry,
    ublkimg: Ublkimg,
    interrupted: Arc<AtomicBool>,
}

impl Demo {
    fn prepare(arguments: Arguments) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "mounts and containers need root");
        let program = match &arguments.ublkimg {
            Some(program) => program.clone(),
            None => std::env::current_exe()?.with_file_name("ublkimg"),
        };
        ensure!(program.exists(), "there is no {}", program.display());
        if arguments.work.exists() {
            std::fs::remove_dir_all(&arguments.work)
                .with_context(|| format!("cannot empty {}", arguments.work.display()))?;
        }
        std::fs::create_dir_all(&arguments.work)?;
        let work = arguments.work.canonicalize()?;
        let runtime = Runtime::new()?;
        let interrupted = Arc::new(AtomicBool::new(false));
        for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
            let flag = Arc::clone(&interrupted);
            let _entered = runtime.enter();
            let mut signals = signal(kind)?;
            runtime.spawn(async move {
                while signals.recv().await.is_some() {
                    flag.store(true, Ordering::Relaxed);
                }
            });
        }
        let registry = TestRegistry::start(Config { store_dir: Some(work.join("registry")), ..Config::default() })?;
        let ublkimg = Ublkimg { program, root: work.join("store"), run_dir: work.join("daemon") };
        Ok(Self { arguments, work, runtime, registry, ublkimg, interrupted })
    }

    fn run(&self) -> Result<()> {
        let source = self.registry.reference("demo", "latest");
        let image = self.registry.reference("demo", "ublkimg");
        self.step("pushing the source image to a local registry")?;
        let layers_bytes = self.runtime.block_on(push::layout(&self.arguments.source, &source.parse()?))?;
        self.step("ublkimg convert")?;
        self.ublkimg.convert(&source, &image)?;

        let Arguments { rate_mbit, delay_ms, command, .. } = &self.arguments;
        eprintln!("demo: the link has {rate_mbit} Mbit/s and {delay_ms} ms each way; the command is {command:?}");
        self.registry.set_link(LinkConfig::new(*rate_mbit, *delay_ms));
        self.step("pull the image whole, unpack it, start")?;
        let classic = self.classic(&source).context("the classic start failed")?;
        self.step("ublkimg add, start")?;
        let lazy = self.lazy(&image).context("the lazy start failed")?;
        self.step("done")?;

        let percent = lazy.fetched_bytes * 100 / layers_bytes.max(1);
        print!("{}", Table { classic: &classic, lazy: &lazy });
        println!("The lazy start fetched {percent} % of the image's {}.", table::megabytes(layers_bytes));
        if percent >= LARGE_PART_PERCENT {
            bail!("the lazy start fetched {percent} % of the image; less than {LARGE_PART_PERCENT} % was expected");
        }
        Ok(())
    }

    fn classic(&self, source: &str) -> Result<Figures> {
        let bundle = self.bundle("classic")?;
        self.cold();
        let began = Instant::now();
        let layers = self.runtime.block_on(classic::pull(&source.parse()?, &self.work.join("classic/layers")))?;
        let lower: Vec<&Path> = layers.iter().rev().map(PathBuf::as_path).collect();
        self.start(&bundle, "classic", &lower, began)
            .map(|figures| Figures { transport: "whole layers".to_owned(), ..figures })
    }

    fn lazy(&self, image: &str) -> Result<Figures> {
        let bundle = self.bundle("lazy")?;
        self.cold();
        let began = Instant::now();
        let mount_point = self.work.join("lazy/image");
        let attached = self.ublkimg.add(image, "demo", &mount_point, &["--transport", &self.arguments.transport])?;
        let figures = self.start(&bundle, "lazy", &[&attached.mount_point], began)?;
        let status = self.ublkimg.status("demo")?;
        let count = |name: &str| {
            let value = status["counters"][name].as_u64();
            value.with_context(|| format!("status has no counter {name}: {status}"))
        };
        let reads = Some(Reads { hit: count("hits")?, missed: count("misses")? });
        let transport = status["transport"].as_str().unwrap_or("?");
        Ok(Figures { reads, transport: format!("{transport} {}", attached.device), ..figures })
    }

    /// The common second half: an overlay over `lower`, and the container in it.
    fn start(&self, bundle: &Bundle, name: &str, lower: &[&Path], began: Instant) -> Result<Figures> {
        let scratch = self.work.join(name).join("scratch");
        let _scratch = Mount::tmpfs(&scratch, SCRATCH_MB)?;
        let _rootfs = Mount::overlay(&bundle.rootfs(), lower, &scratch)?;
        let prepare = began.elapsed();
        let run =
            bundle.start(&format!("ublkimg-demo-{name}-{}", std::process::id()), Ready::Exit, CONTAINER_LIMIT)?.took;
        let stats = self.registry.stats();
        Ok(Figures {
            prepare,
            run,
            fetched_bytes: stats.bytes_sent,
            requests: stats.requests.values().sum(),
            reads: None,
            transport: String::new(),
        })
    }

    fn bundle(&self, name: &str) -> Result<Bundle> {
        let env = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
        let dir = self.work.join(name).join("bundle");
        Bundle::create(&dir, &self.work.join("runc"), &self.arguments.command, &env)
    }

    /// Nothing of the image in the page cache, and counters at zero.
    fn cold(&self) {
        rustix::fs::sync();
        if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "3") {
            eprintln!("demo: the page cache cannot be dropped here ({error}); both starts are a little too fast");
        }
        self.registry.reset_stats();
    }

    /// After a failure the directory stays, with the daemon's log in it.
    fn remove_work(&self) -> Result<()> {
        std::fs::remove_dir_all(&self.work).with_context(|| format!("cannot remove {}", self.work.display()))
    }

    fn step(&self, what: &str) -> Result<()> {
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        eprintln!("demo: {what}");
        Ok(())
    }
}
