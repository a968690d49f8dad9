//! The starts themselves.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::{Duration, Instant};

use ublkimg_convert::{ErrorKind as ConvertErrorKind, unpack};
use ublkimg_driver::daemon::client;
use ublkimg_driver::daemon::protocol::{ProfileRequest, Request, StartOptions};
use ublkimg_driver::device::Transport;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::start_events::StartEvent;
use ublkimg_registry::Location;
use ublkimg_registry::descriptor::Platform;

use super::super::trial::{self, Device, Interrupt, Readiness, Scratch};
use super::super::{add, events, image_config, record, status};
use super::host::{Host, Tree};
use super::sample::{FirstReads, Sample, Seen};
use crate::args::compare::Compare;
use crate::args::{Global, RECORD_READ_AHEAD_KB};
use crate::bundle::{ImageConfig, Overrides};

/// The one device of a host.
const DEVICE: &str = "compare";

/// What all starts have in common.
pub(super) struct Starts<'a> {
    global: &'a Global,
    command: &'a Compare,
    interrupt: &'a Interrupt,
    readiness: Readiness,
    source: Location,
    /// Where the unpacked image and the stores are.
    work: Tree,
    /// Where their mounts and sockets are.
    run: Tree,
    /// Known after the first lazy start, so that what is lacking here is said once.
    transport: Cell<Transport>,
    /// As started; the image may have said it.
    argv: RefCell<Vec<String>>,
}

impl<'a> Starts<'a> {
    pub(super) fn new(global: &'a Global, command: &'a Compare, interrupt: &'a Interrupt) -> anyhow::Result<Self> {
        let readiness = Readiness::of(&command.readiness)?;
        let source = super::super::location(command.from.as_ref().unwrap_or(&command.reference))?;
        let name = format!("compare-{}", std::process::id());
        let directories = super::super::directories(global)?;
        let work = command.workdir.as_deref().map_or(Ok(directories.root), super::super::absolute)?;
        Ok(Self {
            global,
            command,
            interrupt,
            readiness,
            source,
            work: Tree::create(work.join(&name))?,
            run: Tree::create(directories.run.join(&name))?,
            transport: Cell::new(add::transport(command.transport)),
            argv: RefCell::default(),
        })
    }

    /// The command that was started.
    pub(super) fn command(&self) -> Vec<String> {
        self.argv.borrow().clone()
    }

    /// Layers are pulled and unpacked, then the command is started.
    pub(super) fn full_pull(&self) -> anyhow::Result<Sample> {
        let tree = Tree::create(self.work.path().join("pulled"))?;
        let scratch = Scratch::create(self.run.path().join("pulled"))?;
        cold();
        let began = Instant::now();
        let runtime = super::super::runtime()?;
        let client = super::super::client_options(&self.command.registry);
        let platform = Platform::host();
        let pulled = runtime.block_on(async {
            tokio::select! {
                pulled = unpack(&self.source, &client, &platform, tree.path(), self.work.path()) => {
                    pulled.map_err(|error| self.with_way_out(error))
                }
                interrupted = self.interrupt.came() => Err(interrupted.into()),
            }
        });
        // Downloads that nobody waits for any more end by themselves.
        runtime.shutdown_background();
        let pulled = pulled?;
        let config = serde_json::from_slice(&pulled.config).map_err(|error| {
            Error::caused(ErrorKind::Corrupt, format!("the config of {} cannot be read", self.source), error)
        })?;
        let (root, ready) = self.run(&scratch, tree.path(), &config, began, || Ok(()))?;
        let fetched_bytes = pulled.stored_bytes + pulled.config.len() as u64;
        Ok(sample(root, ready, fetched_bytes, None))
    }

    /// The image is attached, then the command is started.
    pub(super) fn lazy(&self, profile: &ProfileRequest) -> anyhow::Result<Sample> {
        self.attached(profile, None)
    }

    /// What the starts with a profile follow: what was wanted, if the image lists it; else the trace of a start made now.
    pub(super) fn profile(&self, wanted: &ProfileRequest) -> anyhow::Result<ProfileRequest> {
        if *wanted != ProfileRequest::Auto {
            return Ok(wanted.clone());
        }
        let trace = self.work.path().join("start.trace");
        let start = self.attached(wanted, Some(&trace))?;
        if start.seen.is_some_and(|seen| seen.figures.profile.is_some()) {
            return Ok(wanted.clone());
        }
        eprintln!("{} lists no profile for the command: a start was recorded, and is followed", self.command.reference);
        Ok(ProfileRequest::File(trace))
    }

    fn attached(&self, profile: &ProfileRequest, record_to: Option<&Path>) -> anyhow::Result<Sample> {
        let host = Host::new(self.global, self.work.path().join("store"), self.run.path().join("run"))?;
        let scratch = Scratch::create(self.run.path().join("attached"))?;
        let (reference, registry) = (&self.command.reference, &self.command.registry);
        let start =
            StartOptions { profile: profile.clone(), command: self.command.command.clone(), ..StartOptions::default() };
        let request = trial::request(reference, DEVICE, self.transport.get(), registry, start)?;
        let image = scratch.image();
        cold();
        let began = Instant::now();
        let target = add::Target::Directory(&image);
        let (device, _) = add::attach(&host.global, &host.directories, request, &target, trial::ATTACH_TIMEOUT)?;
        let attached = Device { directories: &host.directories, name: DEVICE.to_owned(), mount: image.clone() };
        self.transport.set(device.transport);
        let config = image_config::fetch(registry, reference, &device.manifest)?;
        if record_to.is_some() {
            let argv = config.command(&self.command.command)?;
            record::begin(&host.directories, DEVICE, argv, RECORD_READ_AHEAD_KB)?;
        }
        let mut seen = None;
        let (root, ready) = self.run(&scratch, &image, &config, began, || {
            client::ask(&host.directories, &Request::Ready { name: DEVICE.to_owned() }, client::ANSWER_MARGIN)?;
            if let Some(trace) = record_to {
                record::end(&host.directories, DEVICE, trace)?;
            }
            seen = Some(Seen {
                device: status::find(&host.directories, DEVICE)?,
                figures: status::figures(&host.directories, DEVICE)?,
                events: events::of(&host.directories, DEVICE)?,
            });
            Ok(())
        })?;
        drop(attached);
        let fetched_bytes = seen.iter().flat_map(|seen| &seen.events).map(bytes_of).sum();
        Ok(sample(root, ready, fetched_bytes, seen))
    }

    /// Starts the command over `lower`; `at_ready` runs while it still does. Returns the times since `began`.
    fn run(
        &self,
        scratch: &Scratch,
        lower: &Path,
        config: &ImageConfig,
        began: Instant,
        at_ready: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<(Duration, Duration)> {
        let overlay = scratch.overlay(lower)?;
        let argv = config.command(&self.command.command)?;
        let host_network = self.readiness.asks_from_outside();
        let overrides = Overrides { command: argv.clone(), host_network, ..Overrides::default() };
        crate::bundle::write(scratch.bundle().directory(), config, &overrides)?;
        let root = began.elapsed();
        self.interrupt.check()?;
        let container = scratch.bundle().run(&format!("{DEVICE}-{}", std::process::id()))?;
        let container = trial::until_ready(container, &self.readiness, self.command.readiness.timeout, self.interrupt)?;
        let ready = began.elapsed();
        at_ready()?;
        drop(container);
        drop(overlay);
        self.argv.replace(argv);
        Ok((root, ready))
    }

    /// An image that lists no original needs one.
    fn with_way_out(&self, error: ublkimg_convert::Error) -> anyhow::Error {
        if error.kind() == ConvertErrorKind::Usage && self.command.from.is_none() {
            let reference = &self.command.reference;
            let text = format!("{reference} does not list the image that it was made of: name that with --from");
            return Error::new(ErrorKind::Invalid, text).into();
        }
        error.into()
    }
}

fn sample(root: Duration, ready: Duration, fetched_bytes: u64, seen: Option<Seen>) -> Sample {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let first_reads = seen.as_ref().map(|seen| {
        let reads = &seen.figures.first_reads;
        FirstReads { hits: reads.hits, late_hits: reads.late_hits, misses: reads.misses }
    });
    Sample { ready_us: us(ready), root_us: us(root), fetched_bytes, first_reads, seen }
}

fn bytes_of(event: &StartEvent) -> u64 {
    match event {
        StartEvent::Fetch { bytes, .. } => u64::from(*bytes),
        _ => 0,
    }
}

/// Drops what the page cache of this host holds.
fn cold() {
    rustix::fs::sync();
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "3") {
        eprintln!(
            "ublkimg: the page cache cannot be dropped here ({error}): starts find warm what they share with others"
        );
    }
}
