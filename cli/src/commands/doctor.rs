//! `ublkimg doctor`: what this host has and lacks.

use ublkimg_driver::kernel;

use crate::args::Doctor;
use crate::output;

pub(super) fn run(command: &Doctor) -> anyhow::Result<()> {
    let report = kernel::probe();
    if command.json {
        return output::json(&report);
    }
    output::line(&format!("kernel {}", report.kernel))?;
    for check in &report.checks {
        let mark = if check.usable { "ok" } else { "MISSING" };
        output::line(format!("{mark:8}{:12}{}", check.name, check.found).trim_end())?;
        if let Some(remedy) = &check.remedy {
            output::line(&format!("{:20}-> {remedy}", ""))?;
        }
    }
    if !report.ublk_features.is_empty() {
        output::line(&format!("ublk features: {}", report.ublk_features.join(", ")))?;
    }
    match report.transport {
        Some(transport) => output::line(&format!("`ublkimg add` would use: {transport}")),
        None => output::line("`ublkimg add` cannot work here"),
    }
}
