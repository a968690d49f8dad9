//! `ublkimg record REF`: one run of an image from attaching to readiness, recorded, and nothing left of it.
//!
//! ```text
//! RUN_DIR/record-PID/            a tmpfs
//!   image/                       the device, mounted
//!   upper/, work/                of the overlay
//!   bundle/rootfs                the overlay: what the container sees
//! ```
//! An interrupt ends the run between any two steps; what was made so far is taken back.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use ublkimg_driver::daemon::client;
use ublkimg_driver::daemon::protocol::{AddRequest, FillMode, Request, StartFigures, StartOptions};
use ublkimg_driver::device::QueueOptions;
use ublkimg_driver::error::{Error, ErrorKind};

use super::super::{add, events, image_config, status};
use super::bundle::Bundle;
use super::cleanup::{Container, Device, Directory, Mount};
use super::ready::Readiness;
use crate::args::{Global, RecordRun};
use crate::bundle::Overrides;
use crate::exit::INTERRUPTED;
use crate::{output, overlay};

/// How often readiness is looked at: fine enough for starts of tens of milliseconds.
const POLL: Duration = Duration::from_millis(2);

/// A shell that is started again and again would be a load of its own.
const SHELL_POLL: Duration = Duration::from_millis(50);

/// How long attaching and mounting may take, and a read.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(60);
const READ_TIMEOUT: Duration = Duration::from_secs(300);

/// What `record --json` prints.
#[derive(Serialize)]
struct Report<'a> {
    trace: &'a Path,
    command: &'a [String],
    ready_after_start_us: u64,
    start: &'a StartFigures,
}

pub(super) fn run(global: &Global, command: &RecordRun) -> anyhow::Result<()> {
    let interrupted = watch_for_interrupts()?;
    let outcome = record(global, command, &interrupted);
    if interrupted.load(Ordering::SeqCst) {
        eprintln!("ublkimg: interrupted, nothing is left of the run");
        std::process::exit(INTERRUPTED.into());
    }
    outcome
}

fn record(global: &Global, command: &RecordRun, interrupted: &AtomicBool) -> anyhow::Result<()> {
    let (Some(reference), Some(output)) = (command.reference.as_deref(), command.output.as_deref()) else {
        return Err(Error::new(ErrorKind::Invalid, "an image and --output are needed").into());
    };
    let readiness = Readiness::of(command)?;
    let directories = super::super::directories(global)?;
    let name = format!("record-{}", std::process::id());
    let go_on = || match interrupted.load(Ordering::SeqCst) {
        true => Err(Error::new(ErrorKind::Busy, "interrupted")),
        false => Ok(()),
    };
    // Made in this order, gone in the opposite one.
    let place = Directory::create(directories.run.join(&name))?;
    let scratch = Mount::new("tmpfs", place.path(), "mode=0700")?;
    let [image, upper, work] = ["image", "upper", "work"].map(|name| place.path().join(name));
    for directory in [&image, &upper, &work] {
        std::fs::create_dir_all(directory)?;
    }
    let bundle = Bundle::new(&place.path().join("bundle"), &place.path().join("runc"))?;
    let request = add_request(command, reference, &name)?;
    let (attached, _) = add::attach(global, &directories, request, &add::Target::Directory(&image), ATTACH_TIMEOUT)?;
    let device = Device { directories: &directories, name: name.clone(), mount: image.clone() };
    go_on()?;
    let config = image_config::fetch(&command.registry, reference, &attached.manifest)?;
    let argv = config.command(&command.command)?;
    let overlay = Mount::new("overlay", &bundle.rootfs(), &overlay::options(&image, &upper, &work)?)?;
    go_on()?;
    super::begin(&directories, &name, argv.clone(), command.read_ahead_kb)?;
    let overrides =
        Overrides { command: argv.clone(), host_network: readiness.asks_from_outside(), ..Overrides::default() };
    crate::bundle::write(bundle.directory(), &config, &overrides)?;
    let began = Instant::now();
    let container = Container::new(bundle.run(&name)?, bundle.state().to_owned(), name.clone());
    let container = until_ready(container, &readiness, command.timeout, interrupted)?;
    let took = began.elapsed();
    client::ask(&directories, &Request::Ready { name: name.clone() }, client::ANSWER_MARGIN)?;
    let written = super::end(&directories, &name, output)?;
    let start = status::figures(&directories, &name)?;
    if let Some(path) = &command.events {
        events::write(&directories, &name, path)?;
    }
    drop(container);
    drop(overlay);
    drop(device);
    drop(scratch);
    if command.json {
        let ready_after_start_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        return output::json(&Report { trace: output, command: &argv, ready_after_start_us, start: &start });
    }
    output::line(&written)?;
    output::line(&format!("{:22}{:.3} s after the command was started", "ready", took.as_secs_f64()))?;
    status::print_start(&start)
}

fn until_ready(
    mut container: Container,
    readiness: &Readiness,
    timeout: Duration,
    interrupted: &AtomicBool,
) -> anyhow::Result<Container> {
    let began = Instant::now();
    let poll = if matches!(readiness, Readiness::Command(_)) { SHELL_POLL } else { POLL };
    loop {
        let ended = container.child().try_wait()?;
        if readiness.is_reached(ended, began.elapsed())? {
            return Ok(container);
        }
        if interrupted.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Busy, "interrupted").into());
        }
        if began.elapsed() > timeout {
            let text = format!("the command was not ready within {} s", timeout.as_secs());
            return Err(Error::new(ErrorKind::TimedOut, text).into());
        }
        std::thread::sleep(poll);
    }
}

fn add_request(command: &RecordRun, reference: &str, name: &str) -> anyhow::Result<AddRequest> {
    Ok(AddRequest {
        reference: super::super::location(reference)?.to_string(),
        name: Some(name.to_owned()),
        transport: add::transport(command.transport),
        queue: QueueOptions::default(),
        plain_http: command.registry.plain_http,
        auth_file: command.registry.auth_file.as_deref().map(super::super::absolute).transpose()?,
        hosts_dirs: command.registry.hosts_dirs.clone(),
        attach_timeout_ms: add::milliseconds(ATTACH_TIMEOUT),
        read_timeout_ms: add::milliseconds(READ_TIMEOUT),
        holds_reads: false,
        start: StartOptions {
            profile: add::profile(&command.profile)?,
            command: command.command.clone(),
            record: false,
            read_ahead_kb: None,
            fill: FillMode::Off,
            warm: false,
        },
    })
}

/// Set by SIGINT and SIGTERM, from now on.
fn watch_for_interrupts() -> anyhow::Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let interrupted = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let set = Arc::clone(&interrupted);
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                set.store(true, Ordering::SeqCst);
            }
        });
    })?;
    Ok(interrupted)
}
