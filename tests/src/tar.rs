//! Writing tar archives byte for byte, good ones and bad ones (POSIX.1-2017 pax, and GNU long names).

use std::collections::BTreeMap;

/// Bytes of a block.
const BLOCK: usize = 512;

/// One entry of an archive.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As it stands in the archive: directories need no slash at the end.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since 1970; the nanoseconds count forwards.
    pub mtime: (i64, u32),
    /// By full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file with these contents.
    File(Vec<u8>),
    /// Another name of the file with this path.
    HardLink(Vec<u8>),
    /// A symbolic link to this.
    Symlink(Vec<u8>),
    /// Major and minor.
    CharDevice(u32, u32),
    /// Major and minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

impl Entry {
    /// An entry of root with mode 0644 (0755 for a directory, 0777 for a symbolic link) and a fixed time.
    pub fn new(path: impl Into<Vec<u8>>, kind: Kind) -> Self {
        let mode = match kind {
            Kind::Directory => 0o755,
            Kind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        let mtime = (1_700_000_000, 0);
        Self { path: path.into(), kind, mode, uid: 0, gid: 0, mtime, xattrs: BTreeMap::new() }
    }

    /// A regular file.
    pub fn file(path: &str, contents: impl Into<Vec<u8>>) -> Self {
        Self::new(path, Kind::File(contents.into()))
    }

    /// A directory.
    pub fn directory(path: &str) -> Self {
        Self::new(path, Kind::Directory)
    }

    /// A hard link.
    pub fn hard_link(path: &str, target: &str) -> Self {
        Self::new(path, Kind::HardLink(target.into()))
    }

    /// A symbolic link.
    pub fn symlink(path: &str, target: &str) -> Self {
        Self::new(path, Kind::Symlink(target.into()))
    }

    /// The same with another mode.
    #[must_use]
    pub fn mode(self, mode: u16) -> Self {
        Self { mode, ..self }
    }

    /// The same with another owner and group.
    #[must_use]
    pub fn owner(self, uid: u32, gid: u32) -> Self {
        Self { uid, gid, ..self }
    }

    /// The same with another time.
    #[must_use]
    pub fn mtime(self, seconds: i64, nanoseconds: u32) -> Self {
        Self { mtime: (seconds, nanoseconds), ..self }
    }

    /// The same with an extended attribute more.
    #[must_use]
    pub fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.insert(name.into(), value.into());
        self
    }
}

/// How names are written that do not fit into a header of 100 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LongNames {
    /// In a pax header, as everything else that a plain header cannot say.
    Pax,
    /// In entries of types `L` and `K` before the entry; the rest still in a pax header.
    Gnu,
}

/// An archive of `entries`, ended by two blocks of zeros.
pub fn archive(entries: &[Entry], long_names: LongNames) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        append(&mut out, entry, long_names);
    }
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

fn append(out: &mut Vec<u8>, entry: &Entry, long_names: LongNames) {
    let link: &[u8] = match &entry.kind {
        Kind::HardLink(target) | Kind::Symlink(target) => target,
        _ => b"",
    };
    let mut records = pax_records(entry);
    for (name, gnu_type, pax_name) in [(entry.path.as_slice(), b'L', "path"), (link, b'K', "linkpath")] {
        match long_names {
            _ if name.len() <= 100 => (),
            LongNames::Pax => records.extend(pax_record(pax_name, name)),
            LongNames::Gnu => {
                let with_end = [name, b"\0"].concat();
                out.extend(Header::new(b"././@LongLink", gnu_type).size(with_end.len()).bytes());
                append_padded(out, &with_end);
            }
        }
    }
    if !records.is_empty() {
        out.extend(Header::new(b"pax", b'x').size(records.len()).bytes());
        append_padded(out, &records);
    }
    let contents: &[u8] = if let Kind::File(contents) = &entry.kind { contents } else { b"" };
    let (kind, device) = match entry.kind {
        Kind::File(_) => (b'0', None),
        Kind::HardLink(_) => (b'1', None),
        Kind::Symlink(_) => (b'2', None),
        Kind::CharDevice(major, minor) => (b'3', Some((major, minor))),
        Kind::BlockDevice(major, minor) => (b'4', Some((major, minor))),
        Kind::Directory => (b'5', None),
        Kind::Fifo => (b'6', None),
    };
    let mut header = Header::new(&entry.path, kind).size(contents.len());
    header.octal(100..108, u64::from(entry.mode));
    header.octal(108..116, u64::from(entry.uid));
    header.octal(116..124, u64::from(entry.gid));
    header.octal(136..148, u64::try_from(entry.mtime.0).unwrap_or(0));
    header.text(157..257, link);
    if let Some((major, minor)) = device {
        header.octal(329..337, u64::from(major));
        header.octal(337..345, u64::from(minor));
    }
    out.extend(header.bytes());
    append_padded(out, contents);
}

/// What a plain header cannot say, but for long names.
fn pax_records(entry: &Entry) -> Vec<u8> {
    let mut records = Vec::new();
    let (seconds, nanoseconds) = entry.mtime;
    if nanoseconds > 0 || seconds < 0 {
        // The fraction of a negative number counts backwards.
        let time = if seconds < 0 && nanoseconds > 0 {
            format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
        } else {
            format!("{seconds}.{nanoseconds:09}")
        };
        records.extend(pax_record("mtime", time.as_bytes()));
    }
    for (name, id) in [("uid", entry.uid), ("gid", entry.gid)] {
        if id > 0o777_7777 {
            records.extend(pax_record(name, id.to_string().as_bytes()));
        }
    }
    for (name, value) in &entry.xattrs {
        records.extend(pax_record(&format!("SCHILY.xattr.{}", String::from_utf8_lossy(name)), value));
    }
    records
}

/// `LENGTH NAME=VALUE\n`, where the length counts its own digits.
fn pax_record(name: &str, value: &[u8]) -> Vec<u8> {
    let rest_len = 1 + name.len() + 1 + value.len() + 1;
    let mut len = rest_len;
    while len != rest_len + len.to_string().len() {
        len = rest_len + len.to_string().len();
    }
    [format!("{len} {name}=").as_bytes(), value, b"\n"].concat()
}

fn append_padded(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

struct Header([u8; BLOCK]);

impl Header {
    fn new(path: &[u8], kind: u8) -> Self {
        let mut header = Self([0; BLOCK]);
        header.text(0..100, path);
        header.octal(100..108, 0o644);
        for field in [108..116, 116..124, 124..136, 136..148] {
            header.octal(field, 0);
        }
        header.0[156] = kind;
        header.text(257..265, b"ustar\x0000");
        header
    }

    fn size(mut self, len: usize) -> Self {
        self.octal(124..136, len as u64);
        self
    }

    /// As much of it as fits.
    fn text(&mut self, field: std::ops::Range<usize>, text: &[u8]) {
        let len = text.len().min(field.len());
        self.0[field][..len].copy_from_slice(&text[..len]);
    }

    /// The lowest digits that fit; a pax header says the whole number.
    fn octal(&mut self, field: std::ops::Range<usize>, number: u64) {
        let digits = field.len() - 1;
        let text = format!("{number:0digits$o}");
        self.text(field, &text.as_bytes()[text.len() - digits..]);
    }

    fn bytes(mut self) -> [u8; BLOCK] {
        self.text(148..156, b"        ");
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        self.text(148..156, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_records_count_themselves() {
        assert_eq!(pax_record("a", b"b"), b"6 a=b\n");
        assert_eq!(pax_record("path", &[b'x'; 90]).len(), 99);
        assert!(pax_record("path", &[b'x'; 92]).starts_with(b"102 path="));
        let early = Entry::file("a", "").mtime(-2, 250_000_000);
        assert_eq!(pax_records(&early), b"22 mtime=-1.750000000\n");
    }

    #[test]
    fn gnu_tar_lists_it() {
        let long = "d/".repeat(80) + "name";
        let entries = [
            Entry::file("a b", "contents").mode(0o4755).owner(5, 3_000_000).mtime(1_700_000_000, 5),
            Entry::hard_link("linked", "a b"),
            Entry::symlink("s", &long),
            Entry::file(&long, "").mtime(2, 500_000_000),
            Entry::new("null", Kind::CharDevice(1, 3)),
        ];
        for long_names in [LongNames::Pax, LongNames::Gnu] {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("a.tar");
            std::fs::write(&file, archive(&entries, long_names)).unwrap();
            let listed = std::process::Command::new("tar")
                .args(["--numeric-owner", "--utc", "--full-time", "-tvf"])
                .arg(&file)
                .env("LC_ALL", "C")
                .output()
                .unwrap();
            assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
            let text = String::from_utf8(listed.stdout).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert!(lines[0].starts_with("-rwsr-xr-x 5/3000000"), "{text}");
            assert!(lines[0].ends_with("8 2023-11-14 22:13:20.000000005 a b"), "{text}");
            assert!(lines[1].ends_with("linked link to a b"), "{text}");
            assert!(lines[2].ends_with(&format!("s -> {long}")), "{text}");
            assert!(lines[3].contains(" 1970-01-01 00:00:02.5 ") && lines[3].ends_with(&long), "{text}");
            assert!(lines[4].contains(" 1,3 "), "{text}");
        }
    }
}
