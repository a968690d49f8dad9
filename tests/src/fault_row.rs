//! One row of a table of faults, as docs/guarantees.md has it, printed by the test that saw it, on a line that begins with
//! `fault: `. It is printed where the outcome was seen, so a test that fails later leaves one behind.

use std::panic::Location;
use std::time::{Duration, Instant};

/// A fault under way.
#[must_use]
#[derive(Debug)]
pub struct FaultRow {
    what: &'static str,
    file: &'static str,
    began: Instant,
}

impl FaultRow {
    /// From here on somebody meets the fault `what`.
    #[track_caller]
    pub fn begins(what: &'static str) -> Self {
        Self { what, file: Location::caller().file(), began: Instant::now() }
    }

    /// Now its outcome is there.
    pub fn ends(self, outcome: &str) {
        print(self.file, self.what, outcome, self.began.elapsed());
    }
}

/// The fault `what` had that outcome after `took`.
#[track_caller]
pub fn seen(what: &str, outcome: &str, took: Duration) {
    print(Location::caller().file(), what, outcome, took);
}

fn print(file: &str, what: &str, outcome: &str, took: Duration) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or_default().rsplit("::").next().unwrap_or_default().to_owned();
    let ms = took.as_millis();
    let took = match ms {
        0..10 => "< 10 ms".to_owned(),
        10..1000 => format!("{ms} ms"),
        _ => format!("{:.1} s", took.as_secs_f64()),
    };
    // On a line of its own, although the harness may be in the middle of one.
    println!("\nfault: | {what} | {outcome} | {took} | `{file}::{test}` |");
}
