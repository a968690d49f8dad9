//! `ublkimg trace from-list`: a trace written by hand.

use serde::Serialize;
use ublkimg_driver::error::{Error, ErrorKind};
use ublkimg_image::{BLOCK_SIZE, Sha256, trace};

use super::image::Named;
use crate::args::trace::FromList;
use crate::output;

/// What `trace from-list --json` prints.
#[derive(Serialize)]
struct Listed {
    file: String,
    entries: usize,
    blocks: u64,
    bytes: u64,
    skipped: Vec<Skipped>,
}

#[derive(Serialize)]
struct Skipped {
    line: usize,
    path: String,
    reason: String,
}

pub(super) fn run(command: &FromList) -> anyhow::Result<()> {
    let list = String::from_utf8(super::file::read(&command.list)?)
        .map_err(|error| Error::caused(ErrorKind::Invalid, format!("{} is not text", command.list.display()), error))?;
    let image = Named::fetch(&command.image, &command.registry)?;
    let manifest = Sha256(image.stored.digest.0);
    let made = trace::from_paths(&list, &image.tree, &image.geometry, manifest, command.command.clone())?;
    if made.trace.entries.is_empty() {
        let text = format!("{}: no line names a file with bytes in {}", command.list.display(), command.image);
        return Err(Error::new(ErrorKind::Invalid, text).into());
    }
    super::file::save(&command.output, &made.trace)?;
    let listed = Listed {
        file: command.output.display().to_string(),
        entries: made.trace.entries.len(),
        blocks: made.trace.blocks(),
        bytes: made.trace.blocks() * BLOCK_SIZE as u64,
        skipped: made
            .skipped
            .into_iter()
            .map(|skipped| Skipped { line: skipped.line, path: skipped.text, reason: skipped.reason.to_string() })
            .collect(),
    };
    for Skipped { line, path, reason } in &listed.skipped {
        eprintln!("ublkimg: {}:{line}: {path}: {reason}", command.list.display());
    }
    if command.json {
        return output::json(&listed);
    }
    output::line(&format!("{}: {} blocks ({})", listed.file, listed.blocks, output::bytes(listed.bytes)))
}
