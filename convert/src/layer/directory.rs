//! A layer from a directory on this machine.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use ublkimg_image::{DeviceNumber, FileData, Kind, Meta, Time};

use super::tar::keep_xattrs;
use super::{Layer, LayerBuilder};
use crate::error::{Error, ErrorKind, Result};
use crate::spool::{PIECE_BYTES, Spool};

/// Reads everything below `root`, links not followed, other mounts included. Names starting with `.wh.` are ordinary
/// files here: a directory is a whole file system, not a difference. `advance` hears of the bytes read.
///
/// # Errors
/// `Io` naming the path; `BadSource` when a file changes its size while it is read.
pub(crate) fn read_directory(root: &Path, spool: &mut Spool, advance: &dyn Fn(u64)) -> Result<Layer> {
    let mut walk = DirectoryWalk { builder: LayerBuilder::new(), links: HashMap::new(), spool, advance };
    let metadata = fs::metadata(root).map_err(|error| Error::open(format!("directory {}", root.display()), error))?;
    if !metadata.is_dir() {
        return Err(Error::new(ErrorKind::Usage, format!("{} is not a directory", root.display())));
    }
    walk.builder.add_directory(&[], meta(root, &metadata)?)?;
    let mut todo: Vec<PathBuf> = vec![PathBuf::new()];
    while let Some(directory) = todo.pop() {
        let path = root.join(&directory);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(|error| at(&path, error))? {
            names.push(entry.map_err(|error| at(&path, error))?.file_name());
        }
        names.sort();
        for name in names {
            let inside = directory.join(&name);
            if walk.add(root, &inside)? {
                todo.push(inside);
            }
        }
    }
    walk.builder.finish(spool)
}

struct DirectoryWalk<'a> {
    builder: LayerBuilder,
    /// First path of each file with several names, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    spool: &'a mut Spool,
    advance: &'a dyn Fn(u64),
}

impl DirectoryWalk<'_> {
    /// Adds one object; true if it is a directory.
    fn add(&mut self, root: &Path, inside: &Path) -> Result<bool> {
        let path = root.join(inside);
        let metadata = fs::symlink_metadata(&path).map_err(|error| at(&path, error))?;
        let names: Vec<&[u8]> = inside.iter().map(OsStrExt::as_bytes).collect();
        let file_type = metadata.file_type();
        let named = |error: Error| error.within(path.display());
        if !file_type.is_dir() && metadata.nlink() > 1 {
            if let Some(first) = self.links.get(&(metadata.dev(), metadata.ino())) {
                self.builder.add_hard_link(&names, first.as_os_str().as_bytes()).map_err(named)?;
                return Ok(false);
            }
            self.links.insert((metadata.dev(), metadata.ino()), inside.to_owned());
        }
        let meta = meta(&path, &metadata)?;
        let xattr_bytes: usize = meta.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.builder.charge(inside.as_os_str().len() + xattr_bytes)?;
        if file_type.is_dir() {
            self.builder.add_directory(&names, meta).map_err(named)?;
            return Ok(true);
        }
        let device = || DeviceNumber { major: major(metadata.rdev()), minor: minor(metadata.rdev()) };
        let kind = if file_type.is_file() {
            let content = self.read_file(&path, metadata.len())?;
            let node = self.builder.add_leaf(&names, meta, Kind::File(FileData::EMPTY)).map_err(named)?;
            self.builder.files.insert(node, content);
            return Ok(false);
        } else if file_type.is_symlink() {
            Kind::Symlink(fs::read_link(&path).map_err(|error| at(&path, error))?.into_os_string().into_vec())
        } else if file_type.is_char_device() {
            Kind::CharDevice(device())
        } else if file_type.is_block_device() {
            Kind::BlockDevice(device())
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        };
        self.builder.add_leaf(&names, meta, kind).map_err(named)?;
        Ok(false)
    }

    fn read_file(&mut self, path: &Path, size_bytes: u64) -> Result<crate::spool::ContentId> {
        let mut file = File::open(path).map_err(|error| at(path, error))?;
        let mut content = self.spool.write();
        let mut buffer = vec![0; PIECE_BYTES.min(usize::try_from(size_bytes).unwrap_or(PIECE_BYTES)).max(1)];
        let mut seen_bytes = 0;
        loop {
            let count = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(at(path, error)),
            };
            seen_bytes += count as u64;
            if seen_bytes > size_bytes {
                break;
            }
            content.data(&buffer[..count])?;
            (self.advance)(count as u64);
        }
        if seen_bytes != size_bytes {
            return Err(Error::bad_source(format!("{} changed its size while it was read", path.display())));
        }
        content.finish()
    }
}

fn meta(path: &Path, metadata: &Metadata) -> Result<Meta> {
    let nanoseconds = u32::try_from(metadata.mtime_nsec()).unwrap_or_default();
    let mode = u16::try_from(metadata.mode() & 0o7777).unwrap_or_default();
    Ok(Meta {
        mode,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: Time { seconds: metadata.mtime(), nanoseconds },
        xattrs: keep_xattrs(read_xattrs(path)?),
    })
}

fn read_xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(xattrs),
        Err(error) => return Err(at(path, error)),
    };
    for name in names {
        if let Some(value) = xattr::get(path, &name).map_err(|error| at(path, error))? {
            xattrs.insert(name.into_vec(), value);
        }
    }
    Ok(xattrs)
}

fn at(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("reading {}", path.display()), error)
}
