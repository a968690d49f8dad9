//! Layers as tar archives: plainly, in an order that every engine takes, or in any of the ways that archives can say it.

use std::collections::{BTreeMap, VecDeque};

use super::layers::{Change, Kind, Layer, Meta, Path, Run};
use super::random::Random;
use super::sparse::{self, Sparse};

/// How to say it.
pub(super) enum Dialect<'a> {
    /// PAX; directories first, also those that are only implied, hard links after what they name.
    Plain,
    /// Entries in any order, each in a form of its own.
    Odd(&'a mut Random),
}

pub(super) fn archive(layer: &Layer, mut dialect: Dialect<'_>) -> Vec<u8> {
    let implied: Vec<Change> = layer.implied.iter().map(implied_directory).collect();
    let order = match &mut dialect {
        Dialect::Plain => plain_order(implied.iter().chain(&layer.changes)),
        Dialect::Odd(random) => odd_order(&layer.changes, random),
    };
    let mut writer = Writer { dialect, out: Vec::new() };
    if writer.once_in(3) {
        let record = pax_record("comment", b"a global header");
        writer.extension(b'g', &record);
    }
    for change in order {
        writer.change(change);
    }
    let end = if writer.once_in(3) { 0 } else { 1024 };
    writer.out.resize(writer.out.len() + end, 0);
    writer.out
}

/// What we make of a directory that no entry describes.
fn implied_directory(path: &Path) -> Change {
    let meta = Meta { mode: 0o755, ..Meta::default() };
    Change::Object { path: path.clone(), alias: None, meta, kind: Kind::Directory }
}

/// Links into lower layers before what could take their targets away, links within the layer after what they name.
/// Directories come once more when all is deleted that will be, which changes the time of what it was in.
fn plain_order<'a>(changes: impl Iterator<Item = &'a Change>) -> Vec<&'a Change> {
    let (mut directories, mut links_below, mut deletions, mut others, mut links) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for change in changes {
        match change {
            Change::Object { kind: Kind::Directory, .. } => directories.push(change),
            Change::Link { target_is_below: true, .. } => links_below.push(change),
            Change::Link { .. } => links.push(change),
            Change::Whiteout(_) | Change::Opaque(_) => deletions.push(change),
            Change::Object { .. } => others.push(change),
        }
    }
    // Parents first.
    directories.sort_by_key(|change| change.path());
    [directories.clone(), links_below, deletions, directories, others, links].concat()
}

/// Any order, but of several entries for one path the last one stays the last.
fn odd_order<'a>(changes: &'a [Change], random: &mut Random) -> Vec<&'a Change> {
    let mut paths: Vec<Path> = changes.iter().map(Change::path).collect();
    let mut of_path: BTreeMap<Path, VecDeque<&Change>> = BTreeMap::new();
    for change in changes {
        of_path.entry(change.path()).or_default().push_back(change);
    }
    random.shuffle(&mut paths);
    paths.iter().filter_map(|path| of_path.get_mut(path)?.pop_front()).collect()
}

struct Writer<'a> {
    dialect: Dialect<'a>,
    out: Vec<u8>,
}

/// What a header says, before it is known how.
struct Entry<'a> {
    kind: u8,
    path: Path,
    link: &'a [u8],
    device: (u32, u32),
    meta: &'a Meta,
    content: &'a [Run],
}

impl Writer<'_> {
    /// Never for plain archives.
    fn once_in(&mut self, times: usize) -> bool {
        match &mut self.dialect {
            Dialect::Plain => false,
            Dialect::Odd(random) => random.once_in(times),
        }
    }

    fn change(&mut self, change: &Change) {
        let marker = Meta { mode: 0, uid: 0, gid: 0, seconds: 0, nanoseconds: 0, xattrs: BTreeMap::new() };
        let mut entry =
            Entry { kind: b'0', path: change.path(), link: b"", device: (0, 0), meta: &marker, content: &[] };
        let mut link_to = Path::new();
        match change {
            Change::Whiteout(_) | Change::Opaque(_) => {}
            Change::Link { target, meta, .. } => {
                let prefix: &[u8] = if self.once_in(3) {
                    b"./"
                } else if self.once_in(3) {
                    b"/"
                } else {
                    b""
                };
                link_to = [prefix, target].concat();
                (entry.kind, entry.meta) = (b'1', meta);
            }
            Change::Object { meta, kind, alias, .. } => {
                entry.meta = meta;
                if let (Some(alias), Dialect::Odd(_)) = (alias, &self.dialect) {
                    entry.path.clone_from(alias);
                }
                match kind {
                    Kind::Directory => entry.kind = b'5',
                    Kind::File(runs) => entry.content = runs,
                    Kind::Symlink(target) => {
                        entry.kind = b'2';
                        link_to.clone_from(target);
                    }
                    Kind::CharDevice(major, minor) => (entry.kind, entry.device) = (b'3', (*major, *minor)),
                    Kind::BlockDevice(major, minor) => (entry.kind, entry.device) = (b'4', (*major, *minor)),
                    Kind::Fifo => entry.kind = b'6',
                }
            }
        }
        entry.link = &link_to;
        let prefix: &[u8] = if self.once_in(3) || entry.path.is_empty() {
            b"./"
        } else if self.once_in(9) {
            b"//"
        } else {
            b""
        };
        let suffix: &[u8] = if entry.kind == b'5' && !self.once_in(4) { b"/" } else { b"" };
        entry.path = [prefix, &entry.path, suffix].concat();
        self.entry(&entry);
    }

    fn entry(&mut self, entry: &Entry<'_>) {
        let has_holes = entry.content.iter().any(|run| run.seed.is_none());
        let format = if has_holes && !self.once_in(5) { self.some_sparse() } else { None };
        let is_gnu = self.once_in(4) || matches!(format, Some(Sparse::OldGnu));
        let mut header = Header::new(entry.kind, is_gnu);
        let mut records = Vec::new();
        self.names(entry, &mut header, &mut records);
        self.numbers(entry, &mut header, &mut records);
        for (name, value) in &entry.meta.xattrs {
            if self.once_in(3) {
                records.extend(pax_record(&format!("LIBARCHIVE.xattr.{}", percent(name)), base64(value).as_bytes()));
            } else {
                records.extend(pax_record(&format!("SCHILY.xattr.{name}"), value));
            }
        }
        let stored = match format {
            None => sparse::Stored {
                data: entry.content.iter().flat_map(|run| run.bytes()).collect(),
                ..Default::default()
            },
            Some(format) => sparse::store(format, entry.content, &entry.path),
        };
        records.extend(stored.records);
        for (at, bytes) in &stored.header {
            header.set(*at, bytes);
        }
        let len = stored.data.len();
        if self.once_in(6) {
            // The header's own size is then nobody's business.
            records.extend(pax_record("size", len.to_string().as_bytes()));
            header.octal(124..136, 7);
        } else {
            header.octal(124..136, len as u64);
        }
        if !records.is_empty() {
            self.extension(b'x', &records);
        }
        self.out.extend_from_slice(&header.finish());
        self.out.extend_from_slice(&stored.extra_blocks);
        self.append_padded(&stored.data);
    }

    fn some_sparse(&mut self) -> Option<Sparse> {
        match &mut self.dialect {
            Dialect::Plain => None,
            Dialect::Odd(random) => Some(*random.choose(&[Sparse::OldGnu, Sparse::V0_0, Sparse::V0_1, Sparse::V1_0])),
        }
    }

    fn names(&mut self, entry: &Entry<'_>, header: &mut Header, records: &mut Vec<u8>) {
        let odd = self.once_in(6);
        let split = entry.path.iter().rposition(|byte| *byte == b'/').filter(|slash| {
            let rest = entry.path.len() - slash - 1;
            !header.is_gnu && *slash > 0 && *slash <= 155 && (1..=100).contains(&rest)
        });
        if entry.path.len() <= 100 && !odd {
            header.set(0, &entry.path);
        } else if let Some(slash) = split
            && self.once_in(2)
        {
            header.set(0, &entry.path[slash + 1..]);
            header.set(345, &entry.path[..slash]);
        } else if self.once_in(2) {
            self.extension(b'L', &[&entry.path[..], b"\0"].concat());
            header.set(0, &entry.path[..entry.path.len().min(100)]);
        } else {
            records.extend(pax_record("path", &entry.path));
            header.set(0, b"elsewhere");
        }
        if entry.link.len() <= 100 && !odd {
            header.set(157, entry.link);
        } else if self.once_in(2) {
            self.extension(b'K', &[entry.link, b"\0"].concat());
        } else if !entry.link.is_empty() {
            records.extend(pax_record("linkpath", entry.link));
        }
    }

    fn numbers(&mut self, entry: &Entry<'_>, header: &mut Header, records: &mut Vec<u8>) {
        let meta = entry.meta;
        header.octal(100..108, u64::from(meta.mode));
        for (key, field, id) in [("uid", 108..116, meta.uid), ("gid", 116..124, meta.gid)] {
            if id <= 0o777_7777 && !self.once_in(8) {
                header.octal(field, u64::from(id));
            } else if self.once_in(2) {
                header.base256(field, i64::from(id));
            } else {
                records.extend(pax_record(key, id.to_string().as_bytes()));
            }
        }
        let fits = (0..1 << 33).contains(&meta.seconds);
        if meta.nanoseconds == 0 && fits && !self.once_in(8) {
            header.octal(136..148, meta.seconds.unsigned_abs());
        } else if meta.nanoseconds == 0 && self.once_in(2) {
            header.base256(136..148, meta.seconds);
        } else {
            records.extend(pax_record("mtime", decimal(meta.seconds, meta.nanoseconds).as_bytes()));
        }
        if matches!(entry.kind, b'3' | b'4') {
            header.octal(329..337, u64::from(entry.device.0));
            header.octal(337..345, u64::from(entry.device.1));
        }
    }

    fn extension(&mut self, kind: u8, data: &[u8]) {
        let mut header = Header::new(kind, matches!(kind, b'L' | b'K'));
        header.set(0, b"extension");
        header.octal(124..136, data.len() as u64);
        self.out.extend_from_slice(&header.finish());
        self.append_padded(data);
    }

    fn append_padded(&mut self, data: &[u8]) {
        self.out.extend_from_slice(data);
        self.out.resize(self.out.len().next_multiple_of(512), 0);
    }
}

struct Header {
    block: [u8; 512],
    is_gnu: bool,
}

impl Header {
    fn new(kind: u8, is_gnu: bool) -> Self {
        let mut header = Self { block: [0; 512], is_gnu };
        for field in [100..108, 108..116, 116..124, 124..136, 136..148] {
            header.octal(field, 0);
        }
        header.set(156, &[kind]);
        header.set(257, if is_gnu { b"ustar  \0" } else { b"ustar\x0000" });
        header
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.block[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn octal(&mut self, field: std::ops::Range<usize>, value: u64) {
        let digits = field.len() - 1;
        self.set(field.start, format!("{value:0digits$o}\0").as_bytes());
    }

    /// GNU's big numbers: two's complement with a mark.
    fn base256(&mut self, field: std::ops::Range<usize>, value: i64) {
        let mut bytes = vec![if value < 0 { 0xff } else { 0 }; field.len() - 8];
        bytes.extend(value.to_be_bytes());
        let bytes = &mut bytes[..field.len()];
        if bytes.len() == 8 || value >= 0 {
            bytes[0] |= 0x80;
        }
        self.set(field.start, bytes);
    }

    fn finish(mut self) -> [u8; 512] {
        self.set(148, b"        ");
        let sum: u32 = self.block.iter().map(|byte| u32::from(*byte)).sum();
        self.set(148, format!("{sum:06o}\0 ").as_bytes());
        self.block
    }
}

/// `LENGTH KEY=VALUE\n`; the length counts its own digits.
pub(super) fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let mut len = rest.len() + 1;
    while len.to_string().len() + rest.len() != len {
        len += 1;
    }
    [len.to_string().as_bytes(), &rest].concat()
}

/// A time as PAX says it: the fraction of a negative number counts backwards.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        _ => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
    }
}

fn percent(name: &str) -> String {
    name.bytes()
        .map(|byte| {
            if byte == b'.' || byte.is_ascii_alphanumeric() {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// As libarchive writes it: without padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..=group.len() {
            text.push(char::from(DIGITS[bits >> (18 - 6 * digit) & 63]));
        }
    }
    text
}
