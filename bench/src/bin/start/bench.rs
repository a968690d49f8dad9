//! One machine for all arms: a registry in this process behind a shaped link, and hosts that begin with nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::runtime::Runtime;
use ublkimg_registry::Location;
use ublkimg_tests::registry::{Config, LinkConfig, TestRegistry};
use ublkimg_tests::start::classic;
use ublkimg_tests::start::cleanup::Mount;
use ublkimg_tests::start::container::Bundle;
use ublkimg_tests::start::program::{Attached, Ublkimg};

use crate::figures::{FirstReads, Sample};
use crate::workload::{Start, Workload};

/// A start of some seconds; on a guest's processor, over a slow link, a hundred times that.
const READY_LIMIT: Duration = Duration::from_secs(600);

/// For what the container writes.
const SCRATCH_MB: u32 = 256;

/// Directory of the host with the full store.
const FULL: &str = "full";

/// The one device of a host.
pub(crate) const DEVICE: &str = "start";

pub(crate) struct Bench {
    pub(crate) registry: Arc<TestRegistry>,
    /// Rate in Mbit/s and delay each way in ms.
    pub(crate) link: (u64, u64),
    work: PathBuf,
    program: PathBuf,
    transport: String,
    read_ahead_kb: u32,
    runtime: Runtime,
}

/// How a bench is set up.
pub(crate) struct Setup<'a> {
    pub(crate) images: &'a Path,
    pub(crate) work: &'a Path,
    pub(crate) program: &'a Path,
    pub(crate) transport: &'a str,
    pub(crate) link: (u64, u64),
    pub(crate) read_ahead_kb: u32,
}

impl Bench {
    /// Starts the registry, with the source and the converted images that the workloads need.
    pub(crate) fn new(setup: &Setup<'_>, workloads: &[Workload]) -> Result<Self> {
        let registry = TestRegistry::start(Config::default())?;
        for Workload { image, .. } in workloads {
            let erofs = setup.images.join("erofs");
            registry
                .load_layout(&setup.images.join(image), Some("latest"), image, "source")
                .and_then(|_digest| registry.load_layout(&erofs, Some(image), image, "v1"))
                .with_context(|| format!("no image {image} in {}", setup.images.display()))?;
        }
        Ok(Self {
            registry: Arc::new(registry),
            link: setup.link,
            work: setup.work.to_owned(),
            program: setup.program.to_owned(),
            transport: setup.transport.to_owned(),
            read_ahead_kb: setup.read_ahead_kb,
            runtime: Runtime::new()?,
        })
    }

    /// The converted image.
    pub(crate) fn image(&self, workload: &Workload) -> String {
        self.registry.reference(workload.image, "v1")
    }

    /// Options of an `add` that is recorded as the profiles are.
    pub(crate) fn recorded(&self) -> [String; 4] {
        ["--profile", "none", "--read-ahead-kb", &self.read_ahead_kb.to_string()].map(str::to_owned)
    }

    pub(crate) fn shape(&self) {
        self.registry.set_link(LinkConfig::new(self.link.0, self.link.1));
    }

    /// No limits: for what is not measured.
    pub(crate) fn unshape(&self) {
        self.registry.set_link(LinkConfig::default());
    }

    /// A host without a store and without a daemon; what the one before it left is deleted.
    pub(crate) fn host(&self) -> Result<Host<'_>> {
        self.new_host("host")
    }

    /// The same, for a store that is to be filled and kept.
    pub(crate) fn new_full_host(&self) -> Result<Host<'_>> {
        self.new_host(FULL)
    }

    /// The host whose store was filled.
    pub(crate) fn full_host(&self) -> Host<'_> {
        self.host_in(self.work.join(FULL))
    }

    fn new_host(&self, name: &str) -> Result<Host<'_>> {
        let dir = self.work.join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        std::fs::create_dir_all(&dir)?;
        Ok(self.host_in(dir))
    }

    fn host_in(&self, dir: PathBuf) -> Host<'_> {
        let ublkimg = Ublkimg { program: self.program.clone(), root: dir.join("store"), run_dir: dir.join("run") };
        Host { bench: self, dir, ublkimg }
    }
}

/// A machine on which nothing of the image is yet, or all of it.
pub(crate) struct Host<'a> {
    bench: &'a Bench,
    dir: PathBuf,
    pub(crate) ublkimg: Ublkimg,
}

impl Host<'_> {
    /// Attaches `image` and runs `before_detach` while it is attached, without a measurement.
    pub(crate) fn attached<T>(
        &self,
        image: &str,
        options: &[&str],
        before_detach: impl FnOnce(&Ublkimg) -> Result<T>,
    ) -> Result<T> {
        let _attached = self.add(image, options)?;
        before_detach(&self.ublkimg)
    }

    /// A measured start from an attached image; `at_ready` runs when it is ready.
    pub(crate) fn start(
        &self,
        image: &str,
        options: &[&str],
        start: &Start,
        at_ready: impl FnOnce() -> Result<()>,
    ) -> Result<Sample> {
        let bundle = self.bundle(start)?;
        self.cold()?;
        let (began, busy) = (Instant::now(), busy_time()?);
        let attached = self.add(image, options)?;
        let mut status = None;
        let mut sample = self.run(&bundle, start, &[&attached.mount_point], (began, busy), || {
            self.ublkimg.call(&["ready", DEVICE])?;
            status = Some(self.ublkimg.status(DEVICE)?);
            at_ready()
        })?;
        sample.reads = status.as_ref().map(FirstReads::of);
        sample.status = status;
        Ok(sample)
    }

    /// A measured start from layers that are pulled and unpacked.
    pub(crate) fn pull(&self, workload: &Workload) -> Result<Sample> {
        let bundle = self.bundle(&workload.start)?;
        self.cold()?;
        let (began, busy) = (Instant::now(), busy_time()?);
        let source: Location = self.bench.registry.reference(workload.image, "source").parse()?;
        let layers = self.bench.runtime.block_on(classic::pull(&source, &self.dir.join("layers")))?;
        let lower: Vec<&Path> = layers.iter().rev().map(PathBuf::as_path).collect();
        self.run(&bundle, &workload.start, &lower, (began, busy), || Ok(()))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn add(&self, image: &str, options: &[&str]) -> Result<Attached> {
        let mut all = vec!["--transport", self.bench.transport.as_str()];
        all.extend(options);
        self.ublkimg.add(image, DEVICE, &self.dir.join("image"), &all)
    }

    fn run(
        &self,
        bundle: &Bundle,
        start: &Start,
        lower: &[&Path],
        (began, busy): (Instant, Duration),
        at_ready: impl FnOnce() -> Result<()>,
    ) -> Result<Sample> {
        let scratch = self.dir.join("scratch");
        let _scratch = Mount::tmpfs(&scratch, SCRATCH_MB)?;
        let _rootfs = Mount::overlay(&bundle.rootfs(), lower, &scratch)?;
        let attach = began.elapsed();
        let running = bundle.start(&format!("ublkimg-start-{}", std::process::id()), start.ready, READY_LIMIT)?;
        // While it still runs: to end it takes time too.
        let busy = busy_time()?.saturating_sub(busy);
        let stats = self.bench.registry.stats();
        at_ready()?;
        Ok(Sample {
            ready_seconds: (attach + running.took).as_secs_f64(),
            attach_seconds: attach.as_secs_f64(),
            bytes: stats.bytes_sent,
            requests: stats.requests.values().sum(),
            duplicate_bytes: stats.duplicate_bytes,
            busy_seconds: busy.as_secs_f64(),
            reads: None,
            trouble: None,
            status: None,
        })
    }

    fn bundle(&self, start: &Start) -> Result<Bundle> {
        let env = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
        Bundle::create(&self.dir.join("bundle"), &self.dir.join("runc"), &start.command, &env)
    }

    /// Nothing in the page cache; counters at zero; the link shaped.
    fn cold(&self) -> Result<()> {
        rustix::fs::sync();
        std::fs::write("/proc/sys/vm/drop_caches", "3").context("the page cache cannot be dropped here")?;
        self.bench.shape();
        self.bench.registry.reset_stats();
        Ok(())
    }
}

/// Processor time that this machine has spent on anything but idling.
fn busy_time() -> Result<Duration> {
    /// Units of /proc/stat per second, on every architecture.
    const TICKS_PER_S: f64 = 100.0;
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    ensure!(fields.len() >= 8, "/proc/stat has {} figures", fields.len());
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy_ticks = fields[..3].iter().chain(&fields[5..7]).sum::<u64>();
    Ok(Duration::from_secs_f64(f64::from(u32::try_from(busy_ticks)?) / TICKS_PER_S))
}
