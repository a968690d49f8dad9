//! Which file a block of a layer blob belongs to.

use std::ops::Range;

use super::{Trace, distinct_blobs};
use crate::tree::{FileData, FileLayout, Kind, NodeId, Space};
use crate::{BLOCK_SIZE, Geometry, Sha256, Tree};

/// Blocks of layer blobs and the files that they are of. Where files share blocks, the first in the order of paths has
/// them.
#[derive(Debug)]
pub struct FileMap<'a> {
    tree: &'a Tree,
    blobs: Vec<Sha256>,
    /// By blob and block; they do not overlap.
    extents: Vec<Extent>,
    /// Directory and name of each node, by its index; nothing for the root and for nodes out of the file system.
    names: Vec<Option<(NodeId, &'a [u8])>>,
}

/// A run of blocks of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) blob: u16,
    pub(super) block: u32,
    pub(super) blocks: u32,
    /// Where in the file, in blocks.
    pub(super) file_block: u64,
    file: NodeId,
}

/// What a trace touches of each file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileUsage {
    /// In the order of their first reads.
    pub files: Vec<TouchedFile>,
    /// Blocks of this image's layer blobs that are of no file in it: a layer's own metadata, files that a later layer
    /// replaced or deleted.
    pub other_blocks: u64,
    /// Blocks of layer blobs that this image does not have.
    pub unknown_blocks: u64,
}

/// A file of which a trace has blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TouchedFile {
    /// The file; [`FileMap::path`] has its path.
    pub file: NodeId,
    /// Length of the file.
    pub size_bytes: u64,
    /// Blocks of the file that the trace has.
    pub touched_blocks: u64,
    /// Rank of the first of them.
    pub first_rank: u64,
    /// When that one was read.
    pub first_us: u64,
}

impl TouchedFile {
    /// Length of the file in blocks.
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_SIZE as u64)
    }
}

/// A part of a file that lies in one run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePart {
    /// The file; [`FileMap::path`] has its path.
    pub file: NodeId,
    /// Where in the file it begins, in blocks.
    pub file_block: u64,
    /// Its length in blocks.
    pub blocks: u32,
}

/// What [`FileMap`] calls the blob of an image without a device table: its own data, block 0 right after the metadata.
pub const OWN_DATA: Sha256 = Sha256([0; 32]);

impl<'a> FileMap<'a> {
    /// Of an image as [`read_tree`](crate::read_tree) gives it. The data of one without a device table is that of the blob
    /// [`OWN_DATA`].
    pub fn new(tree: &'a Tree, geometry: &Geometry) -> Self {
        let own = geometry.devices.is_empty().then_some(OWN_DATA);
        let (blobs, blob_of) = distinct_blobs(geometry.devices.iter().map(|device| device.tag).chain(own));
        let mut names = vec![None; tree.len()];
        let mut extents = Vec::new();
        let mut pending = vec![NodeId::ROOT];
        while let Some(id) = pending.pop() {
            match &tree.node(id).kind {
                // Its entries come off the stack in order; a node that has a name already is a second link.
                Kind::Directory(entries) => {
                    let first = pending.len();
                    for (name, child) in entries {
                        if *child != NodeId::ROOT && names[child.index()].is_none() {
                            names[child.index()] = Some((id, &name[..]));
                            pending.push(*child);
                        }
                    }
                    pending[first..].reverse();
                }
                Kind::File(data) => extents.extend(file_extents(id, data, &blob_of)),
                _ => {}
            }
        }
        Self { tree, blobs, extents: without_overlaps(extents), names }
    }

    /// The file that has that block, and where in the file it is, in bytes.
    pub fn file_of(&self, blob: Sha256, block: u32) -> Option<(NodeId, u64)> {
        let blob = self.blob_number(blob)?;
        let extent = self.overlapping(blob, block, 1).next()?;
        let block = extent.file_block + u64::from(block - extent.block);
        Some((extent.file, block * BLOCK_SIZE as u64))
    }

    /// The parts of files that lie in these blocks, in the order of the blocks.
    pub fn parts(&self, blob: Sha256, blocks: Range<u32>) -> impl Iterator<Item = FilePart> {
        let extents = self.blob_number(blob).into_iter().flat_map({
            let blocks = blocks.clone();
            move |blob| self.overlapping(blob, blocks.start, blocks.end.saturating_sub(blocks.start))
        });
        extents.map(move |extent| {
            let start = extent.block.max(blocks.start);
            FilePart {
                file: extent.file,
                file_block: extent.file_block + u64::from(start - extent.block),
                blocks: (extent.block + extent.blocks).min(blocks.end) - start,
            }
        })
    }

    /// The path of a file: names joined by slashes, none at the start.
    pub fn path(&self, file: NodeId) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = file;
        while let Some((parent, name)) = self.names.get(at.index()).copied().flatten() {
            names.push(name);
            at = parent;
        }
        names.reverse();
        names.join(&b'/')
    }

    /// What the trace touches of each file.
    pub fn usage(&self, trace: &Trace) -> FileUsage {
        let numbers: Vec<_> = trace.header.blobs.iter().map(|blob| self.blob_number(*blob)).collect();
        let mut usage = FileUsage::default();
        // Place in `usage.files` + 1 of each node; 0 for files that are not touched.
        let mut places = vec![0usize; self.tree.len()];
        let (mut rank, mut clock_us) = (0u64, 0u64);
        for entry in &trace.entries {
            clock_us = clock_us.saturating_add(entry.since_previous_us);
            let blocks = u64::from(entry.blocks);
            let Some(blob) = numbers.get(usize::from(entry.blob)).copied().flatten() else {
                usage.unknown_blocks += blocks;
                rank += blocks;
                continue;
            };
            let end = entry.block.saturating_add(u32::from(entry.blocks));
            let mut of_files = 0;
            for extent in self.overlapping(blob, entry.block, u32::from(entry.blocks)) {
                let start = extent.block.max(entry.block);
                let touched = u64::from((extent.block + extent.blocks).min(end) - start);
                let place = &mut places[extent.file.index()];
                if *place == 0 {
                    usage.files.push(TouchedFile {
                        file: extent.file,
                        size_bytes: self.size_of(extent.file),
                        touched_blocks: 0,
                        first_rank: rank + u64::from(start - entry.block),
                        first_us: clock_us,
                    });
                    *place = usage.files.len();
                }
                usage.files[*place - 1].touched_blocks += touched;
                of_files += touched;
            }
            usage.other_blocks += blocks - of_files;
            rank += blocks;
        }
        usage
    }

    fn size_of(&self, file: NodeId) -> u64 {
        match &self.tree.node(file).kind {
            Kind::File(data) => data.size_bytes,
            _ => 0,
        }
    }

    fn blob_number(&self, blob: Sha256) -> Option<u16> {
        let number = self.blobs.iter().position(|known| *known == blob)?;
        u16::try_from(number).ok()
    }

    /// The extents that have one of these blocks.
    fn overlapping(&self, blob: u16, block: u32, blocks: u32) -> impl Iterator<Item = &Extent> {
        let first = self.extents.partition_point(|extent| (extent.blob, extent.block + extent.blocks) <= (blob, block));
        let end = block.saturating_add(blocks);
        self.extents[first..].iter().take_while(move |extent| extent.blob == blob && extent.block < end)
    }
}

/// The runs of blocks of a file in layer blobs, in the order of the file.
pub(super) fn file_extents(file: NodeId, data: &FileData, blob_of: &[u16]) -> Vec<Extent> {
    let mut extents = Vec::new();
    let size_blocks = data.size_bytes.div_ceil(BLOCK_SIZE as u64);
    let (piece_blocks, pieces) = match &data.layout {
        _ if size_blocks == 0 => return extents,
        FileLayout::Contiguous(block) => (size_blocks, &[Some(*block)][..]),
        FileLayout::Chunked { chunk_blocks_log2, blocks } => (1 << chunk_blocks_log2, &blocks[..]),
    };
    let mut file_block = 0;
    for piece in pieces {
        let blocks = piece_blocks.min(size_blocks.saturating_sub(file_block));
        if let Some(data) = piece
            && let (Some(blob), Ok(blocks)) = (blob_of.get(place_of(data.space)), u32::try_from(blocks))
        {
            extents.push(Extent { blob: *blob, block: data.block, blocks, file_block, file });
        }
        file_block += blocks;
    }
    extents
}

/// In the device table; an image without one has its own data alone.
fn place_of(space: Space) -> usize {
    match space {
        Space::Device(device) => usize::from(device),
        Space::Own => 0,
    }
}

/// Sorted, and each block kept by the extent that starts first; of several with one start, by the first of them.
fn without_overlaps(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_by_key(|extent| (extent.blob, extent.block));
    let mut end = (0, 0);
    extents.retain_mut(|extent| {
        let extent_end = extent.block.saturating_add(extent.blocks);
        if extent.blob == end.0 && extent.block < end.1 {
            let cut = end.1.min(extent_end) - extent.block;
            extent.block += cut;
            extent.blocks -= cut;
            extent.file_block += u64::from(cut);
        }
        if extent.blob != end.0 || extent_end > end.1 {
            end = (extent.blob, extent_end);
        }
        extent.blocks > 0
    });
    extents
}
