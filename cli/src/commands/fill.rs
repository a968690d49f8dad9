//! `ublkimg fill`: fetch the rest of an image, with progress on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ublkimg_driver::daemon::protocol::{FillFigures, FillMode, Request};
use ublkimg_driver::daemon::{Directories, client};
use ublkimg_driver::error::{Error, ErrorKind};

use super::{add, status};
use crate::args::{Fill, FillArgument, Global};
use crate::output;

/// How often it is looked how far a fill is.
const POLL: Duration = Duration::from_millis(200);

pub(super) fn run(global: &Global, command: &Fill) -> anyhow::Result<()> {
    let directories = super::directories(global)?;
    let device = status::find(&directories, &command.target)?;
    set(&directories, &device.name, add::fill_mode(command.mode))?;
    if command.mode == FillArgument::Full { wait(&directories, &device.name) } else { Ok(()) }
}

fn set(directories: &Directories, name: &str, mode: FillMode) -> anyhow::Result<()> {
    client::ask(directories, &Request::Fill { name: name.to_owned(), mode }, client::ANSWER_MARGIN)?;
    Ok(())
}

/// Waits until the whole image is on this host.
pub(super) fn wait(directories: &Directories, name: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    let bar = bar();
    let fill = loop {
        let fill = status::figures(directories, name)?.fill;
        bar.set_length(fill.total_bytes);
        bar.set_position(fill.present_bytes);
        if fill.is_finished {
            break fill;
        }
        if fill.mode == FillMode::Off {
            bar.abandon();
            let text = format!("the fill of {name} was switched off meanwhile");
            return Err(Error::new(ErrorKind::Busy, text).into());
        }
        std::thread::sleep(POLL);
    };
    bar.finish();
    finished(name, &fill, began.elapsed())
}

fn finished(name: &str, fill: &FillFigures, took: Duration) -> anyhow::Result<()> {
    let (present, total) = (output::bytes(fill.present_bytes), output::bytes(fill.total_bytes));
    if fill.present_bytes < fill.total_bytes {
        let text = format!("{name}: {present} of {total} could be fetched: see the daemon's log");
        return Err(Error::new(ErrorKind::Unavailable, text).into());
    }
    eprintln!("filled {name}: {total} on this host after {:.1} s", took.as_secs_f64());
    Ok(())
}

/// A bar on a terminal, nothing elsewhere.
fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("fill [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}
