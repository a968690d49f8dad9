//! `ublkimg optimize`: a profile of recorded starts, beside the image.

use serde::Serialize;
use ublkimg_convert::{OptimizeOptions, Optimized, Options, optimize};
use ublkimg_registry::Location;
use ublkimg_registry::descriptor::Platform;

use crate::args::trace::Optimize;
use crate::{output, progress};

/// What `optimize --json` prints.
#[derive(Serialize)]
struct Report {
    reference: String,
    index: String,
    manifest: String,
    profile: String,
    existed: bool,
    command: Vec<String>,
    name: Option<String>,
    is_default: bool,
    runs: u32,
    blocks: u64,
    dropped_of_other_blobs: u64,
    dropped_past_end: u64,
    trace_bytes: u64,
    hot: Option<Hot>,
}

#[derive(Serialize)]
struct Hot {
    digest: String,
    stored_bytes: u64,
    blocks: u64,
    frames: usize,
    chunks_read: u64,
    chunk_bytes_read: u64,
}

pub(super) fn run(command: &Optimize) -> anyhow::Result<()> {
    let location = super::location(&command.reference)?;
    let traces = command.traces.iter().map(|file| super::trace::load(file)).collect::<anyhow::Result<Vec<_>>>()?;
    let defaults = Options::default();
    let options = OptimizeOptions {
        client: super::client_options(&command.registry),
        platform: Platform::host(),
        tmpdir: command.tmpdir.clone(),
        level: command.level,
        threads: command.threads.unwrap_or(defaults.threads),
        name: command.name.clone(),
        is_default: command.default,
        order_only: command.order_only,
        force: command.force,
    };
    let work = optimize(&location, &traces, &options, progress::for_stderr());
    let optimized = super::runtime()?.block_on(work)?;
    super::trace::warn_dropped(&optimized.dropped, optimized.blocks);
    if command.json {
        return output::json(&report(&location, &options, optimized));
    }
    output::line(&format!("{location}@{}", optimized.index))
}

fn report(location: &Location, options: &OptimizeOptions, optimized: Optimized) -> Report {
    Report {
        reference: location.to_string(),
        index: optimized.index.to_string(),
        manifest: optimized.manifest.to_string(),
        profile: optimized.profile.to_string(),
        existed: optimized.existed,
        command: optimized.command,
        name: options.name.clone(),
        is_default: options.is_default,
        runs: optimized.runs,
        blocks: optimized.blocks,
        dropped_of_other_blobs: optimized.dropped.other_blobs,
        dropped_past_end: optimized.dropped.past_end,
        trace_bytes: optimized.trace_bytes,
        hot: optimized.hot.map(|hot| Hot {
            digest: hot.digest.to_string(),
            stored_bytes: hot.size_bytes,
            blocks: hot.blocks,
            frames: hot.frames,
            chunks_read: hot.chunks_read,
            chunk_bytes_read: hot.chunk_bytes_read,
        }),
    }
}
