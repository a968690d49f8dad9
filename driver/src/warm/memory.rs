//! How much a warmer may push: a share of the memory that is free, and nothing more once memory is short.

use std::fs;

/// Of the available memory when it begins, a warmer takes at most this part: what is pushed drives other things out.
const SHARE: u64 = 4;

/// Short is less than this part of all memory available.
const AVAILABLE_MIN_SHARE: u64 = 16;

/// Short is also when, of the last ten seconds, some task waited for memory in more than this percentage.
const STALL_MAX_PERCENT: f64 = 5.0;

/// Bytes that may still be pushed.
#[derive(Debug)]
pub(super) struct Budget {
    left_bytes: u64,
}

impl Budget {
    /// Of a machine that says this in `/proc/meminfo`.
    fn of(meminfo: &str) -> Self {
        Self { left_bytes: field_bytes(meminfo, "MemAvailable:").unwrap_or(0) / SHARE }
    }

    /// Of this machine.
    pub(super) fn here() -> Self {
        Self::of(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }

    /// Takes bytes out of it; false if they are not in it.
    pub(super) fn take(&mut self, bytes: u64) -> bool {
        let left_bytes = self.left_bytes.checked_sub(bytes);
        self.left_bytes = left_bytes.unwrap_or(0);
        left_bytes.is_some()
    }
}

/// Whether memory is short on this machine.
pub(super) fn is_short_here() -> bool {
    let pressure = fs::read_to_string("/proc/pressure/memory").unwrap_or_default();
    is_short(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), &pressure)
}

/// From what the kernel says in `/proc/meminfo` and, where it has that, `/proc/pressure/memory`.
fn is_short(meminfo: &str, pressure: &str) -> bool {
    let stalls = || {
        let some = pressure.lines().find_map(|line| line.strip_prefix("some avg10="))?;
        some.split(' ').next()?.parse::<f64>().ok()
    };
    let (available, total) = (field_bytes(meminfo, "MemAvailable:"), field_bytes(meminfo, "MemTotal:"));
    available.zip(total).is_none_or(|(available, total)| available < total / AVAILABLE_MIN_SHARE)
        || stalls().is_some_and(|percent| percent > STALL_MAX_PERCENT)
}

/// A line such as `MemAvailable:   17071444 kB`.
fn field_bytes(meminfo: &str, name: &str) -> Option<u64> {
    let kib: u64 = meminfo.lines().find_map(|line| line.strip_prefix(name))?.trim().split(' ').next()?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meminfo(available_mib: u64) -> String {
        format!("MemTotal:       {} kB\nMemFree:  5 kB\nMemAvailable:   {} kB\n", 1600 << 10, available_mib << 10)
    }

    #[test]
    fn a_quarter_of_what_is_available_and_no_more() {
        let mut budget = Budget::of(&meminfo(400));
        assert!(budget.take(60 << 20) && budget.take(40 << 20));
        assert!(!budget.take(1));
        assert!(!Budget::of("who knows").take(1));
    }

    #[test]
    fn memory_is_short_when_little_is_available_or_tasks_wait_for_it() {
        let waits =
            |percent| format!("some avg10={percent} avg60=90.00 avg300=90.00 total=7\nfull avg10=99.00 avg60=0\n");
        assert!(!is_short(&meminfo(100), ""), "an older kernel says nothing of pressure");
        assert!(is_short(&meminfo(99), ""));
        assert!(is_short("", ""), "who knows");
        assert!(!is_short(&meminfo(1000), &waits("5.00")));
        assert!(is_short(&meminfo(1000), &waits("5.01")));
    }

    #[test]
    fn this_machine_says_both() {
        assert!(field_bytes(&fs::read_to_string("/proc/meminfo").unwrap(), "MemAvailable:").unwrap() > 0);
    }
}
