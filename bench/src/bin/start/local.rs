//! A start over the network beside the same start with everything on the local disk.
//!
//! Where one processor does everything, also what the registry does, a start over the network cannot be as quick as a local one: what
//! the registry spends, and what verifying and decoding cost, is work that a local start does not have. So it may take 1.05 times
//! as long as the local one and these seconds.

use std::fmt;

use ublkimg_bench::median;

use crate::figures::{Row, Sample};

/// How much longer than a local start one over the network may take.
const SLOWER_MAX: f64 = 1.05;

/// The rows' starts with the hot blob, a line for each local arm beside them.
pub(crate) struct Locals<'a>(pub(crate) &'a [Row]);

impl fmt::Display for Locals<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |arm: &'static str, workload: &str| {
            self.0.iter().find(|row| row.arm == arm && row.workload == workload).map(|row| (arm, row))
        };
        for hot in self.0.iter().filter(|row| row.arm == "hot blob") {
            for (arm, local) in ["local", "loop device"].into_iter().filter_map(|arm| of(arm, &hot.workload)) {
                let pairs = || hot.samples.iter().zip(&local.samples);
                let all = |of: &dyn Fn(&Sample, &Sample) -> f64| {
                    let values: Vec<f64> = pairs().map(|(hot, local)| of(hot, local)).collect();
                    if values.is_empty() { f64::NAN } else { median(&values) }
                };
                let plain = all(&|hot, local| hot.ready_seconds / local.ready_seconds);
                let allowed = all(&|hot, local| hot.ready_seconds / allowed_seconds(hot, local));
                writeln!(
                    f,
                    "{}: hot blob / {arm}: {plain:.2}; / what one processor may take {allowed:.2} ({SLOWER_MAX} x {arm} {:.2} s, the registry \
                     {:.2} s more, verify and decode {:.2} s)",
                    hot.workload,
                    local.ready_seconds(),
                    all(&|hot, local| registry_seconds(hot, local)),
                    hot.median(|sample| sample.decode_seconds),
                )?;
            }
        }
        Ok(())
    }
}

fn registry_seconds(hot: &Sample, local: &Sample) -> f64 {
    (hot.registry_seconds - local.registry_seconds).max(0.0)
}

fn allowed_seconds(hot: &Sample, local: &Sample) -> f64 {
    SLOWER_MAX * local.ready_seconds + registry_seconds(hot, local) + hot.decode_seconds
}
