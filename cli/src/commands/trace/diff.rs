//! `ublkimg trace diff`: what two traces have in common, whether in the same order, and in which files they differ.

use std::collections::BTreeMap;

use serde::Serialize;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_image::trace::{self, DiffSide, FileMap, TraceDiff};

use super::image::Named;
use super::show::printable;
use crate::args::trace::Diff;
use crate::output;

/// What `trace diff --json` prints.
#[derive(Serialize)]
struct Difference {
    same_command: bool,
    same_image: bool,
    common_blocks: u64,
    only_left_blocks: u64,
    only_right_blocks: u64,
    /// Common blocks of all blocks.
    jaccard: f64,
    /// Kendall's tau of the common blocks: 1 in the same order, -1 in the reverse one; `null` with less than two.
    order_tau: Option<f64>,
    /// Files that they do not have the same blocks of, those with the most such blocks first; `null` without the image.
    files: Option<Vec<FileDifference>>,
}

#[derive(Default, Serialize)]
struct FileDifference {
    path: String,
    common_blocks: u64,
    only_left_blocks: u64,
    only_right_blocks: u64,
}

impl FileDifference {
    fn different_blocks(&self) -> u64 {
        self.only_left_blocks + self.only_right_blocks
    }
}

pub(super) fn run(command: &Diff) -> anyhow::Result<()> {
    let (left, right) = (super::load(&command.left)?, super::load(&command.right)?);
    let diff = trace::diff(&left, &right)?;
    let image = Named::read(&command.of)?;
    let difference = Difference {
        same_command: left.header.command == right.header.command,
        same_image: left.header.manifest == right.header.manifest,
        common_blocks: diff.common_blocks,
        only_left_blocks: diff.only_a_blocks,
        only_right_blocks: diff.only_b_blocks,
        jaccard: f64::from(diff.jaccard_ppm) / 1e6,
        order_tau: diff.order_ppm.map(|ppm| f64::from(ppm) / 1e6),
        files: image.map(|image| files(&diff, &image)),
    };
    if command.json {
        return output::json(&difference);
    }
    let blocks = |count: u64| format!("{count} blocks ({})", output::bytes(count * BLOCK_SIZE as u64));
    let (left_name, right_name) = (command.left.display(), command.right.display());
    for (label, value) in [
        ("in both".to_owned(), blocks(difference.common_blocks)),
        (format!("only in {left_name}"), blocks(difference.only_left_blocks)),
        (format!("only in {right_name}"), blocks(difference.only_right_blocks)),
        ("in common".to_owned(), format!("{:.4} of all blocks (Jaccard)", difference.jaccard)),
        (
            "order".to_owned(),
            difference
                .order_tau
                .map_or_else(|| "-".to_owned(), |tau| format!("{tau:.4} (Kendall's tau; 1 = the same)")),
        ),
        ("command".to_owned(), if difference.same_command { "the same" } else { "different" }.to_owned()),
        ("image".to_owned(), if difference.same_image { "the same" } else { "different" }.to_owned()),
    ] {
        output::line(&format!("{label:24} {value}"))?;
    }
    let limit = if command.files == 0 { usize::MAX } else { command.files };
    difference.files.map_or(Ok(()), |files| print_files(&files, limit))
}

/// The files whose blocks are not the same ones in both. Blocks of no file of the image are left out.
fn files(diff: &TraceDiff, image: &Named) -> Vec<FileDifference> {
    let map = FileMap::new(&image.tree, &image.geometry);
    let mut by_file = BTreeMap::new();
    for run in &diff.runs {
        for block in run.block..run.block.saturating_add(run.blocks) {
            let Some((file, _)) = map.file_of(run.blob, block) else { continue };
            let of_file: &mut FileDifference = by_file.entry(file.index()).or_insert_with(|| FileDifference {
                path: format!("/{}", String::from_utf8_lossy(&map.path(file))),
                ..FileDifference::default()
            });
            *match run.side {
                DiffSide::Both => &mut of_file.common_blocks,
                DiffSide::OnlyA => &mut of_file.only_left_blocks,
                DiffSide::OnlyB => &mut of_file.only_right_blocks,
            } += 1;
        }
    }
    let mut files: Vec<_> = by_file.into_values().filter(|file| file.different_blocks() > 0).collect();
    files.sort_by(|a, b| b.different_blocks().cmp(&a.different_blocks()).then_with(|| a.path.cmp(&b.path)));
    files
}

fn print_files(files: &[FileDifference], limit: usize) -> anyhow::Result<()> {
    output::line("")?;
    let size = |blocks: u64| output::bytes(blocks * BLOCK_SIZE as u64);
    let row = |file: &FileDifference| {
        let blocks = [file.only_left_blocks, file.only_right_blocks, file.common_blocks];
        let [left, right, both] = blocks.map(size);
        [left, right, both, printable(&file.path)]
    };
    let rows: Vec<[String; 4]> = files.iter().take(limit).map(row).collect();
    output::table(["ONLY LEFT", "ONLY RIGHT", "BOTH", "FILE"], &rows)?;
    match files.len().checked_sub(limit) {
        Some(rest) if rest > 0 => output::line(&format!("and {rest} more files: --files 0 lists them all")),
        _ => Ok(()),
    }
}
