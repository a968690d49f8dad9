//! Sparse files: which regions of a file the archive stores.
//!
//! Four encodings exist: old GNU headers of type `S` with extension blocks, and PAX 0.0 (repeated keys), 0.1 (one
//! comma-separated key) and 1.0 (a text map before the data). All become a checked list of [`Region`]s.
//! Source: GNU tar manual, "Storing Sparse Files"; "Basic Tar Format".

use super::number::unsigned;
use super::pax::{Region, decimal};
use super::{Malformed, SPARSE_REGIONS_MAX};

/// A sparse file: its length with holes, and where its data goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SparseMap {
    pub(super) size_bytes: u64,
    regions: Vec<Region>,
}

impl SparseMap {
    /// Checks that regions ascend, lie in the file, and hold `stored_bytes` together.
    pub(super) fn new(size_bytes: u64, regions: Vec<Region>, stored_bytes: u64) -> Result<Self, Malformed> {
        let bad = Malformed("sparse map");
        let (mut end, mut sum) = (0_u64, 0_u64);
        for region in &regions {
            if region.offset_bytes < end {
                return Err(bad);
            }
            end = region.offset_bytes.checked_add(region.len_bytes).ok_or(bad)?;
            sum += region.len_bytes;
        }
        if end > size_bytes || sum != stored_bytes || regions.len() > SPARSE_REGIONS_MAX {
            return Err(bad);
        }
        Ok(Self { size_bytes, regions })
    }

    /// The file from front to back: zeros before each region, then its data; zeros at the end.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut end = 0;
        let tail = Region { offset_bytes: self.size_bytes, len_bytes: 0 };
        self.regions.iter().copied().chain([tail]).map(move |region| {
            let zeros = region.offset_bytes - end;
            end = region.offset_bytes + region.len_bytes;
            (zeros, region.len_bytes)
        })
    }
}

/// Appends the descriptors of an old GNU header or extension block: 24 bytes each, up to the first empty one.
pub(super) fn push_old_gnu(descriptors: &[u8], regions: &mut Vec<Region>) -> Result<(), Malformed> {
    for descriptor in descriptors.chunks_exact(24) {
        if descriptor[0] == 0 && descriptor[12] == 0 {
            break;
        }
        let field = |range| unsigned(&descriptor[range]).ok_or(Malformed("sparse descriptor"));
        regions.push(Region { offset_bytes: field(0..12)?, len_bytes: field(12..24)? });
    }
    if regions.len() > SPARSE_REGIONS_MAX { Err(Malformed("sparse map (too long)")) } else { Ok(()) }
}

/// Reads the comma-separated map of PAX 0.1.
pub(super) fn regions_of_0_1(text: &[u8]) -> Result<Vec<Region>, Malformed> {
    let mut numbers = text.split(|byte| *byte == b',').filter(|number| !number.is_empty());
    let mut regions = Vec::new();
    while let Some(offset) = numbers.next() {
        let len = numbers.next().ok_or(Malformed("GNU.sparse.map"))?;
        let (Some(offset_bytes), Some(len_bytes)) = (decimal(offset), decimal(len)) else {
            return Err(Malformed("GNU.sparse.map"));
        };
        regions.push(Region { offset_bytes, len_bytes });
    }
    Ok(regions)
}

/// Reads the text map of PAX 1.0: a count, then offset and length of each region, one number per line. Asks `line`
/// for them one by one.
pub(super) fn regions_of_1_0<E: From<Malformed>>(mut number: impl FnMut() -> Result<u64, E>) -> Result<Vec<Region>, E> {
    let count = number()?;
    if count > SPARSE_REGIONS_MAX as u64 {
        return Err(Malformed("sparse map (too long)").into());
    }
    let mut regions = Vec::new();
    for _ in 0..count {
        regions.push(Region { offset_bytes: number()?, len_bytes: number()? });
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(pairs: &[(u64, u64)]) -> Vec<Region> {
        pairs.iter().map(|&(offset_bytes, len_bytes)| Region { offset_bytes, len_bytes }).collect()
    }

    #[test]
    fn maps_that_lie_are_refused() {
        for (size, pairs, stored) in [
            (100, &[(0, 10), (5, 10)][..], 20),
            (100, &[(0, 10), (95, 10)], 20),
            (100, &[(0, 10)], 9),
            (100, &[(u64::MAX, 2)], 2),
        ] {
            assert!(SparseMap::new(size, regions(pairs), stored).is_err(), "{pairs:?}");
        }
    }

    #[test]
    fn runs_cover_the_whole_file() {
        let map = SparseMap::new(100, regions(&[(0, 10), (50, 5), (100, 0)]), 15).unwrap();
        let runs: Vec<_> = map.runs().collect();
        assert_eq!(runs, [(0, 10), (40, 5), (45, 0), (0, 0)]);
        assert_eq!(runs.iter().map(|(zeros, data)| zeros + data).sum::<u64>(), 100);
    }

    #[test]
    fn the_0_1_map_has_pairs() {
        assert_eq!(regions_of_0_1(b"0,10,50,5").unwrap(), regions(&[(0, 10), (50, 5)]));
        assert_eq!(regions_of_0_1(b"").unwrap(), []);
        assert!(regions_of_0_1(b"0,10,50").is_err());
        assert!(regions_of_0_1(b"0,x").is_err());
    }
}
