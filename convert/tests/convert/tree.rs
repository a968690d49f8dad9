//! Comparing two directory trees, object by object.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use sha2::Digest as _;

/// Everything that can be seen of an object.
#[derive(Debug, PartialEq, Eq)]
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

/// Compares type, mode, owner, mtime with nanoseconds, links, device number, xattrs, link target, size and content.
pub(crate) fn assert_same(expected: &Path, actual: &Path) {
    let (mut expected, actual) = (read(expected), read(actual));
    let subdirectories = |path: &[u8]| {
        let is_inside = |other: &Vec<u8>| !other.is_empty() && parent(other) == path;
        2 + expected.iter().filter(|(other, object)| object.kind == "directory" && is_inside(other)).count() as u64
    };
    let links: Vec<u64> = expected.keys().map(|path| subdirectories(path)).collect();
    for (object, links) in expected.values_mut().zip(links) {
        if object.kind == "directory" {
            object.links = links;
        }
    }
    for (path, object) in &expected {
        let shown = path.escape_ascii();
        match actual.get(path) {
            Some(other) => assert_eq!(other, object, "\"{shown}\" (left: image, right: reference)"),
            None => panic!("\"{shown}\" is missing"),
        }
    }
    for path in actual.keys() {
        assert!(expected.contains_key(path), "\"{}\" should not be there", path.escape_ascii());
    }
    assert!(expected.len() > 100, "the reference tree is suspiciously small");
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
        content: if is_file { sha2::Sha256::digest(fs::read(path).unwrap()).to_vec() } else { Vec::new() },
    }
}
