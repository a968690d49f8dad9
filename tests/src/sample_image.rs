//! A small image with everything in it that an image can hold, and the tree that it must become.
//!
//! Three layers, stored in three ways, the same bytes on every run:
//! 1. the base: all kinds of files, sizes around the block and the chunk, links, attributes, odd names and times;
//! 2. what an upper layer can do to a lower one: whiteouts, an opaque directory, changed types, links into the lower
//!    layer, metadata only;
//! 3. directories that the archive only implies, and one of two linked names replaced.
//!
//! The expected tree is computed here from the entries by rules of its own ([`crate::expected_tree`]), so a mistake of the
//! converter does not hide behind itself.

use std::io;
use std::path::Path;

use crate::expected_tree::ExpectedTree;
use crate::oci_layout::{Compression, Layer, OciLayout};
use crate::tar::{Entry, Kind, LongNames, archive};

/// Blocks of this size occur in the format; sizes around them are worth a file each.
const BLOCK_BYTES: usize = 4096;

/// As [`BLOCK_BYTES`].
const CHUNK_BYTES: usize = 256 * 1024;

/// The layers' entries, lowest layer first.
pub struct SampleImage {
    layers: [(Vec<Entry>, Compression, LongNames); 3],
}

impl Default for SampleImage {
    fn default() -> Self {
        Self {
            layers: [
                (base(), Compression::Gzip, LongNames::Pax),
                (changes(), Compression::Zstd, LongNames::Pax),
                (implied(), Compression::None, LongNames::Gnu),
            ],
        }
    }
}

impl SampleImage {
    /// Writes it to a new OCI layout in `dir` as `tag`.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn write_layout(&self, dir: &Path, tag: &str) -> io::Result<OciLayout> {
        let layout = OciLayout::create(dir)?;
        let layers = self.layers.iter().map(|(entries, compression, long_names)| Layer {
            tar: archive(entries, *long_names),
            compression: *compression,
        });
        layout.add_image(tag, layers)?;
        Ok(layout)
    }

    /// Writes the tree that the image must become to the existing directory `dir`; needs root.
    ///
    /// # Errors
    ///
    /// Not root, or the file system there cannot hold it.
    pub fn write_expected_tree(&self, dir: &Path) -> io::Result<()> {
        let mut tree = ExpectedTree::default();
        for (entries, _, _) in &self.layers {
            tree.apply(entries);
        }
        tree.write(dir)
    }
}

/// Bytes that do not compress: xorshift64*.
pub fn noise(seed: u64, len_bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()
    });
    words.flatten().take(len_bytes).collect()
}

/// Bytes that compress well, different in every line.
pub fn prose(len_bytes: usize) -> Vec<u8> {
    let lines = (0u32..).map(|line| format!("{line:08} the quick brown fox jumps over the lazy dog\n").into_bytes());
    lines.flatten().take(len_bytes).collect()
}

fn base() -> Vec<Entry> {
    let mut entries = vec![
        Entry::directory("./").mtime(1_600_000_000, 0),
        Entry::directory("bin"),
        Entry::file("bin/tool", noise(1, 70_000)).mode(0o4755).mtime(1_650_000_000, 123_456_789),
        Entry::file("bin/ping", noise(2, 9_000)).mode(0o755).xattr("security.capability", capability()),
        Entry::symlink("bin/sh", "tool"),
        Entry::directory("etc"),
        Entry::file("etc/passwd", "root:x:0:0:root:/:/bin/sh\n"),
        Entry::file("etc/shadow", "root:*:19000::::::\n").mode(0o640).owner(0, 42),
        Entry::file("etc/removed", "gone in layer 2\n"),
        Entry::file("etc/replaced", "old\n"),
        Entry::directory("data").owner(1000, 1000).mode(0o2775),
        Entry::file("data/prose", prose(3 * 1024 * 1024)).owner(1000, 1000),
        Entry::file("data/noise", noise(3, 2 * 1024 * 1024 + 17)).owner(70_000, 4_000_000_000),
        Entry::file("data/before-1970", "old").mtime(-86_400, 250_000_000),
        Entry::file("data/after-2106", "new").mtime(5_000_000_000, 1),
        Entry::file("data/attributes", "x")
            .xattr("user.short", "value")
            .xattr("user.empty", "")
            .xattr("user.binary", [0, 1, b'\n', b'=', 255])
            .xattr("user.long", noise(4, 3000))
            .xattr("trusted.mine", "kept"),
        Entry::directory("data/empty").xattr("user.of-a-directory", "yes"),
        Entry::file("links/a", noise(5, 10_000)),
        Entry::hard_link("links/b", "links/a"),
        Entry::hard_link("links/c", "./links/a"),
        Entry::symlink("links/dangling", "/nowhere/at/all"),
        Entry::symlink("links/long", &"0123456789/".repeat(50)),
        Entry::new("dev/null", Kind::CharDevice(1, 3)).mode(0o666),
        Entry::new("dev/disk", Kind::BlockDevice(259, 70_000)).mode(0o660).owner(0, 6),
        Entry::new("dev/pipe", Kind::Fifo),
        Entry::directory("tmp").mode(0o1777),
        Entry::directory("var"),
        Entry::directory("var/opaque"),
        Entry::file("var/opaque/hidden", "hidden by layer 2\n"),
        Entry::directory("var/file-later"),
        Entry::file("var/file-later/below", "goes with its directory\n"),
        Entry::file("var/directory-later", "becomes a directory\n"),
        Entry::directory("var/only-metadata"),
        Entry::file("var/only-metadata/kept", "stays\n"),
        Entry::new(b"odd/\xff\xfe not UTF-8".as_slice(), Kind::File(b"1".to_vec())),
        Entry::file("odd/new\nline", "2"),
        Entry::file("odd/gr\u{fc}n \u{1f433}", "3"),
        Entry::file(&format!("odd/{}", "n".repeat(255)), "4"),
        Entry::file(&format!("odd/{}deep", "deep/".repeat(60)), "5"),
    ];
    for size in [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1] {
        entries.push(Entry::file(&format!("sizes/{size}"), noise(size as u64, size)));
    }
    entries.push(Entry::file("sizes/zeros", vec![0; 3 * CHUNK_BYTES]));
    entries.push(Entry::directory("many"));
    entries.extend((0..400).map(|number| {
        Entry::file(&format!("many/file-{number:03}"), format!("{number}\n")).mtime(1_700_000_000 + number, 0)
    }));
    entries
}

fn changes() -> Vec<Entry> {
    vec![
        Entry::directory("etc").mtime(1_710_000_000, 0),
        Entry::file("etc/.wh.removed", ""),
        Entry::file("etc/replaced", "new\n").mode(0o600),
        Entry::file("etc/added", "added\n"),
        // The marker after a sibling: it hides what is below, not what is beside it.
        Entry::directory("var/opaque").mode(0o700),
        Entry::file("var/opaque/shown", "of layer 2\n"),
        Entry::file("var/opaque/.wh..wh..opq", ""),
        Entry::file("var/file-later", "a file now\n"),
        Entry::directory("var/directory-later"),
        Entry::file("var/directory-later/below", "new\n"),
        Entry::directory("var/only-metadata").mode(0o711).owner(5, 6).xattr("user.new", "1"),
        // Links to files of the layer below.
        Entry::hard_link("links/from-above", "links/a"),
        Entry::hard_link("bin/tool-too", "bin/tool"),
        Entry::file(".wh.tmp", ""),
        Entry::file("many/.wh.file-007", ""),
    ]
}

fn implied() -> Vec<Entry> {
    vec![
        // No entry for opt, opt/a, opt/a/b: they are root's, 0755.
        Entry::file("opt/a/b/file", prose(100_000)),
        Entry::file(&format!("opt/{}/gnu", "long-name-".repeat(20)), "GNU"),
        Entry::symlink("opt/gnu-link", &"target/".repeat(30)),
        // links/a, links/c and links/from-above stay one file.
        Entry::file("links/b", "not linked any more\n"),
    ]
}

/// `cap_net_raw=ep`, as the kernel stores it (`linux/capability.h`, revision 2).
fn capability() -> Vec<u8> {
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
