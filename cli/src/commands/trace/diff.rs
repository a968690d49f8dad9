//! `ublkimg trace diff`: what two traces have in common, and whether in the same order.

use serde::Serialize;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_image::trace;

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
}

pub(super) fn run(command: &Diff) -> anyhow::Result<()> {
    let (left, right) = (super::load(&command.left)?, super::load(&command.right)?);
    let diff = trace::diff(&left, &right)?;
    let difference = Difference {
        same_command: left.header.command == right.header.command,
        same_image: left.header.manifest == right.header.manifest,
        common_blocks: diff.common_blocks,
        only_left_blocks: diff.only_a_blocks,
        only_right_blocks: diff.only_b_blocks,
        jaccard: f64::from(diff.jaccard_ppm) / 1e6,
        order_tau: diff.order_ppm.map(|ppm| f64::from(ppm) / 1e6),
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
    Ok(())
}
