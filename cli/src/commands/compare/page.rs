//! The comparison as one page.

use super::super::report;
use super::sample::Arm;
use super::{Comparison, HEADER, cells, seconds, verdict};
use crate::page::Page;

pub(super) fn page(comparison: &Comparison) -> anyhow::Result<Page> {
    let mut page = Page::new(&format!("Starts of {}", comparison.reference));
    page.paragraph(&comparison.command.join(" "));
    page.paragraph(&verdict(comparison));
    page.bars(&bars(&comparison.starts));
    let rows: Vec<_> = comparison.starts.iter().map(|arm| (arm.name, cells(&arm.median).to_vec())).collect();
    page.numbers(&HEADER, &rows);
    for arm in &comparison.starts {
        // The one that is nearest to the median stands for all.
        let of_median = arm.samples.iter().min_by_key(|sample| sample.ready_us.abs_diff(arm.median.ready_us));
        if let Some(seen) = of_median.and_then(|sample| sample.seen.as_ref()) {
            page.heading(&format!("A start {}", if arm.name == "lazy" { "without a profile" } else { arm.name }));
            report::add_start(&mut page, &seen.device, &seen.figures, &seen.events)?;
        }
    }
    Ok(page)
}

#[expect(clippy::cast_precision_loss, reason = "parts of a bar")]
fn bars(arms: &[Arm]) -> Vec<(&str, f64, String)> {
    let longest = arms.iter().map(|arm| arm.median.ready_us).max().unwrap_or(1).max(1) as f64;
    let bar = |arm| {
        let Arm { name, median, .. }: &Arm = arm;
        (*name, median.ready_us as f64 / longest, seconds(median.ready_us))
    };
    arms.iter().map(bar).collect()
}
