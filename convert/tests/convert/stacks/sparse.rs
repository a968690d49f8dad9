//! The four ways to store a file with holes (GNU tar manual, "Storing Sparse Files").

use super::archive::pax_record;
use super::layers::Run;

#[derive(Clone, Copy, Debug)]
pub(super) enum Sparse {
    OldGnu,
    V0_0,
    V0_1,
    V1_0,
}

/// What a file becomes in the archive.
#[derive(Default)]
pub(super) struct Stored {
    pub(super) records: Vec<u8>,
    /// Changes of the header: place and bytes.
    pub(super) header: Vec<(usize, Vec<u8>)>,
    /// Between the header and the data, not counted as either.
    pub(super) extra_blocks: Vec<u8>,
    pub(super) data: Vec<u8>,
}

pub(super) fn store(format: Sparse, runs: &[Run], path: &[u8]) -> Stored {
    let mut regions = Vec::new();
    let (mut size, mut data) = (0, Vec::new());
    for run in runs {
        if run.seed.is_some() {
            regions.push((size, run.len));
            data.extend(run.bytes());
        }
        size += run.len;
    }
    // As GNU tar marks a hole at the end.
    regions.push((size, 0));
    let record = |key: &str, value: String| pax_record(key, value.as_bytes());
    let mut stored = Stored { data, ..Stored::default() };
    match format {
        Sparse::OldGnu => old_gnu(&mut stored, size, &regions),
        Sparse::V0_0 => {
            stored.records.extend(record("GNU.sparse.size", size.to_string()));
            stored.records.extend(record("GNU.sparse.numblocks", regions.len().to_string()));
            for (offset, len) in regions {
                stored.records.extend(record("GNU.sparse.offset", offset.to_string()));
                stored.records.extend(record("GNU.sparse.numbytes", len.to_string()));
            }
        }
        Sparse::V0_1 => {
            let map: Vec<String> = regions.iter().map(|(offset, len)| format!("{offset},{len}")).collect();
            stored.records.extend(record("GNU.sparse.size", size.to_string()));
            stored.records.extend(record("GNU.sparse.numblocks", regions.len().to_string()));
            stored.records.extend(record("GNU.sparse.map", map.join(",")));
            stored.records.extend(pax_record("GNU.sparse.name", path));
        }
        Sparse::V1_0 => {
            stored.records.extend(record("GNU.sparse.major", "1".to_owned()));
            stored.records.extend(record("GNU.sparse.minor", "0".to_owned()));
            stored.records.extend(pax_record("GNU.sparse.name", path));
            stored.records.extend(record("GNU.sparse.realsize", size.to_string()));
            let mut map = format!("{}\n", regions.len()).into_bytes();
            map.extend(regions.iter().flat_map(|(offset, len)| format!("{offset}\n{len}\n").into_bytes()));
            map.resize(map.len().next_multiple_of(512), 0);
            map.append(&mut stored.data);
            stored.data = map;
        }
    }
    stored
}

/// One region in the header, the others in extension blocks: more than few files need, but all that readers must know.
fn old_gnu(stored: &mut Stored, size: usize, regions: &[(usize, usize)]) {
    let number = |value: usize| format!("{value:011o}\0").into_bytes();
    let descriptor = |(offset, len): &(usize, usize)| [number(*offset), number(*len)].concat();
    stored.header.push((156, vec![b'S']));
    stored.header.push((386, descriptor(&regions[0])));
    stored.header.push((483, number(size)));
    let blocks: Vec<_> = regions[1..].chunks(2).collect();
    if !blocks.is_empty() {
        stored.header.push((482, vec![1]));
    }
    for (number, regions) in blocks.iter().enumerate() {
        let mut block: Vec<u8> = regions.iter().flat_map(descriptor).collect();
        block.resize(504, 0);
        block.push(u8::from(number + 1 < blocks.len()));
        block.resize(512, 0);
        stored.extra_blocks.extend(block);
    }
}
