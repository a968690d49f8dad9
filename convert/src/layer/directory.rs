//! A layer from a directory on this machine.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, major, minor, seek};
use rustix::io::Errno;
use ublkimg_image::{DeviceNumber, FileData, Kind, Meta, Time};

use super::tar::keep_xattrs;
use super::{Layer, LayerBuilder};
use crate::error::{Error, ErrorKind, Result};
use crate::spool::{ContentId, PIECE_BYTES, Spool};

/// Reads everything below `root`, links not followed, other mounts included. Names starting with `.wh.` are ordinary
/// files here: a directory is a whole file system, not a difference. `advance` hears of the bytes read and can stop it.
///
/// # Errors
/// `Io` naming the path; `BadSource` when a file changes its size while it is read.
pub(crate) fn read_directory(root: &Path, spool: &mut Spool, advance: &dyn Fn(u64) -> Result<()>) -> Result<Layer> {
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
    walk.spool.settle()?;
    walk.builder.finish(spool)
}

struct DirectoryWalk<'a> {
    builder: LayerBuilder,
    /// First path of each file with several names, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    spool: &'a mut Spool,
    advance: &'a dyn Fn(u64) -> Result<()>,
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

    /// Reads a file into the spool; its holes are not read.
    fn read_file(&mut self, path: &Path, size_bytes: u64) -> Result<ContentId> {
        let changed = || Error::bad_source(format!("{} changed its size while it was read", path.display()));
        let file = File::open(path).map_err(|error| at(path, error))?;
        let mut content = self.spool.write();
        let mut buffer = vec![0; usize::try_from(size_bytes).map_or(PIECE_BYTES, |size| size.min(PIECE_BYTES))];
        let mut position = 0;
        while position < size_bytes {
            let data = next_data(&file, position, size_bytes);
            content.zeros(data.start - position)?;
            position = data.start;
            while position < data.end {
                let want = usize::try_from(data.end - position).map_or(buffer.len(), |left| left.min(buffer.len()));
                match file.read_at(&mut buffer[..want], position) {
                    Ok(0) => return Err(changed()),
                    Ok(count) => {
                        content.data(&buffer[..count])?;
                        position += count as u64;
                        (self.advance)(count as u64)?;
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(at(path, error)),
                }
            }
        }
        if file.metadata().map_err(|error| at(path, error))?.len() != size_bytes {
            return Err(changed());
        }
        content.finish()
    }
}

/// The next run of data in a file; file systems that know no holes have one run. Empty at the end.
fn next_data(file: &File, position: u64, size_bytes: u64) -> Range<u64> {
    let start = match seek(file, SeekFrom::Data(position)) {
        Ok(start) => start.clamp(position, size_bytes),
        Err(Errno::NXIO) => return size_bytes..size_bytes,
        Err(_) => return position..size_bytes,
    };
    let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size_bytes).min(size_bytes);
    // A hole where there was data a moment ago: the file is changing. Reading it shows that.
    if end > start { start..end } else { start..size_bytes }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk_size::ChunkSize;
    use crate::frames::Compress;

    #[test]
    fn holes_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("sparse")).unwrap();
        file.write_all_at(b"middle", 5 << 30).unwrap();
        file.set_len(10 << 30).unwrap();
        let mut spool =
            Spool::new(dir.path(), ChunkSize::MAX, Compress { level: 1, threads: std::num::NonZeroUsize::MIN })
                .unwrap();
        let read = std::cell::Cell::new(0);
        let advance = |bytes| {
            read.set(read.get() + bytes);
            Ok(())
        };
        let layer = read_directory(dir.path(), &mut spool, &advance).unwrap();
        let content = spool.content(layer.files[&layer.tree.lookup(b"sparse").unwrap()]);
        assert_eq!((content.size_bytes, content.stored.len()), (10 << 30, 1));
        if read.get() == 10 << 30 {
            println!("SKIP: this file system does not say where holes are");
        }
    }
}
