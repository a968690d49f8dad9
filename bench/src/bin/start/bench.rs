//! One machine for all arms: a registry in this process behind a shaped link, and hosts that begin with nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::runtime::Runtime;
use ublkimg_image::Sha256;
use ublkimg_registry::{Digest, Location};
use ublkimg_tests::registry::{Config, LinkConfig, TestRegistry};
use ublkimg_tests::start::classic;
use ublkimg_tests::start::cleanup::Mount;
use ublkimg_tests::start::container::Bundle;
use ublkimg_tests::start::program::{Attached, Ublkimg};

use crate::figures::{FirstReads, Sample};
use crate::processor::{self, Spent};
use crate::workload::{Start, Workload};

/// A start of some seconds; on a guest's processor, over a slow link, a hundred times that.
const READY_LIMIT: Duration = Duration::from_secs(600);

/// For what the container writes.
const SCRATCH_MB: u32 = 256;

/// Room for two stores and an exported image, and for what daemons leave free; the file is sparse.
const DISK_BYTES: u64 = 16 << 30;

/// Directory of the host with the full store.
const FULL: &str = "full";

/// The one device of a host.
pub(crate) const DEVICE: &str = "start";

pub(crate) struct Bench {
    pub(crate) registry: Arc<TestRegistry>,
    /// Digests of the images' metadata blobs, which an attach reads whole.
    metadata: BTreeSet<String>,
    /// Rate in Mbit/s and delay each way in ms.
    pub(crate) link: (u64, u64),
    work: PathBuf,
    /// The file system that `work` is on, if it has one of its own.
    _disk: Option<Mount>,
    program: PathBuf,
    transport: String,
    read_ahead_kb: u32,
    knows_link: bool,
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
    /// All that a host has lies on a block device.
    pub(crate) has_disk: bool,
    /// A host keeps what the one before it found out about the link.
    pub(crate) knows_link: bool,
}

impl Bench {
    /// Starts the registry, with the source and the converted images that the workloads need.
    pub(crate) fn new(setup: &Setup<'_>, workloads: &[Workload]) -> Result<Self> {
        let disk = if setup.has_disk { Some(disk(setup.work)?) } else { None };
        let registry = TestRegistry::start(Config::default())?;
        for Workload { image, .. } in workloads {
            let erofs = setup.images.join("erofs");
            registry
                .load_layout(&setup.images.join(image), Some("latest"), image, "source")
                .and_then(|_digest| registry.load_layout(&erofs, Some(image), image, "v1"))
                .with_context(|| format!("no image {image} in {}", setup.images.display()))?;
        }
        let metadata =
            workloads.iter().map(|workload| metadata_digest(&registry, workload.image)).collect::<Result<_>>()?;
        Ok(Self {
            registry: Arc::new(registry),
            metadata,
            link: setup.link,
            work: setup.work.to_owned(),
            _disk: disk,
            program: setup.program.to_owned(),
            transport: setup.transport.to_owned(),
            read_ahead_kb: setup.read_ahead_kb,
            knows_link: setup.knows_link,
            runtime: Runtime::new()?,
        })
    }

    /// The converted image.
    pub(crate) fn image(&self, workload: &Workload) -> String {
        self.registry.reference(workload.image, "v1")
    }

    /// Where the image lies as one file.
    pub(crate) fn exported(&self, workload: &Workload) -> PathBuf {
        self.work.join(format!("{}.erofs", workload.image))
    }

    /// Writes the image as one file.
    pub(crate) fn export(&self, workload: &Workload) -> Result<()> {
        let file = self.exported(workload);
        let file = file.to_str().context("a path that is not UTF-8")?;
        self.unshape();
        self.full_host().ublkimg.call(&["export", &self.image(workload), file]).map(|_stdout| ())
    }

    /// Options of an `add` that is recorded as the profiles are.
    pub(crate) fn recorded(&self) -> [String; 4] {
        ["--profile", "none", "--read-ahead-kb", &self.read_ahead_kb.to_string()].map(str::to_owned)
    }

    /// Where all that is made lies.
    pub(crate) fn work(&self) -> &Path {
        &self.work
    }

    /// What happened in the last start of an attached image.
    pub(crate) fn events_file(&self) -> PathBuf {
        self.work.join("start.events")
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
        let link = dir.join("store").join("links.json");
        let known = if self.knows_link { std::fs::read(&link).ok() } else { None };
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        std::fs::create_dir_all(dir.join("store"))?;
        if let Some(known) = known {
            std::fs::write(&link, known).with_context(|| format!("cannot write {}", link.display()))?;
        }
        Ok(self.host_in(dir))
    }

    fn host_in(&self, dir: PathBuf) -> Host<'_> {
        let ublkimg = Ublkimg { program: self.program.clone(), root: dir.join("store"), run_dir: dir.join("run") };
        Host { bench: self, dir, ublkimg }
    }
}

/// Puts an empty file system on `work`, on a block device whose data lies beside it.
fn disk(work: &Path) -> Result<Mount> {
    let file = work.with_extension("disk");
    std::fs::File::create(&file)?.set_len(DISK_BYTES)?;
    let made = Command::new("mkfs.ext4").arg("-q").arg(&file).status().context("cannot run mkfs.ext4")?;
    ensure!(made.success(), "mkfs.ext4 ended with {made}");
    let mounted = Mount::loop_device(&file, work, "ext4", "rw");
    // It stays for as long as it is mounted.
    std::fs::remove_file(&file)?;
    mounted
}

/// The digest of the metadata blob of a converted image: the last of its layers.
fn metadata_digest(registry: &TestRegistry, image: &str) -> Result<String> {
    let parsed = |bytes: Option<bytes::Bytes>| -> Result<Value> {
        Ok(serde_json::from_slice(&bytes.with_context(|| format!("{image} is not in the registry"))?)?)
    };
    let mut manifest = parsed(registry.manifest(image, "v1")?)?;
    if let Some(digest) = manifest["manifests"][0]["digest"].as_str() {
        let digest: Digest = digest.parse()?;
        manifest = parsed(registry.contents(image, Sha256(digest.0))?)?;
    }
    let last = manifest["layers"].as_array().and_then(|layers| layers.last());
    last.and_then(|layer| layer["digest"].as_str()).map(str::to_owned).context("an image without layers")
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
        let (began, spent) = (Instant::now(), Spent::so_far()?);
        let attached = self.add(image, options)?;
        let mut status = None;
        let mut sample = self.run(&bundle, start, &[&attached.mount_point], (began, spent), || {
            self.ublkimg.call(&["ready", DEVICE])?;
            let events = self.bench.events_file();
            let events = events.to_str().context("a path that is not UTF-8")?;
            let said = self.ublkimg.call(&["status", DEVICE, "--json", "--events", events])?;
            status = Some(serde_json::from_str(&said).with_context(|| format!("status printed {said:?}"))?);
            at_ready()
        })?;
        sample.reads = status.as_ref().map(FirstReads::of);
        sample.duplicates = status.as_ref().and_then(|status| status["start"]["duplicates"].as_u64());
        sample.status = status;
        Ok(sample)
    }

    /// A measured start from layers that are pulled and unpacked.
    pub(crate) fn pull(&self, workload: &Workload) -> Result<Sample> {
        let bundle = self.bundle(&workload.start)?;
        self.cold()?;
        let (began, spent) = (Instant::now(), Spent::so_far()?);
        let source: Location = self.bench.registry.reference(workload.image, "source").parse()?;
        let layers = self.bench.runtime.block_on(classic::pull(&source, &self.dir.join("layers")))?;
        let lower: Vec<&Path> = layers.iter().rev().map(PathBuf::as_path).collect();
        self.run(&bundle, &workload.start, &lower, (began, spent), || Ok(()))
    }

    /// A measured start from the exported image, over a loop device.
    pub(crate) fn mounted(&self, workload: &Workload) -> Result<Sample> {
        let (bundle, file) = (self.bundle(&workload.start)?, self.bench.exported(workload));
        self.cold()?;
        let (began, spent) = (Instant::now(), Spent::so_far()?);
        let dir = self.dir.join("image");
        let _mounted = Mount::loop_device(&file, &dir, "erofs", "ro")?;
        self.run(&bundle, &workload.start, &[&dir], (began, spent), || Ok(()))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn add(&self, image: &str, options: &[&str]) -> Result<Attached> {
        let mut all = vec!["--transport", self.bench.transport.as_str()];
        if !options.contains(&"--warm") {
            all.extend(["--warm", "off"]);
        }
        all.extend(options);
        self.ublkimg.add(image, DEVICE, &self.dir.join("image"), &all)
    }

    fn run(
        &self,
        bundle: &Bundle,
        start: &Start,
        lower: &[&Path],
        (began, spent): (Instant, Spent),
        at_ready: impl FnOnce() -> Result<()>,
    ) -> Result<Sample> {
        let scratch = self.dir.join("scratch");
        let _scratch = Mount::tmpfs(&scratch, SCRATCH_MB)?;
        let _rootfs = Mount::overlay(&bundle.rootfs(), lower, &scratch)?;
        let attach = began.elapsed();
        let running = bundle.start(&format!("ublkimg-start-{}", std::process::id()), start.ready, READY_LIMIT)?;
        // While it still runs: to end it takes time too.
        let now = Spent::so_far()?;
        let stats = self.bench.registry.stats();
        let decode = processor::of_decoding(&self.ublkimg.run_dir)?;
        at_ready()?;
        let first_us = stats.blobs.iter().filter(|(digest, _)| !self.bench.metadata.contains(*digest));
        let first_us = first_us.map(|(_, blob)| blob.first_request_us).min();
        // A request that comes there was sent one delay earlier.
        let sent_us = first_us.map(|first_us| first_us.saturating_sub(self.bench.link.1 * 1000));
        let fetch_us = sent_us.map_or(0, |sent_us| stats.delivered_us.saturating_sub(sent_us));
        Ok(Sample {
            fetch_seconds: Duration::from_micros(fetch_us).as_secs_f64(),
            ready_seconds: (attach + running.took).as_secs_f64(),
            attach_seconds: attach.as_secs_f64(),
            bytes: stats.bytes_sent,
            requests: stats.requests.values().sum(),
            duplicate_bytes: stats.duplicate_bytes,
            busy_seconds: now.machine.saturating_sub(spent.machine).as_secs_f64(),
            registry_seconds: now.own.saturating_sub(spent.own).as_secs_f64(),
            decode_seconds: decode.as_secs_f64(),
            reads: None,
            duplicates: None,
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
