//! `--events FILE`: what happened in a start, one JSON object a line, for `ublkimg trace plot`.

use std::fmt::Write as _;
use std::path::Path;

use ublkimg_driver::daemon::protocol::{Answer, Request};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_driver::start_events::StartEvent;

/// Writes the events of the start of a device, as far as it is.
pub(super) fn write(directories: &Directories, name: &str, path: &Path) -> anyhow::Result<()> {
    let events = of(directories, name)?;
    let text = lines(&events)?;
    if let Some(StartEvent::Lost { lost }) = events.last() {
        eprintln!("ublkimg: {} holds the first events of the start; {lost} more were not kept", path.display());
    }
    std::fs::write(path, text).map_err(|error| Error::io(format!("cannot write {}", path.display()), error).into())
}

/// The events of the start of a device, as far as it is.
pub(super) fn of(directories: &Directories, name: &str) -> anyhow::Result<Vec<StartEvent>> {
    let request = Request::Events { name: name.to_owned() };
    let answer = client::ask(directories, &request, client::ANSWER_MARGIN)?;
    let answer = answer.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no device {name}")))?;
    let Answer::Events(events) = answer else { return Err(super::unexpected(&answer)) };
    Ok(events)
}

/// One JSON object a line.
pub(super) fn lines(events: &[StartEvent]) -> anyhow::Result<String> {
    let mut text = String::new();
    for event in events {
        writeln!(text, "{}", serde_json::to_string(event)?)?;
    }
    Ok(text)
}
