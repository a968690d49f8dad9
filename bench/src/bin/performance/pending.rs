//! Cached reads while others wait for the registry, beside the same reads of an idle device.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use ublkimg_tests::registry::{Fault, Toxic};

use crate::machine::Machine;
use crate::rows::{Bar, Row};

/// The registry's answers take this long meanwhile.
const ANSWER_MS: u64 = 1000;
const FAULT: &str = "slow";

pub(crate) fn measure(machine: &Machine, options: &[&str]) -> Result<Vec<Row>> {
    let (by_tag, _) = machine.load("tree")?;
    let (mut idle, mut busy, mut pending) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..machine.rounds {
        let host = machine.host("pending")?;
        let device = host.add(&by_tag, "tree", options)?;
        let toxic = Toxic::Latency { latency_ms: ANSWER_MS };
        machine.registry.set_fault(FAULT, Fault::new("*/blobs/*", toxic));
        let device = device.to_str().context("a path that is not UTF-8")?;
        let answer_ms = ANSWER_MS.to_string();
        let output = Command::new(machine.bin.join("read-latency"))
            .args([device, "--json", "--limit", "1000", "--warm-mib", "2", "--first-miss-mib", "16"])
            .args(["--misses", "64", "--answer-ms", &answer_ms])
            .output()?;
        machine.registry.clear_fault(FAULT);
        ensure!(output.status.success(), "read-latency: {}", String::from_utf8_lossy(&output.stderr));
        let measured: Value = serde_json::from_slice(&output.stdout)?;
        let figure = |name: &str| measured[name].as_f64().with_context(|| format!("no {name} in {measured}"));
        idle.push(figure("idle_p99_us")?);
        busy.push(figure("busy_p99_us")?);
        pending.push(figure("pending")?);
    }
    let what = "p99 of cached reads with misses pending ÷ idle p99";
    let row = Row::ratio(what, "µs", Bar::AtMost(1.2), ("pending", busy), ("idle", idle));
    Ok(vec![row.with("pending", "misses", pending)])
}
