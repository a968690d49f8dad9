//! What is in an image: counted from its metadata and its chunk indexes.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use serde::Serialize;
use ublkimg_image::{BLOCK_SIZE, Bundle, ChunkId, DataBlock, FileData, FileLayout, Kind, NodeId, read_tree};

/// Chunks that another place of the image has too: stored, but fetched and kept once.
#[derive(Serialize, Default)]
pub(super) struct Duplicates {
    pub(super) chunks: u64,
    pub(super) stored_bytes: u64,
}

impl Duplicates {
    pub(super) fn of(bundle: &Bundle) -> Self {
        let mut seen: HashSet<ChunkId> = HashSet::new();
        let mut duplicates = Self::default();
        for chunk in bundle.layers.iter().flat_map(|layer| layer.index.iter()) {
            if !seen.insert(chunk.id) {
                duplicates.chunks += 1;
                duplicates.stored_bytes += chunk.stored.end - chunk.stored.start;
            }
        }
        duplicates
    }
}

/// The merged tree.
#[derive(Serialize, Default)]
pub(super) struct Contents {
    /// Regular files, each counted once however many names it has.
    pub(super) files: u64,
    pub(super) directories: u64,
    /// Links, devices and the like.
    pub(super) others: u64,
    /// Lengths of all files.
    pub(super) file_bytes: u64,
    /// Bytes of files that are stored where those of an other file, or other bytes of the same one, are: whole blocks.
    pub(super) shared_bytes: u64,
    pub(super) largest: Vec<LargeFile>,
}

#[derive(Serialize)]
pub(super) struct LargeFile {
    pub(super) path: String,
    pub(super) size_bytes: u64,
}

impl Contents {
    pub(super) fn of(metadata: &[u8], largest: usize) -> anyhow::Result<Self> {
        let (tree, _) = read_tree(metadata)?;
        let mut contents = Self::default();
        // Files in the order of their paths, each under its first one.
        let mut files: Vec<(u64, NodeId, &[u8])> = Vec::new();
        let mut directories: HashMap<NodeId, (NodeId, &[u8])> = HashMap::new();
        let mut seen: HashSet<NodeId> = HashSet::new();
        // Where data starts, and how much of it is known to be there.
        let mut starts: HashMap<DataBlock, u64> = HashMap::new();
        let mut open = vec![(NodeId::ROOT, NodeId::ROOT, &b""[..])];
        while let Some((id, parent, name)) = open.pop() {
            if !seen.insert(id) {
                continue;
            }
            match &tree.node(id).kind {
                Kind::Directory(entries) => {
                    contents.directories += 1;
                    directories.insert(id, (parent, name));
                    open.extend(entries.iter().rev().map(|(name, child)| (*child, id, &name[..])));
                }
                Kind::File(data) => {
                    contents.files += 1;
                    contents.file_bytes += data.size_bytes;
                    contents.shared_bytes += shared_bytes(&mut starts, data);
                    files.push((data.size_bytes, parent, name));
                }
                _ => contents.others += 1,
            }
        }
        files.sort_by_key(|(size_bytes, ..)| Reverse(*size_bytes));
        let largest = files.into_iter().take(largest);
        contents.largest = largest
            .map(|(size_bytes, parent, name)| LargeFile { path: path(&directories, parent, name), size_bytes })
            .collect();
        Ok(contents)
    }
}

/// The path of a name in the directory `parent`.
fn path(directories: &HashMap<NodeId, (NodeId, &[u8])>, mut parent: NodeId, name: &[u8]) -> String {
    let mut names = vec![name];
    while parent != NodeId::ROOT
        && let Some((next, name)) = directories.get(&parent)
    {
        names.push(name);
        parent = *next;
    }
    names.iter().rev().map(|name| format!("/{}", String::from_utf8_lossy(name))).collect()
}

/// Bytes of the file that were counted already, by where their runs start.
fn shared_bytes(starts: &mut HashMap<DataBlock, u64>, data: &FileData) -> u64 {
    let mut count = |start: DataBlock, blocks: u64| {
        let known = starts.entry(start).or_default();
        let shared = blocks.min(*known);
        *known = blocks.max(*known);
        shared * BLOCK_SIZE as u64
    };
    let blocks = data.size_bytes.div_ceil(BLOCK_SIZE as u64);
    match &data.layout {
        _ if blocks == 0 => 0,
        FileLayout::Contiguous(start) => count(*start, blocks),
        FileLayout::Chunked { chunk_blocks_log2, blocks: chunks } => {
            let chunk_blocks = 1_u64 << chunk_blocks_log2;
            let len = |number: usize| chunk_blocks.min(blocks.saturating_sub(number as u64 * chunk_blocks));
            chunks.iter().enumerate().filter_map(|(number, start)| Some(count((*start)?, len(number)))).sum()
        }
    }
}
