//! Comparing two file trees in all that an image must keep.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Differences listed before the rest is only counted.
const DIFFERENCES: usize = 100;

/// Bytes of a file compared at a time.
const COMPARED_BYTES: usize = 1024 * 1024;

/// The differences between two trees, one sentence each: names, type, mode, owner, group, mtime with nanoseconds, links,
/// device number, extended attributes, link target, contents, and which names are links to one file. Empty when there is
/// none. At most 100 of them and a count.
///
/// # Errors
///
/// A file cannot be read.
pub fn compare_trees(expected: &Path, found: &Path) -> io::Result<Vec<String>> {
    let (left, right) = (names(expected)?, names(found)?);
    let mut differences: Vec<String> = Vec::new();
    differences.extend(left.difference(&right).map(|path| format!("/{}: is missing", path.display())));
    differences.extend(right.difference(&left).map(|path| format!("/{}: is too many", path.display())));
    let mut links = [HashMap::new(), HashMap::new()];
    for path in left.intersection(&right) {
        let (a, b) = (expected.join(path), found.join(path));
        let (meta_a, meta_b) = (a.symlink_metadata()?, b.symlink_metadata()?);
        let mut of_path = compare_metadata(&meta_a, &meta_b);
        of_path.extend(compare_contents(&a, &b, &meta_a, &meta_b)?);
        let first_names = [(&meta_a, 0), (&meta_b, 1)].map(|(meta, side): (&Metadata, usize)| {
            links[side].entry(meta.ino()).or_insert_with(|| path.clone()).clone()
        });
        if first_names[0] != first_names[1] && !meta_a.is_dir() {
            of_path.push(format!("links {} and {}", first_names[0].display(), first_names[1].display()));
        }
        differences.extend(of_path.into_iter().map(|difference| format!("/{}: {difference}", path.display())));
    }
    if differences.len() > DIFFERENCES {
        let more = differences.len() - DIFFERENCES;
        differences.truncate(DIFFERENCES);
        differences.push(format!("and {more} more"));
    }
    Ok(differences)
}

/// Every path below `root`, and the empty one for itself.
fn names(root: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut names = BTreeSet::from([PathBuf::new()]);
    let mut open = vec![PathBuf::new()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(root.join(&dir))? {
            let entry = entry?;
            let path = dir.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                open.push(path.clone());
            }
            names.insert(path);
        }
    }
    Ok(names)
}

fn compare_metadata(expected: &Metadata, found: &Metadata) -> Vec<String> {
    let directory = expected.is_dir();
    let device = expected.file_type().is_char_device() || expected.file_type().is_block_device();
    let fields = [
        ("mode (octal)", format!("{:o}", expected.mode()), format!("{:o}", found.mode())),
        ("uid", expected.uid().to_string(), found.uid().to_string()),
        ("gid", expected.gid().to_string(), found.gid().to_string()),
        ("mtime", time(expected), time(found)),
        // Some file systems do not count the entries of a directory.
        ("links", links(expected, directory), links(found, directory)),
        // The size of a directory is the file system's affair.
        ("size", size(expected, directory), size(found, directory)),
        ("device", number(expected, device), number(found, device)),
    ];
    let different = fields.into_iter().filter(|(_, expected, found)| expected != found);
    different.map(|(name, expected, found)| format!("{name} is {found}, not {expected}")).collect()
}

fn time(meta: &Metadata) -> String {
    format!("{}.{:09}", meta.mtime(), meta.mtime_nsec())
}

fn links(meta: &Metadata, directory: bool) -> String {
    if directory && meta.nlink() == 1 { "uncounted".into() } else { meta.nlink().to_string() }
}

fn size(meta: &Metadata, directory: bool) -> String {
    if directory { String::new() } else { meta.size().to_string() }
}

fn number(meta: &Metadata, device: bool) -> String {
    if device { format!("{:#x}", meta.rdev()) } else { String::new() }
}

fn compare_contents(a: &Path, b: &Path, meta_a: &Metadata, meta_b: &Metadata) -> io::Result<Vec<String>> {
    let mut differences = Vec::new();
    let (xattrs_a, xattrs_b) = (xattrs(a)?, xattrs(b)?);
    let names: BTreeSet<&OsString> = xattrs_a.keys().chain(xattrs_b.keys()).collect();
    for name in names.into_iter().filter(|name| xattrs_a.get(*name) != xattrs_b.get(*name)) {
        let (expected, found) = (xattrs_a.get(name), xattrs_b.get(name));
        differences.push(format!("xattr {} is {found:?}, not {expected:?}", name.display()));
    }
    if meta_a.is_symlink() && meta_b.is_symlink() {
        let (expected, found) = (std::fs::read_link(a)?, std::fs::read_link(b)?);
        if expected != found {
            differences.push(format!("leads to {}, not {}", found.display(), expected.display()));
        }
    }
    if meta_a.is_file()
        && meta_b.is_file()
        && let Some(at) = first_difference(a, b)?
    {
        differences.push(format!("contents differ from byte {at}"));
    }
    Ok(differences)
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    for name in xattr::list(path)? {
        // The value may be gone between list and get only for pseudo file systems.
        if let Some(value) = xattr::get(path, &name)? {
            xattrs.insert(name, value);
        }
    }
    Ok(xattrs)
}

fn first_difference(a: &Path, b: &Path) -> io::Result<Option<u64>> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    let (mut left, mut right) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
    let mut offset = 0;
    loop {
        let (len_a, len_b) = (fill(&mut a, &mut left)?, fill(&mut b, &mut right)?);
        let same = left[..len_a].iter().zip(&right[..len_b]).take_while(|(a, b)| a == b).count();
        if same < len_a.max(len_b) {
            return Ok(Some(offset + same as u64));
        }
        if len_a == 0 {
            return Ok(None);
        }
        offset += len_a as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..])? {
            0 => break,
            read => len += read,
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::temp_root::TempRoot;

    /// Makes a pair of equal trees, changes one, and compares.
    fn differences(change: impl Fn(&Path)) -> Vec<String> {
        let root = TempRoot::new().unwrap();
        for name in ["a", "b"] {
            let dir = root.dir(name).unwrap();
            std::fs::create_dir(dir.join("d")).unwrap();
            std::fs::write(dir.join("d/file"), vec![7; 2 * COMPARED_BYTES]).unwrap();
            std::fs::hard_link(dir.join("d/file"), dir.join("link")).unwrap();
            std::os::unix::fs::symlink("d", dir.join("s")).unwrap();
            if name == "b" {
                change(&dir);
            }
            for path in ["link", "d", "s", ""] {
                let at = rustix::fs::Timespec { tv_sec: 1_000_000, tv_nsec: 5 };
                let times = rustix::fs::Timestamps { last_access: at, last_modification: at };
                let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(rustix::fs::CWD, dir.join(path), &times, flags).unwrap();
            }
        }
        compare_trees(&root.join("a"), &root.join("b")).unwrap()
    }

    #[test]
    fn equal_trees() {
        assert_eq!(differences(|_| ()), Vec::<String>::new());
    }

    #[test]
    fn each_difference_is_named() {
        assert_eq!(differences(|dir| std::fs::write(dir.join("x"), "").unwrap()), ["/x: is too many"]);
        let flip = |dir: &Path| {
            let mut bytes = vec![7; 2 * COMPARED_BYTES];
            bytes[COMPARED_BYTES + 3] = 8;
            std::fs::write(dir.join("link"), bytes).unwrap();
        };
        let at = COMPARED_BYTES + 3;
        let expected = ["d/file", "link"].map(|path| format!("/{path}: contents differ from byte {at}"));
        assert_eq!(differences(flip), expected);
        let relink = |dir: &Path| {
            std::fs::remove_file(dir.join("s")).unwrap();
            std::os::unix::fs::symlink("e", dir.join("s")).unwrap();
        };
        assert_eq!(differences(relink), ["/s: leads to e, not d"]);
        let copy = |dir: &Path| {
            std::fs::remove_file(dir.join("link")).unwrap();
            std::fs::copy(dir.join("d/file"), dir.join("link")).unwrap();
        };
        let found = differences(copy);
        assert!(found.contains(&"/link: links is 1, not 2".to_owned()), "{found:?}");
        assert!(found.contains(&"/link: links d/file and link".to_owned()), "{found:?}");
    }
}
