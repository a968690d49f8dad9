//! Processor time: of the machine, of this process, and of the threads that decode.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

/// Processor time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spent {
    /// Of this machine, on anything but idling.
    pub(crate) machine: Duration,
    /// Of this process.
    pub(crate) own: Duration,
}

impl Spent {
    pub(crate) fn so_far() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/stat")?;
        let fields = numbers(text.lines().next().context("/proc/stat is empty")?);
        ensure!(fields.len() > 8, "/proc/stat has {} figures", fields.len());
        // cpu, user, nice, system, idle, iowait, irq, softirq, steal
        let machine = [1, 2, 3, 6, 7].into_iter().map(|field| fields[field]).sum();
        Ok(Self { machine: ticks(machine)?, own: of_task(Path::new("/proc/self"))? })
    }
}

/// What the threads have spent that verify, decode and store, of the daemon that was started with this directory; zero if there is
/// none.
pub(crate) fn of_decoding(run_dir: &Path) -> Result<Duration> {
    let run_dir = run_dir.to_str().context("a path that is not UTF-8")?.as_bytes();
    let mut spent = Duration::ZERO;
    for process in std::fs::read_dir("/proc")?.flatten() {
        // What has ended meanwhile has nothing to add.
        let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let Ok(threads) = std::fs::read_dir(process.path().join("task")) else { continue };
        if !arguments.split(|byte| *byte == 0).any(|argument| argument == run_dir) {
            continue;
        }
        for thread in threads.flatten() {
            let name = std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
            if name.trim_end() == "decode" {
                spent += of_task(&thread.path())?;
            }
        }
    }
    Ok(spent)
}

/// Of a process or thread in /proc.
fn of_task(dir: &Path) -> Result<Duration> {
    let text = std::fs::read_to_string(dir.join("stat"))?;
    // The name, in parentheses, may hold anything.
    let fields = numbers(text.rsplit_once(')').context("a stat file without a name")?.1);
    ensure!(fields.len() > 12, "a stat file has {} figures", fields.len());
    // The state comes first; utime and stime are the twelfth and thirteenth.
    ticks(fields[11] + fields[12])
}

/// The words of a line as numbers; what is none is 0.
fn numbers(line: &str) -> Vec<u64> {
    line.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect()
}

/// A time in the kernel's units for processes: hundredths of a second on every architecture.
fn ticks(count: u64) -> Result<Duration> {
    Ok(Duration::from_millis(count.checked_mul(10).context("more time than there is")?))
}
