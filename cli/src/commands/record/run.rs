//! `ublkimg record REF`: one run of an image from attaching to readiness, recorded, and nothing left of it.
//!
//! An interrupt ends the run between any two steps; what was made so far is taken back.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use ublkimg_driver::daemon::client;
use ublkimg_driver::daemon::protocol::{Request, StartFigures, StartOptions};
use ublkimg_driver::error::{Error, ErrorKind};

use super::super::trial::{self, Device, Interrupt, Readiness, Scratch};
use super::super::{add, events, image_config, status};
use crate::args::{Global, RecordRun};
use crate::bundle::Overrides;
use crate::output;

/// What `record --json` prints.
#[derive(Serialize)]
struct Report<'a> {
    trace: &'a Path,
    command: &'a [String],
    ready_after_start_us: u64,
    start: &'a StartFigures,
}

pub(super) fn run(global: &Global, command: &RecordRun) -> anyhow::Result<()> {
    let interrupt = Interrupt::watch()?;
    let outcome = record(global, command, &interrupt);
    interrupt.end_if_set("the run");
    outcome
}

fn record(global: &Global, command: &RecordRun, interrupt: &Interrupt) -> anyhow::Result<()> {
    let (Some(reference), Some(output)) = (command.reference.as_deref(), command.output.as_deref()) else {
        return Err(Error::new(ErrorKind::Invalid, "an image and --output are needed").into());
    };
    let readiness = Readiness::of(&command.readiness)?;
    let directories = super::super::directories(global)?;
    let name = format!("record-{}", std::process::id());
    // Made in this order, gone in the opposite one.
    let scratch = Scratch::create(directories.run.join(&name))?;
    let image = scratch.image();
    let profile = add::profile(&command.profile)?;
    let start = StartOptions { profile, command: command.command.clone(), ..StartOptions::default() };
    let request = trial::request(reference, &name, add::transport(command.transport), &command.registry, start)?;
    let (attached, _) =
        add::attach(global, &directories, request, &add::Target::Directory(&image), trial::ATTACH_TIMEOUT)?;
    let device = Device { directories: &directories, name: name.clone(), mount: image.clone() };
    interrupt.check()?;
    let config = image_config::fetch(&command.registry, reference, &attached.manifest)?;
    let argv = config.command(&command.command)?;
    let overlay = scratch.overlay(&image)?;
    interrupt.check()?;
    super::begin(&directories, &name, argv.clone(), command.read_ahead_kb)?;
    let overrides =
        Overrides { command: argv.clone(), host_network: readiness.asks_from_outside(), ..Overrides::default() };
    crate::bundle::write(scratch.bundle().directory(), &config, &overrides)?;
    let began = Instant::now();
    let container = scratch.bundle().run(&name)?;
    let container = trial::until_ready(container, &readiness, command.readiness.timeout, interrupt)?;
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
