//! A directory that layers are unpacked into, one on another.
//!
//! Every path is looked up below the directory as if that were the root (`openat2` with `RESOLVE_IN_ROOT`), so no link
//! and no `..` of an archive leads out of it. A whiteout deletes what layers below have made; what its own layer makes
//! stays, wherever the two stand in the archive, so the names that the layer at work has made are remembered. Times of
//! directories are set at the end: making and deleting entries changes them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    self as sys, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use ublkimg_image::Time;

use crate::error::{Error, Result};
use crate::layer::{Role, keep_xattrs, role};
use crate::path::{components, show};
use crate::tar::{Entry, EntryKind, Piece, TarReader};

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Attributes that are set last.
type DirectoryTimes = HashMap<u64, (Vec<u8>, Time)>;

/// See the module.
#[derive(Debug)]
pub(super) struct UnpackedTree {
    path: PathBuf,
    root: OwnedFd,
    /// Of the layer at work: the inode of a directory and a name in it.
    own: HashSet<(u64, Vec<u8>)>,
    /// By inode.
    times: DirectoryTimes,
    /// The directory that was used last: entries come sorted by directory, mostly.
    last: Option<(Vec<u8>, Parent)>,
}

/// A directory of the tree.
#[derive(Clone, Debug)]
struct Parent {
    fd: std::sync::Arc<OwnedFd>,
    inode: u64,
}

impl UnpackedTree {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = |error: Errno| Error::io(format!("opening {}", path.display()), error.into());
        let root = sys::open(path, DIRECTORY, Mode::empty()).map_err(failed)?;
        sys::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(failed)?;
        Ok(Self { path: path.to_owned(), root, own: HashSet::new(), times: HashMap::new(), last: None })
    }

    /// Unpacks a layer, to the end of `input`.
    ///
    /// # Errors
    /// `BadSource` naming the entry; those of `input` and of the file system.
    pub(super) fn add_layer(&mut self, input: impl Read) -> Result<()> {
        self.own.clear();
        self.last = None;
        let mut reader = TarReader::new(input);
        while let Some(entry) = reader.next_entry()? {
            let added = self.add(&entry, &mut reader);
            added.map_err(|error| error.within(format_args!("entry {}", show(&entry.path))))?;
        }
        reader.drain()
    }

    /// Sets what had to wait for the last layer.
    pub(super) fn finish(self) -> Result<()> {
        for (inode, (path, time)) in &self.times {
            // One that a later layer has replaced is not this one any more.
            let Ok(directory) = self.beneath(path) else { continue };
            if sys::fstat(&directory).is_ok_and(|stat| stat.st_ino == *inode) {
                sys::futimens(&directory, &timestamps(*time)).map_err(|error| self.failed(error))?;
            }
        }
        Ok(())
    }

    fn failed(&self, error: Errno) -> Error {
        Error::io(format!("unpacking into {}", self.path.display()), io::Error::from(error))
    }

    fn add(&mut self, entry: &Entry, reader: &mut TarReader<impl Read>) -> Result<()> {
        let names = components(&entry.path)?;
        match role(&names)? {
            Role::Ignored => Ok(()),
            Role::Opaque => {
                let parent = self.parent(&names[..names.len() - 1])?;
                self.hide_below(&parent.fd, parent.inode)
            }
            Role::Whiteout(name) => {
                let parent = self.parent(&names[..names.len() - 1])?;
                self.hide(&parent, name)
            }
            Role::Object => match names.split_last() {
                Some((name, parents)) => {
                    let parent = self.parent(parents)?;
                    self.make(&parent, name, entry, reader)
                }
                None => {
                    let root = self.root.try_clone().map_err(|error| Error::io("unpacking", error))?;
                    self.describe_directory(&root, entry)
                }
            },
        }
    }

    /// The directory at `names`; what is missing on the way is made.
    fn parent(&mut self, names: &[&[u8]]) -> Result<Parent> {
        let path = names.join(&b'/');
        if let Some((last, parent)) = &self.last
            && *last == path
        {
            return Ok(parent.clone());
        }
        let fd = match self.beneath(&path) {
            Err(Errno::NOENT) => {
                self.make_parents(names)?;
                self.beneath(&path)
            }
            other => other,
        };
        let fd = fd.map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => {
                Error::bad_source(format!("{} leads to no directory", show(&path)))
            }
            error => self.failed(error),
        })?;
        let inode = sys::fstat(&fd).map_err(|error| self.failed(error))?.st_ino;
        let parent = Parent { fd: std::sync::Arc::new(fd), inode };
        self.last = Some((path, parent.clone()));
        Ok(parent)
    }

    /// Directories that only paths of others name are root's, 0755.
    fn make_parents(&mut self, names: &[&[u8]]) -> Result<()> {
        for (depth, name) in names.iter().enumerate() {
            let above = self.beneath(&names[..depth].join(&b'/')).map_err(|error| self.failed(error))?;
            match sys::mkdirat(&above, *name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    let inode = sys::fstat(&above).map_err(|error| self.failed(error))?.st_ino;
                    self.own.insert((inode, name.to_vec()));
                    let made = sys::openat(&above, *name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
                    let made = made.map_err(|error| self.failed(error))?;
                    sys::fchmod(&made, Mode::from_raw_mode(0o755)).map_err(|error| self.failed(error))?;
                    let inode = sys::fstat(&made).map_err(|error| self.failed(error))?.st_ino;
                    // No entry says when it was changed.
                    self.times.insert(inode, (names[..=depth].join(&b'/'), Time { seconds: 0, nanoseconds: 0 }));
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    fn beneath(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        sys::openat2(&self.root, path, DIRECTORY, Mode::empty(), ResolveFlags::IN_ROOT)
    }

    fn make(&mut self, parent: &Parent, name: &[u8], entry: &Entry, reader: &mut TarReader<impl Read>) -> Result<()> {
        let fd = parent.fd.as_fd();
        let failed = |error: Errno| Error::io("unpacking", io::Error::from(error));
        self.own.insert((parent.inode, name.to_vec()));
        if entry.kind == EntryKind::Directory {
            if !is_directory(fd, name) {
                self.remove(parent, name)?;
                sys::mkdirat(fd, name, Mode::RWXU).map_err(failed)?;
            }
            let made = sys::openat(fd, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()).map_err(failed)?;
            return self.describe_directory(&made, entry);
        }
        // A link to itself would be gone with what is removed.
        let target = match &entry.kind {
            EntryKind::HardLink(target) => Some(self.link_target(target)?),
            _ => None,
        };
        if let Some((directory, target)) = target {
            if is_same(directory.fd.as_fd(), &target, fd, name) {
                return Ok(());
            }
            self.remove(parent, name)?;
            return match sys::linkat(&directory.fd, target.as_slice(), fd, name, AtFlags::empty()) {
                Err(Errno::NOENT) => {
                    Err(Error::bad_source(format!("a hard link to {}, which is not there", show(&target))))
                }
                other => other.map_err(failed),
            };
        }
        self.remove(parent, name)?;
        match &entry.kind {
            EntryKind::File { .. } => return write_file(fd, name, entry, reader),
            EntryKind::Symlink(target) => sys::symlinkat(target.as_slice(), fd, name).map_err(failed)?,
            kind => {
                let (kind, device) = node(kind);
                sys::mknodat(fd, name, kind, Mode::RUSR, device).map_err(failed)?;
            }
        }
        describe(fd, name, entry).map_err(failed)
    }

    fn describe_directory(&mut self, directory: &OwnedFd, entry: &Entry) -> Result<()> {
        let inode = sys::fstat(directory).map_err(|error| self.failed(error))?.st_ino;
        // Those of an older layer are not this one's.
        for name in xattr_names(directory) {
            sys::fremovexattr(directory, name.as_c_str()).map_err(|error| self.failed(error))?;
        }
        describe_open(directory.as_fd(), entry).map_err(|error| self.failed(error))?;
        self.times.insert(inode, (entry.path.clone(), entry.mtime));
        Ok(())
    }

    /// The directory and the name of a hard link's target, which is there.
    fn link_target(&mut self, target: &[u8]) -> Result<(Parent, Vec<u8>)> {
        let names: Vec<&[u8]> =
            target.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
        match names.split_last() {
            Some((name, parents)) if *name != b".." => Ok((self.parent(parents)?, name.to_vec())),
            _ => Err(Error::bad_source(format!("a hard link to {}", show(target)))),
        }
    }

    /// Deletes what layers below have at `name`.
    fn hide(&mut self, parent: &Parent, name: &[u8]) -> Result<()> {
        if !self.own.contains(&(parent.inode, name.to_vec())) {
            return self.remove(parent, name);
        }
        if !is_directory(parent.fd.as_fd(), name) {
            return Ok(());
        }
        let directory = sys::openat(&parent.fd, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
        let directory = directory.map_err(|error| self.failed(error))?;
        let inode = sys::fstat(&directory).map_err(|error| self.failed(error))?.st_ino;
        self.hide_below(&directory, inode)
    }

    /// Deletes what layers below have in a directory.
    fn hide_below(&mut self, directory: &OwnedFd, inode: u64) -> Result<()> {
        let parent = Parent {
            fd: std::sync::Arc::new(directory.try_clone().map_err(|error| Error::io("unpacking", error))?),
            inode,
        };
        for name in entries(directory).map_err(|error| self.failed(error))? {
            self.hide(&parent, &name)?;
        }
        Ok(())
    }

    /// Removes what is at `name`, with all below.
    fn remove(&mut self, parent: &Parent, name: &[u8]) -> Result<()> {
        self.last = None;
        match sys::unlinkat(&parent.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => {
                // By the descriptor: links on the way to it are not followed a second time.
                let path = Path::new("/proc/self/fd").join(parent.fd.as_raw_fd().to_string());
                let path = path.join(std::ffi::OsStr::from_bytes(name));
                std::fs::remove_dir_all(&path).map_err(|error| Error::io("unpacking", error))
            }
            Err(error) => Err(self.failed(error)),
        }
    }
}

fn is_directory(parent: BorrowedFd<'_>, name: &[u8]) -> bool {
    sys::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

fn is_same(left: BorrowedFd<'_>, left_name: &[u8], right: BorrowedFd<'_>, right_name: &[u8]) -> bool {
    let inode = |parent, name| sys::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| stat.st_ino);
    matches!((inode(left, left_name), inode(right, right_name)), (Ok(left), Ok(right)) if left == right)
}

/// Names in a directory.
fn entries(directory: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let names = sys::Dir::read_from(directory)?.map(|entry| Ok(entry?.file_name().to_bytes().to_vec()));
    let names: Result<Vec<Vec<u8>>, Errno> = names.collect();
    Ok(names?.into_iter().filter(|name| !matches!(name.as_slice(), b"." | b"..")).collect())
}

fn node(kind: &EntryKind) -> (FileType, u64) {
    match kind {
        EntryKind::CharDevice(number) => (FileType::CharacterDevice, sys::makedev(number.major, number.minor)),
        EntryKind::BlockDevice(number) => (FileType::BlockDevice, sys::makedev(number.major, number.minor)),
        _ => (FileType::Fifo, 0),
    }
}

fn write_file(parent: BorrowedFd<'_>, name: &[u8], entry: &Entry, reader: &mut TarReader<impl Read>) -> Result<()> {
    let failed = |error| Error::io("unpacking", error);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = sys::openat(parent, name, flags, Mode::RUSR | Mode::WUSR).map_err(|error| failed(error.into()))?;
    let file = File::from(file);
    let mut at = 0;
    reader.read_content(|piece| {
        match piece {
            Piece::Data(bytes) => {
                file.write_all_at(bytes, at).map_err(failed)?;
                at += bytes.len() as u64;
            }
            Piece::Zeros(len_bytes) => at += len_bytes,
        }
        Ok(())
    })?;
    if let EntryKind::File { size_bytes } = entry.kind {
        file.set_len(size_bytes).map_err(failed)?;
    }
    describe_open(file.as_fd(), entry).map_err(|error| failed(error.into()))?;
    sys::futimens(&file, &timestamps(entry.mtime)).map_err(|error| failed(error.into()))
}

/// Owner first: changing it takes the bits away that give rights to others.
fn describe_open(file: BorrowedFd<'_>, entry: &Entry) -> Result<(), Errno> {
    let (uid, gid) = owner(entry);
    sys::fchown(file, uid, gid)?;
    sys::fchmod(file, Mode::from_raw_mode(u32::from(entry.mode)))?;
    for (name, value) in kept(entry) {
        stored(sys::fsetxattr(file, name, &value, XattrFlags::empty()))?;
    }
    Ok(())
}

fn describe(parent: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<(), Errno> {
    let (uid, gid) = owner(entry);
    sys::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    if !matches!(entry.kind, EntryKind::Symlink(_)) {
        sys::chmodat(parent, name, Mode::from_raw_mode(u32::from(entry.mode)), AtFlags::empty())?;
    }
    let path = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
    let path = path.join(std::ffi::OsStr::from_bytes(name));
    for (name, value) in kept(entry) {
        stored(sys::lsetxattr(&path, name, &value, XattrFlags::empty()))?;
    }
    sys::utimensat(parent, name, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
}

/// The kernel has no user -1: it is who the file is of already.
fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    let is_one = |id: &u32| *id != u32::MAX;
    (Some(entry.uid).filter(is_one).map(Uid::from_raw), Some(entry.gid).filter(is_one).map(Gid::from_raw))
}

fn kept(entry: &Entry) -> BTreeMap<Vec<u8>, Vec<u8>> {
    keep_xattrs(entry.xattrs.clone())
}

/// A file system without extended attributes loses them, as with other engines.
fn stored(outcome: Result<(), Errno>) -> Result<(), Errno> {
    if outcome == Err(Errno::OPNOTSUPP) { Ok(()) } else { outcome }
}

fn xattr_names(file: &OwnedFd) -> Vec<CString> {
    let mut names = vec![0; 64 << 10];
    let len = sys::flistxattr(file, &mut names[..]).unwrap_or(0);
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty() && *name != b"security.selinux");
    names.filter_map(|name| CString::new(name).ok()).collect()
}

fn timestamps(time: Time) -> Timestamps {
    let time = Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}
