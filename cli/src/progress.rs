//! Progress of a conversion: bars on a terminal, one line per finished step otherwise. Always on stderr.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use ublkimg_convert::{Phase, Progress, Task};

use crate::output;

/// The progress display that fits stderr.
pub(crate) fn for_stderr() -> Arc<dyn Progress> {
    if std::io::stderr().is_terminal() { Arc::new(Bars::default()) } else { Arc::new(Lines::default()) }
}

fn title(task: &Task) -> String {
    let verb = match task.phase {
        Phase::Find => "find converted layers",
        Phase::Read => "read",
        Phase::Compress => "compress",
        Phase::Push => "push",
        Phase::Finish => "merge and publish",
        Phase::Check => "check",
        Phase::Publish => "publish",
    };
    match task.layer {
        Some(layer) => format!("{verb} layer {}/{}", layer + 1, task.layers),
        None => verb.to_owned(),
    }
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    /// At most a few for each layer under way.
    bars: Mutex<HashMap<Task, ProgressBar>>,
}

impl Bars {
    fn bar(&self, task: &Task) -> Option<ProgressBar> {
        self.bars.lock().unwrap_or_else(PoisonError::into_inner).get(task).cloned()
    }
}

impl Progress for Bars {
    fn start(&self, task: &Task, total_bytes: Option<u64>) {
        let (bar, template) = match total_bytes {
            Some(total) => (ProgressBar::new(total), "{msg:22} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}"),
            None => (ProgressBar::new_spinner(), "{msg:22} {spinner} {bytes} {bytes_per_sec}"),
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.all.add(bar.with_style(style).with_message(title(task)));
        self.bars.lock().unwrap_or_else(PoisonError::into_inner).insert(task.clone(), bar);
    }

    fn advance(&self, task: &Task, bytes: u64) {
        if let Some(bar) = self.bar(task) {
            bar.inc(bytes);
        }
    }

    fn finish(&self, task: &Task) {
        if let Some(bar) = self.bar(task) {
            bar.finish();
        }
    }
}

#[derive(Default)]
struct Lines {
    /// Start and bytes so far of the tasks under way.
    tasks: Mutex<HashMap<Task, (Instant, u64)>>,
}

impl Progress for Lines {
    fn start(&self, task: &Task, _: Option<u64>) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).insert(task.clone(), (Instant::now(), 0));
    }

    fn advance(&self, task: &Task, bytes: u64) {
        if let Some((_, done)) = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).get_mut(task) {
            *done += bytes;
        }
    }

    fn finish(&self, task: &Task) {
        let finished = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).remove(task);
        if let Some((start, bytes)) = finished {
            eprintln!("{}: {} in {:.1} s", title(task), output::bytes(bytes), start.elapsed().as_secs_f64());
        }
    }
}
