//! `ublkimg trace merge`: one trace of several starts.

use serde::Serialize;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_image::trace;

use crate::args::trace::Merge;
use crate::output;

/// What `trace merge --json` prints.
#[derive(Serialize)]
struct Merged {
    file: String,
    runs: u32,
    entries: usize,
    blocks: u64,
    /// Blocks that every run read.
    blocks_in_all: u64,
}

pub(super) fn run(command: &Merge) -> anyhow::Result<()> {
    let traces = command.files.iter().map(|file| super::load(file)).collect::<anyhow::Result<Vec<_>>>()?;
    let merged = trace::merge(&traces, command.force).map_err(|error| {
        let hint = if command.force { "" } else { "; --force merges traces of any kind" };
        Error::new(ErrorKind::Invalid, format!("{error}{hint}"))
    })?;
    super::file::save(&command.output, &merged)?;
    let in_all = merged.entries.iter().filter(|entry| entry.confidence == u8::MAX);
    let summary = Merged {
        file: command.output.display().to_string(),
        runs: merged.header.runs,
        entries: merged.entries.len(),
        blocks: merged.blocks(),
        blocks_in_all: in_all.map(|entry| u64::from(entry.blocks)).sum(),
    };
    if command.json {
        return output::json(&summary);
    }
    let Merged { file, runs, blocks, blocks_in_all, .. } = summary;
    output::line(&format!("{file}: {runs} runs, {blocks} blocks, {blocks_in_all} of them in every run"))
}
