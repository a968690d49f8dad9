//! `ublkimg record`: the trace of a start, of a device that is there or of one run of an image.

mod run;

use std::path::Path;

use ublkimg_driver::daemon::protocol::{Answer, Request};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::{Error, ErrorKind};

use super::status;
use crate::args::{Global, Record, RecordAction};
use crate::output;

pub(super) fn run(global: &Global, command: &Record) -> anyhow::Result<()> {
    match &command.action {
        None => run::run(global, &command.run),
        Some(RecordAction::Start(start)) => {
            let directories = super::directories(global)?;
            let device = status::find(&directories, &start.target)?;
            begin(&directories, &device.name, start.command.clone(), start.read_ahead_kb)
        }
        Some(RecordAction::Stop(stop)) => {
            let directories = super::directories(global)?;
            let device = status::find(&directories, &stop.target)?;
            let written = end(&directories, &device.name, &stop.output)?;
            if let Some(events) = &stop.events {
                super::events::write(&directories, &device.name, events)?;
            }
            output::line(&written)
        }
    }
}

pub(super) fn begin(
    directories: &Directories,
    name: &str,
    command: Vec<String>,
    read_ahead_kb: u32,
) -> anyhow::Result<()> {
    let request = Request::RecordStart { name: name.to_owned(), command, read_ahead_kb };
    client::ask(directories, &request, client::ANSWER_MARGIN)?;
    Ok(())
}

/// Ends the recording and writes its trace; says what it holds.
pub(super) fn end(directories: &Directories, name: &str, output: &Path) -> anyhow::Result<String> {
    let request = Request::RecordStop { name: name.to_owned() };
    let answer = client::ask(directories, &request, client::ANSWER_MARGIN)?;
    let answer = answer.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no device {name}")))?;
    let Answer::Recorded { path, entries, blocks, lost } = answer else { return Err(super::unexpected(&answer)) };
    std::fs::copy(&path, output).map_err(|error| Error::io(format!("cannot write {}", output.display()), error))?;
    let lost = if lost > 0 { format!(", {lost} more were lost") } else { String::new() };
    let size = crate::output::bytes(blocks * 4096);
    Ok(format!("{entries} first reads of {blocks} blocks ({size}) in {}{lost}", output.display()))
}
