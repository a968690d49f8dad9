//! Formats of archives, case by case.

use ublkimg_image::Time;

use super::builder::{HeaderBuilder, TarBuilder};
use super::{Entry, EntryKind, Piece, TarReader};
use crate::ErrorKind;
use crate::error::Result;

fn tar() -> TarBuilder {
    TarBuilder::default()
}

/// All entries with their contents.
fn read(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>> {
    let mut reader = TarReader::new(bytes);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut content = Vec::new();
        reader.read_content(|piece| {
            match piece {
                Piece::Data(bytes) => content.extend_from_slice(bytes),
                Piece::Zeros(len) => content.resize(content.len() + usize::try_from(len).unwrap(), 0),
            }
            Ok(())
        })?;
        entries.push((entry, content));
    }
    Ok(entries)
}

fn only(tar: TarBuilder) -> (Entry, Vec<u8>) {
    let mut entries = read(&tar.finish()).unwrap();
    assert_eq!(entries.len(), 1);
    entries.pop().unwrap()
}

fn fails(tar: TarBuilder) {
    assert_eq!(read(&tar.finish()).map(|_| ()).unwrap_err().kind(), ErrorKind::BadSource);
}

#[test]
fn plain_files_and_ends() {
    let archive = tar().file("a", b"hello").file("b", b"");
    let bytes = archive.unfinished();
    for end in [&[][..], &[0; 512], &[0; 1024], &[0; 10_240]] {
        let entries = read(&[bytes.as_slice(), end].concat()).unwrap();
        assert_eq!(
            entries.iter().map(|(entry, content)| (entry.path.as_slice(), content.as_slice())).collect::<Vec<_>>(),
            [(&b"a"[..], &b"hello"[..]), (b"b", b"")]
        );
    }
    assert!(read(b"").unwrap().is_empty());
    // Garbage after the end is not an entry.
    assert_eq!(read(&[bytes.as_slice(), &[0; 1024], &[7; 512]].concat()).unwrap().len(), 2);
}

#[test]
fn an_archive_may_end_with_the_last_byte_of_data() {
    let bytes = tar().file("a", b"hello").unfinished();
    for len in [517, 518, 1023] {
        assert_eq!(read(&bytes[..len]).unwrap()[0].1, b"hello", "{len} bytes");
    }
    assert!(read(&bytes[..516]).is_err());
}

#[test]
fn checksums_of_signed_bytes_are_good_too() {
    let mut header = HeaderBuilder::new(b'0', "").finish();
    header[..2].copy_from_slice(b"\xc3\xa9");
    header[148..156].fill(b' ');
    let sum: i32 = header.iter().map(|byte| i32::from(byte.cast_signed())).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(only(tar().raw(&header)).0.path, b"\xc3\xa9");
}

#[test]
fn hard_links_carry_data_only_where_no_header_follows() {
    let link = |size| HeaderBuilder::new(b'1', "b").link("a").size(size);
    let archives = [
        tar().entry(link(700), b"").file("c", b"1"),
        tar().entry(link(700), &[7; 700]).file("c", b"1"),
        tar().entry(link(1), b"7").file("c", b"1"),
    ];
    for archive in archives {
        let entries = read(&archive.finish()).unwrap();
        let paths: Vec<&[u8]> = entries.iter().map(|(entry, _)| entry.path.as_slice()).collect();
        assert_eq!(paths, [b"b", b"c"]);
        assert_eq!((&entries[0].1[..], &entries[1].1[..]), (&b""[..], &b"1"[..]));
    }
    assert_eq!(read(&tar().entry(link(700), b"").finish()).unwrap().len(), 1);
    assert_eq!(read(&tar().entry(link(700), b"").unfinished()).unwrap().len(), 1);
    assert!(read(&tar().entry(link(700), &[7; 100]).unfinished()).is_err());
}

#[test]
fn damaged_archives_are_refused() {
    let bytes = tar().file("a", &[1; 2000]).finish();
    for len in [1, 511, 513, 600, 2500] {
        let error = read(&bytes[..len]).unwrap_err();
        assert!(error.to_string().contains("truncated"), "{error}");
    }
    let mut flipped = bytes.clone();
    flipped[3] ^= 1;
    assert_eq!(read(&flipped).unwrap_err().kind(), ErrorKind::BadSource);
    fails(tar().raw(&[0; 512]).file("a", b""));
    fails(tar().entry(HeaderBuilder::new(b'9', "a"), b""));
    fails(tar().pax(&[("path", b"a")]));
    fails(tar().pax(&[("path", b"a\0b")]).file("x", b""));
    let mut header = HeaderBuilder::new(b'0', "a");
    header.set(124, b"0000000009x\0");
    fails(tar().entry(header, b""));
    fails(tar().entry(HeaderBuilder::new(b'0', ""), b""));
    fails(tar().entry(HeaderBuilder::new(b'x', "pax").size(3 << 20), &[b' '; 3 << 20]).file("a", b""));
}

#[test]
fn names_by_priority() {
    let mut prefixed = HeaderBuilder::new(b'0', "name");
    prefixed.set(345, b"some/prefix");
    assert_eq!(only(tar().entry(prefixed, b"")).0.path, b"some/prefix/name");
    let mut odd_version = HeaderBuilder::new(b'0', "name");
    odd_version.set(263, b"\0\0");
    odd_version.set(345, b"prefix");
    assert_eq!(only(tar().entry(odd_version, b"")).0.path, b"prefix/name");
    // GNU headers have times where ustar has the prefix.
    let mut gnu = HeaderBuilder::new(b'0', "name").gnu();
    gnu.set(345, b"00000000001");
    assert_eq!(only(tar().entry(gnu, b"")).0.path, b"name");
    let long = "l".repeat(150) + "/name";
    let long_z = format!("{long}\0");
    let gnu_long =
        || tar().entry(HeaderBuilder::new(b'L', "././@LongLink").gnu().size(long_z.len() as u64), long_z.as_bytes());
    assert_eq!(only(gnu_long().file("short", b"")).0.path, long.as_bytes());
    assert_eq!(only(gnu_long().pax(&[("path", b"pax")]).file("short", b"")).0.path, b"pax");
    let link =
        tar().entry(HeaderBuilder::new(b'K', "././@LongLink").gnu().size(long_z.len() as u64), long_z.as_bytes());
    assert_eq!(only(link.symlink("s", "t")).0.kind, EntryKind::Symlink(long.clone().into_bytes()));
    assert_eq!(
        only(tar().pax(&[("linkpath", b"\xff/x")]).hard_link("s", "t")).0.kind,
        EntryKind::HardLink(b"\xff/x".to_vec())
    );
    // Extensions are for one entry.
    let entries = read(&tar().pax(&[("path", b"first")]).file("x", b"").file("second", b"").finish()).unwrap();
    assert_eq!(entries[1].0.path, b"second");
}

#[test]
fn sizes_come_from_pax_first() {
    // A reader that believed the header would see an entry inside the data (CVE-2025-62518).
    let inner = tar().file("smuggled", b"").unfinished();
    let archive = tar()
        .pax(&[("size", inner.len().to_string().as_bytes())])
        .entry(HeaderBuilder::new(b'0', "a"), &inner)
        .file("b", b"");
    let entries = read(&archive.finish()).unwrap();
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0].1, inner);
    // The size is the file's, not that of another extension before it (GHSA-3pv8-6f4r-ffg2).
    let long = b"long-name\0";
    let between = HeaderBuilder::new(b'L', "././@LongLink").gnu().size(long.len() as u64);
    let archive = tar().pax(&[("size", b"3")]).entry(between, long).entry(HeaderBuilder::new(b'0', "a"), b"abc");
    let entries = read(&archive.file("b", b"").finish()).unwrap();
    assert_eq!((entries.len(), &entries[0].0.path[..], &entries[0].1[..]), (2, &b"long-name"[..], &b"abc"[..]));
    fails(tar().pax(&[("size", b"-1")]).file("a", b""));
    fails(tar().pax(&[("size", b"1e3")]).file("a", b""));
    // Directories and links have no data whatever they say.
    let entries = read(&tar().entry(HeaderBuilder::new(b'5', "d").size(512), b"").file("b", b"").finish()).unwrap();
    assert_eq!(entries.len(), 2);
}

#[test]
fn numbers_and_times() {
    let (entry, _) = only(tar().pax(&[("uid", b"4000000000"), ("gid", b"70000"), ("mtime", b"-1.5")]).file("a", b""));
    assert_eq!((entry.uid, entry.gid), (4_000_000_000, 70_000));
    assert_eq!(entry.mtime, Time { seconds: -2, nanoseconds: 500_000_000 });
    let mut header = HeaderBuilder::new(b'0', "a").gnu().mtime(0);
    header.set(108, &[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]);
    header.set(116, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]);
    header.set(136, &[0xff; 12]);
    let (entry, _) = only(tar().entry(header, b""));
    assert_eq!((entry.uid, entry.gid, entry.mtime.seconds), (0x7fff_ffff, u32::MAX - 1, -1));
    assert_eq!(only(tar().entry(HeaderBuilder::new(b'0', "a").mode(0o104_755), b"")).0.mode, 0o4755);
    fails(tar().pax(&[("uid", b"4294967296")]).file("a", b""));
    fails(tar().pax(&[("mtime", b"now")]).file("a", b""));
}

#[test]
fn global_headers_hold_until_overridden() {
    let archive = tar()
        .pax_of_kind(b'g', &[("mtime", b"7.5"), ("comment", b"x"), ("uid", b"9")])
        .file("a", b"")
        .pax(&[("mtime", b"8")])
        .file("b", b"")
        .file("c", b"");
    let entries = read(&archive.finish()).unwrap();
    let times: Vec<i64> = entries.iter().map(|(entry, _)| entry.mtime.seconds).collect();
    assert_eq!(times, [7, 8, 7]);
    assert!(entries.iter().all(|(entry, _)| entry.uid == 9));
    // One that names a file means nothing sensible, but must not break the rest.
    let entries =
        read(&tar().pax_of_kind(b'g', &[("comment", b"git")]).pax(&[("path", b"p")]).file("a", b"").finish()).unwrap();
    assert_eq!(entries[0].0.path, b"p");
}

#[test]
fn old_directories_end_in_a_slash() {
    let mut header = HeaderBuilder::new(0, "dir/");
    header.set(257, &[0; 8]);
    assert_eq!(only(tar().entry(header, b"")).0.kind, EntryKind::Directory);
}

const SPARSE_DATA: &[u8] = b"headtail!";

/// 4 bytes at 0, 5 bytes at 1000, 2000 bytes in all.
fn sparse_content() -> Vec<u8> {
    let mut content = vec![0; 2000];
    content[..4].copy_from_slice(b"head");
    content[1000..1005].copy_from_slice(b"tail!");
    content
}

#[test]
fn sparse_files_of_all_formats() {
    let number = |value: u64| format!("{value:011o}\0").into_bytes();
    let mut gnu = HeaderBuilder::new(b'S', "s").gnu().size(9);
    gnu.set(386, &[number(0), number(4), number(1000), number(5), number(2000), number(0)].concat());
    gnu.set(483, &number(2000));
    let old_gnu = tar().entry(gnu, SPARSE_DATA);

    let mut extended = HeaderBuilder::new(b'S', "s").gnu().size(9);
    extended.set(386, &[number(0), number(4)].concat());
    extended.set(482, &[1]);
    extended.set(483, &number(2000));
    let mut block = [0; 512];
    block[..48].copy_from_slice(&[number(1000), number(5), number(2000), number(0)].concat());
    let old_gnu_extended = tar().raw(&extended.finish()).raw(&block).raw(SPARSE_DATA).raw(&[0; 503]);

    let file = || HeaderBuilder::new(b'0', "s").size(9);
    let pax_0_0 = tar()
        .pax(&[
            ("GNU.sparse.size", b"2000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"0"),
            ("GNU.sparse.numbytes", b"4"),
            ("GNU.sparse.offset", b"1000"),
            ("GNU.sparse.numbytes", b"5"),
        ])
        .entry(file(), SPARSE_DATA);
    let pax_0_1 = tar()
        .pax(&[("GNU.sparse.size", b"2000"), ("GNU.sparse.name", b"s"), ("GNU.sparse.map", b"0,4,1000,5")])
        .entry(HeaderBuilder::new(b'0', "GNUSparseFile.1/s").size(9), SPARSE_DATA);
    let map = b"3\n0\n4\n1000\n5\n2000\n0\n";
    let mut data = map.to_vec();
    data.resize(512, 0);
    data.extend_from_slice(SPARSE_DATA);
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"2000"),
    ];
    let pax_1_0 = tar().pax(&records).entry(HeaderBuilder::new(b'0', "GNUSparseFile.1/s").size(521), &data);
    // With the size in PAX too, as for large files: it covers map and data.
    let pax_1_0_sized =
        tar().pax(&[&records[..], &[("size", b"521")]].concat()).entry(HeaderBuilder::new(b'0', "x"), &data);

    for archive in [old_gnu, old_gnu_extended, pax_0_0, pax_0_1, pax_1_0, pax_1_0_sized] {
        let entries = read(&archive.file("after", b"1").finish()).unwrap();
        assert_eq!(entries[0].0.path, b"s");
        assert_eq!(entries[0].0.kind, EntryKind::File { size_bytes: 2000 });
        assert_eq!(entries[0].1, sparse_content());
        assert_eq!(entries[1].1, b"1");
    }
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let records: [(&str, &[u8]); 3] =
        [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"2000")];
    for map in ["1\n0\n4\n", "9999999999\n", "x\n", "1\n0\n99999999999999999999999\n", "1\n3000\n9\n"] {
        let mut data = map.as_bytes().to_vec();
        data.resize(512, 0);
        data.extend_from_slice(SPARSE_DATA);
        fails(tar().pax(&records).entry(HeaderBuilder::new(b'0', "s").size(521), &data));
    }
    fails(tar().pax(&[("GNU.sparse.map", b"0,9"), ("GNU.sparse.size", b"5")]).file("s", SPARSE_DATA));
    fails(tar().pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")]).file("s", SPARSE_DATA));
}

proptest::proptest! {
    /// Whatever the bytes, reading ends with entries or an error.
    #[test]
    fn damage_never_panics(changes in proptest::collection::vec((0_usize..6000, proptest::num::u8::ANY), 1..8), cut in 0_usize..8000) {
        let mut bytes = sample();
        for (position, byte) in changes {
            let position = position % bytes.len();
            bytes[position] = byte;
            repair_checksum(&mut bytes, position / 512);
        }
        bytes.truncate(cut);
        let _ = count(&bytes);
    }

    #[test]
    fn records_never_panic(data in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = super::pax::read(&data, &mut super::pax::Records::new());
        let _ = super::pax::time(&data);
        let _ = super::number::number(&data);
    }
}

/// One of each extension.
fn sample() -> Vec<u8> {
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"2000"),
    ];
    let mut data = b"2\n0\n4\n1000\n5\n".to_vec();
    data.resize(512, 0);
    data.extend_from_slice(SPARSE_DATA);
    let mut gnu = HeaderBuilder::new(b'S', "s").gnu().size(9);
    gnu.set(386, b"00000000000\x0000000000011\0");
    gnu.set(483, b"00000000011\0");
    tar()
        .pax_of_kind(b'g', &[("mtime", b"7")])
        .pax(&records)
        .entry(HeaderBuilder::new(b'0', "x").size(521), &data)
        .entry(gnu, SPARSE_DATA)
        .entry(HeaderBuilder::new(b'L', "l").gnu().size(5), b"long\0")
        .hard_link("a", "b")
        .pax(&[("SCHILY.xattr.user.x", b"1")])
        .dir("d", 0o755)
        .finish()
}

/// Makes the header in that block valid again, so that damage gets past the checksum.
fn repair_checksum(bytes: &mut [u8], block: usize) {
    let header = &mut bytes[block * 512..(block + 1) * 512];
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Reads to the end without keeping the content: its claimed size may be anything.
fn count(bytes: &[u8]) -> Result<usize> {
    let mut reader = TarReader::new(bytes);
    let mut entries = 0;
    while reader.next_entry()?.is_some() {
        reader.read_content(|_| Ok(()))?;
        entries += 1;
    }
    Ok(entries)
}
