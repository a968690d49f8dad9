//! Comparing two directory trees, object by object.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use sha2::Digest as _;

/// Everything that can be seen of an object.
struct Object {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    /// Of a directory: two and its subdirectories, which not every file system counts.
    links: u64,
    /// The first path, in order, of the same object.
    same_as: Vec<u8>,
    device: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    target: Vec<u8>,
    size: u64,
    content: Vec<u8>,
}

/// Panics if there are [`differences`].
pub(crate) fn assert_same(expected: &Path, actual: &Path) {
    let differences = differences(expected, actual);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert!(read(expected).len() > 100, "the reference tree is suspiciously small");
}

/// Compares type, mode, owner, mtime with nanoseconds, links, device number, xattrs, link target, size and content.
pub(crate) fn differences(expected: &Path, actual: &Path) -> Vec<String> {
    let (mut expected, actual) = (read(expected), read(actual));
    let mut subdirectories: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for (path, _) in expected.iter().filter(|(path, object)| object.kind == "directory" && !path.is_empty()) {
        *subdirectories.entry(parent(path).to_vec()).or_default() += 1;
    }
    for (path, object) in expected.iter_mut().filter(|(_, object)| object.kind == "directory") {
        object.links = 2 + subdirectories.get(path).copied().unwrap_or_default();
    }
    let mut differences = Vec::new();
    for (path, object) in &expected {
        match actual.get(path) {
            Some(other) => differences.extend(object.compare(other).map(|text| format!("{} {text}", shown(path)))),
            None => differences.push(format!("{} is missing", shown(path))),
        }
    }
    let surplus = actual.keys().filter(|path| !expected.contains_key(*path));
    differences.extend(surplus.map(|path| format!("{} is too many", shown(path))));
    differences
}

impl Object {
    /// What `other` has differently.
    fn compare(&self, other: &Self) -> impl Iterator<Item = String> {
        self.fields()
            .into_iter()
            .zip(other.fields())
            .filter(|(expected, found)| expected != found)
            .map(|((name, expected), (_, found))| format!("has {name} {found}, not {expected}"))
    }

    fn fields(&self) -> [(&'static str, String); 11] {
        let xattrs = self.xattrs.iter().map(|(name, value)| format!("{}={}", shown(name), shown(value)));
        [
            ("type", self.kind.to_owned()),
            ("mode", format!("{:o}", self.mode)),
            ("owner", format!("{:?}", self.owner)),
            ("mtime", format!("{:?}", self.mtime)),
            ("links", self.links.to_string()),
            ("first name", shown(&self.same_as)),
            ("device", self.device.to_string()),
            ("xattrs", xattrs.collect::<Vec<_>>().join(" ")),
            ("target", shown(&self.target)),
            ("size", self.size.to_string()),
            ("content", shown(&self.content)),
        ]
    }
}

fn shown(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |slash| &path[..slash])
}

fn read(root: &Path) -> BTreeMap<Vec<u8>, Object> {
    let mut objects = BTreeMap::new();
    let mut paths = vec![Vec::new()];
    let mut first_paths: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            paths.push(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec());
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                todo.push(path);
            }
        }
    }
    paths.sort();
    for inside in paths {
        let path = root.join(std::ffi::OsStr::from_bytes(&inside));
        let metadata = fs::symlink_metadata(&path).unwrap();
        let same_as = first_paths.entry(metadata.ino()).or_insert_with(|| inside.clone()).clone();
        objects.insert(inside, object(&path, &metadata, same_as));
    }
    objects
}

fn object(path: &Path, metadata: &fs::Metadata, same_as: Vec<u8>) -> Object {
    let file_type = metadata.file_type();
    let kind = if file_type.is_dir() {
        "directory"
    } else if file_type.is_file() {
        "file"
    } else if file_type.is_symlink() {
        "symlink"
    } else if file_type.is_char_device() {
        "character device"
    } else if file_type.is_block_device() {
        "block device"
    } else if file_type.is_fifo() {
        "fifo"
    } else {
        "socket"
    };
    let xattrs = xattr::list(path).unwrap();
    let xattrs = xattrs.map(|name| (name.as_bytes().to_vec(), xattr::get(path, &name).unwrap().unwrap()));
    let (is_file, is_dir, is_symlink) = (file_type.is_file(), file_type.is_dir(), file_type.is_symlink());
    Object {
        kind,
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        links: metadata.nlink(),
        same_as,
        device: metadata.rdev(),
        xattrs: xattrs.collect(),
        target: if is_symlink { fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec() } else { Vec::new() },
        size: if is_dir { 0 } else { metadata.size() },
        content: if is_file { digest(path) } else { Vec::new() },
    }
}

fn digest(path: &Path) -> Vec<u8> {
    let (mut file, mut hasher) = (fs::File::open(path).unwrap(), sha2::Sha256::new());
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hasher.finalize().to_vec(),
            count => hasher.update(&buffer[..count]),
        }
    }
}
