//! A trace written by hand: a list of paths.
//!
//! One path to a line, in the order in which to fetch; empty lines and lines that start with `#` are passed over. A line is
//! a file with all its bytes, or `PATH:OFFSET-LENGTH`, both in bytes. Symbolic links are followed as the container would.

use super::files::file_extents;
use super::{ENTRY_BLOCKS_MAX, PART, TRACE_ENTRIES_MAX, Trace, TraceEntry, TraceHeader, coalesce, distinct_blobs};
use crate::tree::{Kind, NodeId};
use crate::verity::TREE_TAG;
use crate::{BLOCK_SIZE, Error, FileData, Geometry, Result, Sha256, Tree};

/// Most symbolic links on the way to one file: as Linux has it.
const LINKS_MAX: usize = 40;

/// A trace made from a list, and what of the list is not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathTrace {
    /// All entries at time 0 and with full confidence.
    pub trace: Trace,
    /// Lines that name nothing that could be fetched.
    pub skipped: Vec<SkippedPath>,
}

/// A line of a list that is not in the trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedPath {
    /// Number of the line, from 1.
    pub line: usize,
    /// The line.
    pub text: String,
    /// What is wrong with it.
    pub reason: SkipReason,
}

/// Why a path is not in the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SkipReason {
    /// The image has no such path.
    #[error("no such file in the image")]
    NotFound,
    /// It is there and no regular file.
    #[error("not a regular file")]
    NotAFile,
    /// The range starts after the end of the file, or is empty.
    #[error("no byte of the file is in that range")]
    OutOfRange,
}

/// Makes a trace from a list of paths in the merged image that `tree` and `geometry` are of.
///
/// # Errors
/// `TooLarge` if the trace gets more than [`TRACE_ENTRIES_MAX`] entries; `Invalid` if the command is out of its bounds.
pub fn from_paths(
    list: &str,
    tree: &Tree,
    geometry: &Geometry,
    manifest: Sha256,
    command: Vec<String>,
) -> Result<PathTrace> {
    let (mut blobs, blob_of) = distinct_blobs(geometry.devices.iter().map(|device| device.tag));
    // No file lies there; one that says so makes a trace that is refused below.
    blobs.retain(|blob| *blob != TREE_TAG);
    let mut entries = Vec::new();
    let mut skipped = Vec::new();
    for (line, text) in (1..).zip(list.lines()) {
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        match wanted(tree, text) {
            Ok(wanted) => wanted.entries(&blob_of, &mut entries)?,
            Err(reason) => skipped.push(SkippedPath { line, text: text.to_owned(), reason }),
        }
    }
    let header = TraceHeader { manifest, command, read_ahead_kb: 0, runs: 1, ready_us: None, lost: 0, blobs };
    let trace = Trace { header, entries: coalesce(entries) };
    trace.check(|fault| Error::invalid(PART, fault))?;
    Ok(PathTrace { trace, skipped })
}

/// Blocks of a file.
struct Wanted<'a> {
    file: NodeId,
    data: &'a FileData,
    first_block: u64,
    end_block: u64,
}

impl Wanted<'_> {
    fn entries(&self, blob_of: &[u16], out: &mut Vec<TraceEntry>) -> Result<()> {
        for extent in file_extents(self.file, self.data, blob_of) {
            let start = self.first_block.max(extent.file_block);
            let end = self.end_block.min(extent.file_block + u64::from(extent.blocks));
            // Within the extent, so within 32 bits.
            let within = |file_block: u64| u32::try_from(file_block - extent.file_block).map(|at| extent.block + at);
            let (Some(Ok(mut block)), Ok(end)) =
                ((start < end).then(|| within(start)), within(end.max(extent.file_block)))
            else {
                continue;
            };
            while block < end {
                let blocks = u16::try_from(end - block).unwrap_or(u16::MAX).min(ENTRY_BLOCKS_MAX);
                out.push(TraceEntry { blob: extent.blob, block, blocks, since_previous_us: 0, confidence: u8::MAX });
                block += u32::from(blocks);
                if out.len() > TRACE_ENTRIES_MAX {
                    return Err(Error::too_large(PART, format!("more than {TRACE_ENTRIES_MAX} entries")));
                }
            }
        }
        Ok(())
    }
}

/// What a line asks for. A file whose name looks like a range is taken by its name.
fn wanted<'a>(tree: &'a Tree, text: &str) -> Result<Wanted<'a>, SkipReason> {
    let whole = regular_file(tree, text.as_bytes());
    let ((file, data), range) = match (whole, range_of(text)) {
        (Ok(found), _) => (found, None),
        (Err(_), Some((path, range))) => (regular_file(tree, path.as_bytes())?, Some(range)),
        (Err(reason), None) => return Err(reason),
    };
    let (start, end) = match range {
        Some((offset, len)) => (offset, offset.saturating_add(len).min(data.size_bytes)),
        None => (0, data.size_bytes),
    };
    if range.is_some() && start >= end {
        return Err(SkipReason::OutOfRange);
    }
    let block_bytes = BLOCK_SIZE as u64;
    Ok(Wanted { file, data, first_block: start / block_bytes, end_block: end.div_ceil(block_bytes) })
}

/// `PATH:OFFSET-LENGTH` in parts.
fn range_of(text: &str) -> Option<(&str, (u64, u64))> {
    let (path, range) = text.rsplit_once(':')?;
    let (offset, len) = range.split_once('-')?;
    Some((path, (offset.parse().ok()?, len.parse().ok()?)))
}

fn regular_file<'a>(tree: &'a Tree, path: &[u8]) -> Result<(NodeId, &'a FileData), SkipReason> {
    let file = resolve(tree, path).ok_or(SkipReason::NotFound)?;
    match &tree.node(file).kind {
        Kind::File(data) => Ok((file, data)),
        _ => Err(SkipReason::NotAFile),
    }
}

/// What a path leads to, symbolic links followed, with the image's root as `/`.
fn resolve(tree: &Tree, path: &[u8]) -> Option<NodeId> {
    // The names still to be walked, the next one last, and the directories walked so far.
    let mut names: Vec<&[u8]> = path.split(|byte| *byte == b'/').rev().collect();
    let mut walked = vec![NodeId::ROOT];
    let mut links = 0;
    while let Some(name) = names.pop() {
        match name {
            b"" | b"." => continue,
            b".." if walked.len() > 1 => {
                walked.pop();
                continue;
            }
            b".." => continue,
            _ => {}
        }
        let child = *tree.entries(*walked.last()?)?.get(name)?;
        match &tree.node(child).kind {
            Kind::Symlink(target) => {
                links += 1;
                if links > LINKS_MAX {
                    return None;
                }
                if target.starts_with(b"/") {
                    walked.truncate(1);
                }
                names.extend(target.split(|byte| *byte == b'/').rev());
            }
            Kind::Directory(_) => walked.push(child),
            _ if names.iter().all(|name| name.is_empty()) => return Some(child),
            _ => return None,
        }
    }
    walked.last().copied()
}
