//! Layers as they come: compressed archives, and stacks of them.

use ublkimg_convert::fuzzing::{self, archive_seeds};

/// Bytes that a length counts: those of a tar block.
const UNIT: usize = 512;

/// Two archives, the length of the first (one byte, in blocks) before them.
pub(crate) fn layers(data: &[u8]) {
    let Some((blocks, rest)) = data.split_first() else {
        return;
    };
    let (lower, upper) = rest.split_at(rest.len().min(usize::from(*blocks) * UNIT));
    fuzzing::layers(&[lower, upper]);
}

pub(crate) fn layers_seeds() -> Vec<Vec<u8>> {
    let archives = archive_seeds();
    let seed = |(lower, upper): (&Vec<u8>, &Vec<u8>)| {
        let blocks = u8::try_from(lower.len() / UNIT).expect("a short archive");
        [&[blocks][..], lower, upper].concat()
    };
    archives.iter().zip(archives.iter().cycle().skip(1)).map(seed).collect()
}

/// zstd and gzip frames with what may stand between them. The gzip ones hold "one", stored.
pub(crate) fn decompress_seeds() -> Vec<Vec<u8>> {
    let zstd = b"\x28\xb5\x2f\xfd\x20\x04\x21\x00\x00tar!".to_vec();
    let skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip".to_vec();
    let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\xff\x01\x03\0\xfc\xffone\xa6\x65\x76\x7a\x03\0\0\0".to_vec();
    vec![
        zstd.clone(),
        gzip.clone(),
        [skippable.clone(), zstd.clone(), skippable, zstd].concat(),
        [gzip.clone(), gzip].concat(),
        b"plain".to_vec(),
    ]
}
