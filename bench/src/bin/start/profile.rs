//! The profile of a workload, recorded where the store is full, and what that full store says about the start.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use serde_json::Value;
use ublkimg_convert::load_trace;
use ublkimg_image::trace::Trace;
use ublkimg_image::{HotTable, Sha256};
use ublkimg_registry::profile::ProfileManifest;

use crate::bench::{Bench, DEVICE};
use crate::figures::{Packed, Sample};
use crate::limit::{self, HotBlob, LocalStart};
use crate::workload::Workload;

/// Chosen by name, so that a start can be given the profile of another command.
const NAME: &str = "measured";

pub(crate) struct Profile {
    /// The trace of the first start.
    file: PathBuf,
    /// Starts with a full store.
    locals: Vec<LocalStart>,
    trace: Trace,
    table: HotTable,
    hot: Bytes,
    /// Bytes that an attach without a profile fetches.
    pub(crate) attach_bytes: u64,
    metadata_bytes: u64,
}

impl Profile {
    /// Fills a store, records a start from it, and makes the image's profile of that.
    pub(crate) fn record(bench: &Bench, workload: &Workload) -> Result<Self> {
        let image = bench.image(workload);
        bench.unshape();
        bench.registry.reset_stats();
        let mut attach_bytes = 0;
        let host = bench.new_full_host()?;
        host.attached(&image, &["--profile", "none"], |ublkimg| {
            attach_bytes = bench.registry.stats().bytes_sent;
            ublkimg.call(&["fill", DEVICE]).map(|_stdout| ())
        })?;
        let file = host.path("start.trace");
        let local = local_start(bench, workload, &file)?.0;
        let trace_file = path_str(&file)?.to_owned();
        bench.unshape();
        let tmpdir = host.path("tmp");
        std::fs::create_dir_all(&tmpdir)?;
        let report = host.ublkimg.call(&[
            "optimize",
            &image,
            "--trace",
            &trace_file,
            "--name",
            NAME,
            "--tmpdir",
            path_str(&tmpdir)?,
            "--json",
        ])?;
        let report: Value = serde_json::from_str(&report).with_context(|| format!("optimize printed {report:?}"))?;
        let read = |reference: &Value| -> Result<Bytes> {
            let digest: ublkimg_registry::Digest = reference.as_str().context("no digest in the report")?.parse()?;
            let contents = bench.registry.contents(workload.image, Sha256(digest.0))?;
            contents.with_context(|| format!("{digest} is not in the registry"))
        };
        let manifest = ProfileManifest::parse(&read(&report["profile"])?)?;
        let hot = manifest.hot.context("the profile has no hot blob")?;
        let erofs: Value = serde_json::from_slice(&read(&report["manifest"])?)?;
        let metadata = erofs["layers"].as_array().and_then(|layers| layers.last()).context("no layers")?;
        let stored_trace = match manifest.trace.inline()? {
            Some(data) => data,
            None => read(&Value::String(manifest.trace.digest.to_string()))?,
        };
        Ok(Self {
            file,
            locals: vec![local],
            trace: load_trace(&stored_trace)?,
            table: HotTable::decode(&hot.table)?,
            hot: read(&report["hot"]["digest"])?,
            attach_bytes,
            metadata_bytes: metadata["size"].as_u64().context("metadata without a size")?,
        })
    }

    /// What `add --profile` takes.
    pub(crate) fn name(&self) -> &'static str {
        NAME
    }

    /// What `add --profile` takes for the trace alone: a file is a hint, nobody vouches for it.
    pub(crate) fn trace_file(&self) -> Result<&str> {
        path_str(&self.file)
    }

    pub(crate) fn hot_bytes(&self) -> u64 {
        self.table.stored_len_bytes()
    }

    /// A start with the full store.
    pub(crate) fn local(&mut self, bench: &Bench, workload: &Workload) -> Result<Sample> {
        let file = self.file.with_extension("again");
        let (local, sample) = local_start(bench, workload, &file)?;
        self.locals.push(local);
        Ok(sample)
    }

    /// T* with the think times of each of the local starts, the first recorded only if it is the only one.
    pub(crate) fn packed(&self, bench: &Bench, is_alone: bool) -> Result<Vec<Packed>> {
        let hot =
            HotBlob { trace: &self.trace, table: &self.table, blob: &self.hot, metadata_bytes: self.metadata_bytes };
        let (rate_mbit, delay_ms) = bench.link;
        let bytes_per_s = limit::decode_rate(&hot, bench.work())?;
        let rounds = self.locals.get(1..).filter(|rounds| !rounds.is_empty()).unwrap_or(&self.locals);
        let packed = rounds.iter().map(|local| {
            let mut local = local.clone();
            if !is_alone {
                local.busy = None;
            }
            let round_trip = Duration::from_millis(2 * delay_ms);
            let limit = limit::packed(&local, &hot, rate_mbit, round_trip, bytes_per_s)?;
            Ok(Packed {
                bound_seconds: limit.bound.ready.as_secs_f64(),
                warm_seconds: limit.bound.warm.as_secs_f64(),
                processor_seconds: limit.processors.map(|time| time.as_secs_f64()),
                registry_seconds: local.registry.as_secs_f64(),
                processors: limit::processors()?,
                decode_bytes_per_s: bytes_per_s,
                hot_bytes: self.hot_bytes(),
                attach_bytes: self.attach_bytes,
                unpacked_blocks: limit.unpacked_blocks,
            })
        });
        packed.collect()
    }
}

fn local_start(bench: &Bench, workload: &Workload, file: &Path) -> Result<(LocalStart, Sample)> {
    let host = bench.full_host();
    let image = bench.image(workload);
    let stop = || {
        let stop = ["record", "stop", DEVICE, "--output", path_str(file)?];
        host.ublkimg.call(&stop).map(|_stdout| ())
    };
    let options = bench.recorded();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let sample = host.start(&image, &options, &workload.start, stop)?;
    let trace = load_trace(&std::fs::read(file)?)?;
    let ready = Duration::from_secs_f64(sample.ready_seconds);
    let busy = Some(Duration::from_secs_f64(sample.busy_seconds));
    let registry = Duration::from_secs_f64(sample.registry_seconds);
    Ok((LocalStart { trace, ready, busy, registry }, sample))
}

fn path_str(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
