//! From blocks of a device to pieces of the files of the image that lies on it.

use std::ops::Range;

use ublkimg_image::trace::{FileMap, OWN_DATA};
use ublkimg_image::{BLOCK_SIZE, NodeId};

use super::feed::Run;

/// What of one file is pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FilePieces {
    pub(super) file: NodeId,
    /// In bytes, ascending, not touching each other.
    pub(super) pieces: Vec<Range<u64>>,
}

/// The files that have blocks of `runs`, those first whose blocks come first. Blocks before `data_block` are metadata, and
/// what no file has is left out.
pub(super) fn of_files(map: &FileMap<'_>, data_block: u32, runs: &[Run]) -> Vec<FilePieces> {
    let mut files: Vec<FilePieces> = Vec::new();
    for run in runs {
        let own = run.start.saturating_sub(data_block)..run.end.saturating_sub(data_block);
        for part in map.parts(OWN_DATA, own) {
            let start = part.file_block * BLOCK_SIZE as u64;
            let piece = start..start + u64::from(part.blocks) * BLOCK_SIZE as u64;
            // A turn has a few hundred files at most, and mostly the last one goes on.
            match files.iter_mut().rev().find(|known| known.file == part.file) {
                Some(known) => known.pieces.push(piece),
                None => files.push(FilePieces { file: part.file, pieces: vec![piece] }),
            }
        }
    }
    for file in &mut files {
        file.pieces.sort_by_key(|piece| piece.start);
        file.pieces = joined(&file.pieces);
    }
    files
}

fn joined(pieces: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
            _ => joined.push(piece.clone()),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ublkimg_image::{
        DataBlock, DeviceSlot, FileData, FileLayout, Kind, Meta, Node, Sha256, Space, Tree, flat_block0, read_tree,
        write_merged,
    };

    use super::*;

    /// The metadata of a device with files of so many blocks, one after another in one layer, as the device has it.
    fn metadata(files: &[u32]) -> Vec<u8> {
        let mut tree = Tree::new(Meta::default());
        let mut next = 0;
        for (number, blocks) in files.iter().enumerate() {
            let layout = FileLayout::Contiguous(DataBlock { space: Space::Device(0), block: next });
            let data = FileData { size_bytes: u64::from(*blocks) * BLOCK_SIZE as u64 - 7, layout };
            let id = tree.add(Node { meta: Meta::default(), kind: Kind::File(data) });
            tree.link(NodeId::ROOT, format!("{number:03}"), id);
            next += blocks;
        }
        let mut metadata = write_merged(&tree, &[DeviceSlot { blocks: next, tag: Sha256([1; 32]) }]).unwrap();
        let total_blocks = u32::try_from(metadata.len() / BLOCK_SIZE).unwrap() + next + 256;
        let block0 = flat_block0(metadata[..BLOCK_SIZE].try_into().unwrap(), total_blocks).unwrap();
        metadata[..BLOCK_SIZE].copy_from_slice(&block0);
        metadata
    }

    /// Pieces, as first block and end, by the number of the file.
    fn pieces(files: &[u32], runs: &[Run]) -> Vec<(usize, Vec<(u64, u64)>)> {
        let (tree, geometry) = read_tree(&metadata(files)).unwrap();
        let map = FileMap::new(&tree, &geometry);
        let first = geometry.metadata_blocks;
        let runs: Vec<Run> = runs.iter().map(|run| run.start + first..run.end + first).collect();
        let in_blocks = |bytes: &Range<u64>| (bytes.start / BLOCK_SIZE as u64, bytes.end / BLOCK_SIZE as u64);
        let of_file = |of: FilePieces| {
            let number = String::from_utf8(map.path(of.file)).unwrap().parse::<usize>().unwrap();
            (number, of.pieces.iter().map(in_blocks).collect::<Vec<_>>())
        };
        of_files(&map, first, &runs).into_iter().map(of_file).collect()
    }

    #[test]
    fn neighbours_in_a_file_are_one_piece_whatever_their_order() {
        let found = pieces(&[10, 20, 5], &[12..14, 3..4, 14..16, 25..31, 11..12, 4..5]);
        assert_eq!(found, [(1, vec![(1, 6), (15, 20)]), (0, vec![(3, 5)]), (2, vec![(0, 1)])]);
        assert_eq!(pieces(&[10], &[8..4000, 40..41]), [(0, vec![(8, 10)])], "past the end there is nothing");
    }

    #[test]
    fn metadata_is_no_file() {
        let (tree, geometry) = read_tree(&metadata(&[4])).unwrap();
        let map = FileMap::new(&tree, &geometry);
        let first = geometry.metadata_blocks;
        assert_eq!(of_files(&map, first, &[0..1, 0..first]), []);
        let over_the_edge = of_files(&map, first, &[first - 1..first + 1, first + 1..first + 2]);
        assert_eq!(over_the_edge.len(), 1);
        assert_eq!(over_the_edge[0].pieces.first(), Some(&(0..2 * BLOCK_SIZE as u64)));
    }

    proptest! {
        /// The pieces are the blocks of the runs, no more and no less, each once.
        #[test]
        fn all_blocks_and_no_others(
            files in prop::collection::vec(1u32..30, 1..12),
            runs in prop::collection::vec((0u32..300, 1u32..20), 0..30),
        ) {
            let runs: Vec<Run> = runs.into_iter().map(|(start, len)| start..start + len).collect();
            let starts: Vec<u32> = files.iter().scan(0, |next, len| { *next += len; Some(*next - len) }).collect();
            let total: u32 = files.iter().sum();
            let mut wanted: Vec<u32> = runs.iter().cloned().flatten().filter(|block| *block < total).collect();
            wanted.sort_unstable();
            wanted.dedup();
            let mut found: Vec<u32> = Vec::new();
            for (file, pieces) in pieces(&files, &runs) {
                prop_assert!(pieces.windows(2).all(|pair| pair[0].1 < pair[1].0));
                let block = |at: u64| starts[file] + u32::try_from(at).unwrap();
                found.extend(pieces.into_iter().flat_map(|(start, end)| start..end).map(block));
            }
            found.sort_unstable();
            prop_assert_eq!(found, wanted);
        }
    }
}
