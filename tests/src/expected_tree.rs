//! The tree that layers become, by the plainest rules that are right, and on disk to compare with.
//!
//! A map from path to entry; a file and its links share one number. Slow and simple on purpose: it is what the real merge
//! is compared with. It knows only what [`crate::sample_image`] uses: parents are never symbolic links.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid};

use crate::tar::{Entry, Kind};

/// What the mtime of a directory is that no archive mentions: the converter's rule.
const IMPLIED_MTIME: (i64, u32) = (0, 0);

/// A merged tree.
#[derive(Default)]
pub struct ExpectedTree {
    /// By path without slashes at its ends; the root is the empty path.
    nodes: BTreeMap<Vec<u8>, (usize, Entry)>,
    next_file: usize,
}

impl ExpectedTree {
    /// Puts a layer on top.
    pub fn apply(&mut self, layer: &[Entry]) {
        // Whiteouts speak of the layers below only, wherever they stand in the archive.
        for entry in layer {
            let path = clean(&entry.path);
            let (parent, name) = split(&path);
            if name == b".wh..wh..opq" {
                self.remove_below(parent);
            } else if let Some(name) = name.strip_prefix(b".wh.") {
                let hidden = join(parent, name);
                self.remove_below(&hidden);
                self.nodes.remove(&hidden);
            }
        }
        for entry in layer.iter().filter(|entry| !split(&clean(&entry.path)).1.starts_with(b".wh.")) {
            let path = clean(&entry.path);
            self.imply_parents(&path);
            let node = match &entry.kind {
                Kind::HardLink(target) => self.nodes[&clean(target)].clone(),
                _ => {
                    self.next_file += 1;
                    (self.next_file, entry.clone())
                }
            };
            if entry.kind != Kind::Directory {
                self.remove_below(&path);
            }
            self.nodes.insert(path, node);
        }
    }

    fn imply_parents(&mut self, path: &[u8]) {
        let mut path = path;
        while !path.is_empty() {
            path = split(path).0;
            let is_directory = self.nodes.get(path).is_some_and(|(_, entry)| entry.kind == Kind::Directory);
            if !is_directory {
                let (seconds, nanoseconds) = IMPLIED_MTIME;
                let implied = Entry::new(path, Kind::Directory).mtime(seconds, nanoseconds);
                self.nodes.insert(path.to_vec(), (0, implied));
            }
        }
    }

    fn remove_below(&mut self, path: &[u8]) {
        let mut prefix = path.to_vec();
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        self.nodes.retain(|other, _| !(other.starts_with(&prefix) && other.as_slice() != path));
    }

    /// Writes it to the existing directory `root`; needs root.
    ///
    /// # Errors
    ///
    /// Not root, or the file system cannot hold it.
    pub fn write(&self, root: &Path) -> io::Result<()> {
        let on_disk = |path: &[u8]| if path.is_empty() { root.to_owned() } else { root.join(OsStr::from_bytes(path)) };
        let mut first_names: HashMap<usize, PathBuf> = HashMap::new();
        for (path, (file, entry)) in &self.nodes {
            let path = on_disk(path);
            if entry.kind != Kind::Directory {
                if let Some(first) = first_names.get(file) {
                    std::fs::hard_link(first, &path)?;
                    continue;
                }
                first_names.insert(*file, path.clone());
            }
            create(&path, entry)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        }
        // Children change the time of their directory, so times come last, and from the bottom.
        for (path, (_, entry)) in self.nodes.iter().rev() {
            set_mtime(&on_disk(path), entry)?;
        }
        Ok(())
    }
}

/// Without `.`, and slashes only between names.
fn clean(path: &[u8]) -> Vec<u8> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.collect::<Vec<_>>().join(b"/".as_slice())
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

fn create(path: &Path, entry: &Entry) -> io::Result<()> {
    let node =
        |kind, major, minor| rustix::fs::mknodat(CWD, path, kind, Mode::empty(), rustix::fs::makedev(major, minor));
    match &entry.kind {
        Kind::Directory if path.is_dir() => (),
        Kind::Directory => std::fs::create_dir(path)?,
        Kind::File(contents) => File::create(path)?.write_all(contents)?,
        Kind::Symlink(target) => std::os::unix::fs::symlink(OsStr::from_bytes(target), path)?,
        Kind::CharDevice(major, minor) => node(FileType::CharacterDevice, *major, *minor)?,
        Kind::BlockDevice(major, minor) => node(FileType::BlockDevice, *major, *minor)?,
        Kind::Fifo => node(FileType::Fifo, 0, 0)?,
        Kind::HardLink(_) => return Err(io::Error::other("a link is never kept as one")),
    }
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    // After the owner, whose change clears the setuid bit and capabilities.
    if !matches!(entry.kind, Kind::Symlink(_)) {
        rustix::fs::chmod(path, Mode::from_raw_mode(u32::from(entry.mode)))?;
    }
    for (name, value) in &entry.xattrs {
        xattr::set(path, OsStr::from_bytes(name), value)?;
    }
    Ok(())
}

fn set_mtime(path: &Path, entry: &Entry) -> io::Result<()> {
    let time = Timespec { tv_sec: entry.mtime.0, tv_nsec: entry.mtime.1.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(layers: &[&[Entry]]) -> Vec<(String, Vec<u8>)> {
        let mut tree = ExpectedTree::default();
        layers.iter().for_each(|layer| tree.apply(layer));
        let contents = |entry: &Entry| if let Kind::File(bytes) = &entry.kind { bytes.clone() } else { Vec::new() };
        let nodes = tree.nodes.iter().filter(|(path, _)| !path.is_empty());
        nodes.map(|(path, (_, entry))| (String::from_utf8_lossy(path).into_owned(), contents(entry))).collect()
    }

    #[test]
    fn upper_layers_win() {
        let lower = [Entry::file("./a/x", "1"), Entry::file("a/y", "2"), Entry::file("b", "3")];
        let upper = [Entry::file("a/z", "4"), Entry::file("a/.wh..wh..opq", ""), Entry::file(".wh.b", "")];
        let expected = [("a".to_owned(), vec![]), ("a/z".to_owned(), b"4".to_vec())];
        assert_eq!(merged(&[&lower, &upper]), expected);
        let file = [Entry::file("a", "5")];
        assert_eq!(merged(&[&lower, &file]), [("a".to_owned(), b"5".to_vec()), ("b".to_owned(), b"3".to_vec())]);
    }
}
