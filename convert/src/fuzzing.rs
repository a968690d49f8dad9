//! Doors for the fuzz targets in `fuzz/`: what they feed is not public otherwise. Not part of the program.

use std::io::{self, Read as _};
use std::num::NonZeroUsize;

use ublkimg_image::{DeviceSlot, MergeRecord, Sha256, read_tree, write_merged};
use ublkimg_registry::descriptor::Platform;

use crate::blob::write_layer_blob;
use crate::chunk_size::ChunkSize;
use crate::compression::Decompressor;
use crate::config::Config;
use crate::error::Result;
use crate::frames::Compress;
use crate::layer::read_tar;
use crate::merge::Merge;
use crate::spool::Spool;
use crate::tar::builder::{HeaderBuilder, TarBuilder};
use crate::tar::{EntryKind, Piece, TarReader};

/// Bytes of a header.
const BLOCK: usize = 512;

/// Bytes decompressed before it is enough.
const DECOMPRESSED_BYTES_MAX: u64 = 64 << 20;

/// Reads an archive: what comes out is within its bounds, and contents are as long as their entries say.
///
/// # Panics
/// If not.
pub fn archive(data: &[u8]) {
    let data = repaired(data);
    let mut reader = TarReader::new(data.as_slice());
    let mut entries = 0;
    while let Ok(Some(entry)) = reader.next_entry() {
        entries += 1;
        assert!(!entry.path.is_empty() && !entry.path.contains(&0) && entry.mode <= 0o7777);
        assert!(entry.mtime.nanoseconds < 1_000_000_000);
        let mut len_bytes = 0_u64;
        let read = reader.read_content(|piece| {
            len_bytes += match piece {
                Piece::Data(bytes) => bytes.len() as u64,
                Piece::Zeros(zeros) => zeros,
            };
            Ok(())
        });
        if let (Ok(()), EntryKind::File { size_bytes }) = (read, entry.kind) {
            assert_eq!(len_bytes, size_bytes);
        }
    }
    assert!(entries <= data.len() / BLOCK);
    assert!(reader.position_bytes() <= data.len() as u64);
}

/// Takes an image config over into a converted image: it stays one, with the layers that the image has now.
///
/// # Panics
/// If not.
pub fn config(data: &[u8]) {
    let Ok(config) = Config::parse(data) else { return };
    let platform = config.platform(&Platform::host());
    let _ = config.diff_ids(2);
    let ids = [Sha256::of(b"1"), Sha256::of(b"2")];
    let again = Config::parse(&config.converted(&ids, true)).expect("what was converted");
    assert_eq!(again.diff_ids(2).expect("two layers"), Some(ids.to_vec()));
    assert_eq!(again.platform(&Platform::host()), platform);
}

/// Configs with what is changed in them.
#[must_use]
pub fn config_seeds() -> Vec<Vec<u8>> {
    let id = Sha256::of(b"0");
    let whole = format!(
        r#"{{"os":"linux","architecture":"arm64","variant":"v8","created":"2020-01-01T00:00:00Z","os.features":["x"],
        "config":{{"Env":["A=B"]}},"history":[{{"created_by":"a"}}],"rootfs":{{"type":"layers","diff_ids":["{id}","{id}"]}}}}"#
    );
    vec![whole.into_bytes(), b"{}".to_vec(), br#"{"history":null,"os.features":null,"rootfs":null}"#.to_vec()]
}

/// Decompresses a layer.
pub fn decompress(mut data: &[u8]) {
    if let Ok(decompressor) = Decompressor::new(&mut data) {
        let _ = io::copy(&mut decompressor.take(DECOMPRESSED_BYTES_MAX), &mut io::sink());
    }
}

/// Converts archives, lowest first, to layer blobs and merges them: what was written can be read, and says the same.
///
/// # Panics
/// If not.
pub fn layers(archives: &[&[u8]]) {
    // Whatever is wrong with the archives is an error like any other.
    let _ = try_layers(archives);
}

fn try_layers(archives: &[&[u8]]) -> Result<()> {
    let dir = std::env::temp_dir();
    let mut merge = Merge::new();
    let mut devices = Vec::new();
    for archive in archives {
        let how = Compress { level: 1, threads: NonZeroUsize::MIN };
        let mut spool = Spool::new(&dir, ChunkSize::default(), how)?;
        let layer = read_tar(repaired(archive).as_slice(), &mut spool)?;
        // A sparse file names a piece that is nearly all zeros in a few bytes: it costs its frame, not its length.
        assert!(spool.end_bytes <= 16 * archive.len() as u64);
        let tree = layer.tree.clone();
        let blob = write_layer_blob(layer, &spool, &dir, how, &|_| Ok(()))?;
        let (read, _) = read_tree(&blob.metadata).expect("a layer that was written");
        assert!(read.len() <= tree.len());
        let record = blob.record.encode().map(|bytes| MergeRecord::decode(&bytes).expect("a record that was written"));
        let Ok(record) = record else { return Ok(()) };
        merge.apply(&read, &record, &blob.index)?;
        devices.push(DeviceSlot { blocks: blob.index.raw_len_blocks(), tag: blob.blob.digest });
    }
    let merged = merge.into_tree();
    let Ok(metadata) = write_merged(&merged, &devices) else { return Ok(()) };
    let (read, _) = read_tree(&metadata).expect("an image that was written");
    assert!(read == merged);
    Ok(())
}

/// Makes headers valid again that were changed, so that changes get past their checksums.
fn repaired(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    for block in data.chunks_exact_mut(BLOCK).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    data
}

/// Archives with one of everything.
pub fn archive_seeds() -> Vec<Vec<u8>> {
    let tar = TarBuilder::default;
    let sparse: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.realsize", b"2000"),
    ];
    let mut data = b"2\n0\n4\n1000\n5\n".to_vec();
    data.resize(BLOCK, 0);
    data.extend_from_slice(b"headtail!");
    let mut old_sparse = HeaderBuilder::new(b'S', "old-sparse").gnu().size(9);
    old_sparse.set(386, b"00000000000\x0000000000011\0");
    old_sparse.set(483, b"00000000011\0");
    let base = tar()
        .pax_of_kind(b'g', &[("mtime", b"7.5")])
        .pax(&sparse)
        .entry(HeaderBuilder::new(b'0', "x").size(521), &data)
        .entry(old_sparse, b"headtail!")
        .dir("usr/lib", 0o700)
        .symlink("lib", "usr/lib")
        .file("usr/lib/a", b"contents")
        .hard_link("b", "usr/lib/a")
        .entry(HeaderBuilder::new(b'3', "null").device(1, 3), b"");
    let upper = tar()
        .hard_link("c", "b")
        .file("usr/.wh.lib", b"")
        .file("usr/lib/new", b"1")
        .file("opaque/.wh..wh..opq", b"")
        .pax(&[("SCHILY.xattr.user.x", b"1"), ("LIBARCHIVE.xattr.user.y", b"dmFsdWU"), ("mtime", b"-1.5")])
        .file("lib/through", b"2")
        .entry(HeaderBuilder::new(b'L', "l").gnu().size(5), b"long\0")
        .file("x", b"");
    let old = [
        tar().pax(&[("GNU.sparse.map", b"0,4,10,5"), ("GNU.sparse.size", b"20")]).file("s", b"headtail!"),
        tar()
            .pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.offset", b"0"), ("GNU.sparse.numbytes", b"9")])
            .file("s", b"headtail!"),
    ];
    [base, upper].into_iter().chain(old).map(TarBuilder::finish).collect()
}
