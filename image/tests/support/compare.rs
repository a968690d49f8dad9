//! Compares a mounted file system with a tree, object by object.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ublkimg_image::{DeviceNumber, FileData, Kind, NodeId, Tree};

/// Panics with a list of all differences. Returns the number of paths compared.
pub(crate) fn compare(tree: &Tree, mount: &Path, content: &dyn Fn(&FileData) -> Vec<u8>) -> usize {
    let nlinks = link_counts(tree);
    let mut inodes = HashMap::new();
    let mut differences = Vec::new();
    let mut count = 0;
    let mut todo = vec![(NodeId::ROOT, mount.to_owned())];
    while let Some((id, path)) = todo.pop() {
        count += 1;
        let found = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut check = |what: &str, expected: String, found: String| {
            if expected != found {
                differences.push(format!("{}: {what} is {found:.200}, expected {expected:.200}", path.display()));
            }
        };
        let node = tree.node(id);
        let meta = &node.meta;
        check("mode", format!("{:o}", type_bits(&node.kind) | u32::from(meta.mode)), format!("{:o}", found.mode()));
        check("owner", format!("{}:{}", meta.uid, meta.gid), format!("{}:{}", found.uid(), found.gid()));
        let mtime = (found.mtime(), found.mtime_nsec());
        check("mtime", format!("{:?}", (meta.mtime.seconds, meta.mtime.nanoseconds)), format!("{mtime:?}"));
        check("nlink", nlinks[&id].to_string(), found.nlink().to_string());
        check("inode", inodes.entry(id).or_insert_with(|| found.ino()).to_string(), found.ino().to_string());
        check("xattrs", format!("{:?}", meta.xattrs), format!("{:?}", read_xattrs(&path)));
        match &node.kind {
            Kind::Directory(entries) => {
                let mut names: Vec<_> =
                    fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name().into_vec()).collect();
                names.sort();
                let expected: Vec<_> = entries.keys().cloned().collect();
                check("list of names", format!("{expected:?}"), format!("{names:?}"));
                todo.extend(entries.iter().map(|(name, child)| (*child, path.join(OsStr::from_bytes(name)))));
            }
            Kind::File(file) => {
                check("size", file.size_bytes.to_string(), found.size().to_string());
                let same = fs::read(&path).is_ok_and(|bytes| bytes == content(file));
                check("equal content", true.to_string(), same.to_string());
            }
            Kind::Symlink(target) => {
                let found = fs::read_link(&path).map(PathBuf::into_os_string).unwrap_or_default();
                check("target", format!("{target:?}"), format!("{:?}", found.as_bytes()));
            }
            Kind::CharDevice(number) | Kind::BlockDevice(number) => {
                check("device", format!("{number:?}"), format!("{:?}", device_number(found.rdev())));
            }
            Kind::Fifo | Kind::Socket => {}
        }
    }
    let numbers: HashSet<_> = inodes.values().collect();
    if numbers.len() != inodes.len() {
        differences.push("different nodes share an inode number".into());
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
    count
}

fn link_counts(tree: &Tree) -> HashMap<NodeId, u64> {
    let mut counts = HashMap::from([(NodeId::ROOT, 2)]);
    let mut todo = vec![NodeId::ROOT];
    while let Some(directory) = todo.pop() {
        for child in tree.entries(directory).unwrap().values() {
            if tree.entries(*child).is_some() {
                *counts.entry(directory).or_default() += 1;
                counts.insert(*child, 2);
                todo.push(*child);
            } else {
                *counts.entry(*child).or_default() += 1;
            }
        }
    }
    counts
}

fn type_bits(kind: &Kind) -> u32 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice(_) => 0o020_000,
        Kind::Directory(_) => 0o040_000,
        Kind::BlockDevice(_) => 0o060_000,
        Kind::File(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}

/// As `stat` gives it (glibc's `makedev`), for numbers of at most 12 and 20 bits.
fn device_number(rdev: u64) -> DeviceNumber {
    let bits = |shift: u32, mask: u64| u32::try_from((rdev >> shift) & mask).unwrap();
    DeviceNumber { major: bits(8, 0xFFF), minor: bits(0, 0xFF) | bits(12, 0xF_FF00) }
}

fn read_xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let names = xattr::list(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let value = |name: &OsStr| xattr::get(path, name).ok().flatten().unwrap_or_else(|| b"unreadable".to_vec());
    names.map(|name| (name.as_bytes().to_vec(), value(&name))).collect()
}
