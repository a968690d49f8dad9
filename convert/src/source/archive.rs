//! A tar archive as a set of named members, read in place: headers once, contents by offset when wanted.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use crate::compression::Compression;
use crate::error::{Error, Result};
use crate::path::{components, show};
use crate::tar::{EntryKind, TarReader};

/// Most members of an archive: an image has a few per layer.
const MEMBERS_MAX: usize = 65_536;

/// Most links from one member to another.
const LINKS_MAX: usize = 8;

/// Some bytes of a file, as a stream.
#[derive(Debug)]
pub(super) struct FileRange {
    file: Arc<File>,
    range: Range<u64>,
}

impl FileRange {
    pub(super) fn new(file: Arc<File>, range: Range<u64>) -> Self {
        Self { file, range }
    }
}

impl Read for FileRange {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        let want = buffer.len().min(left);
        let count = self.file.read_at(&mut buffer[..want], self.range.start)?;
        if count == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.range.start += count as u64;
        Ok(count)
    }
}

/// An archive and where its members are.
#[derive(Debug)]
pub(super) struct Archive {
    file: Arc<File>,
    members: HashMap<Vec<u8>, Member>,
}

#[derive(Debug)]
enum Member {
    File(Range<u64>),
    /// Another member, by its whole name.
    Link(Vec<u8>),
}

impl Archive {
    /// Reads all headers of the archive.
    ///
    /// # Errors
    /// `Unsupported` for a compressed archive, which cannot be read in place; `BadSource`, `NotFound`, `Io`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(File::open(path).map_err(|error| Error::open("opening the archive", error))?);
        let len_bytes = file.metadata().map_err(|error| Error::io("opening the archive", error))?.len();
        let mut start = [0; 6];
        let count = file.read_at(&mut start, 0).map_err(|error| Error::io("reading the archive", error))?;
        if Compression::sniff(&start[..count])? != Compression::None {
            return Err(Error::unsupported("the archive itself is compressed; unpack it first (gunzip, unzstd)"));
        }
        let members = read_members(&file, len_bytes)?;
        Ok(Self { file, members })
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where the content of a member is. Links are followed.
    ///
    /// # Errors
    /// `BadSource` naming the member if there is none.
    pub(super) fn member(&self, name: &[u8]) -> Result<Range<u64>> {
        let mut here = join(&components(name)?);
        for _ in 0..LINKS_MAX {
            match self.members.get(&here) {
                Some(Member::File(range)) => return Ok(range.clone()),
                Some(Member::Link(target)) => here.clone_from(target),
                None => return Err(Error::bad_source(format!("no member {} in the archive", show(&here)))),
            }
        }
        Err(Error::bad_source(format!("member {}: too many links", show(name))))
    }

    /// A whole member of at most `limit_bytes`.
    ///
    /// # Errors
    /// `BadSource` if there is none or it is longer.
    pub(super) fn read(&self, name: &[u8], limit_bytes: u64) -> Result<Vec<u8>> {
        let range = self.member(name)?;
        if range.end - range.start > limit_bytes {
            let len_bytes = range.end - range.start;
            return Err(Error::bad_source(format!("member {} has {len_bytes} bytes", show(name))));
        }
        let mut bytes = Vec::new();
        let mut reader = FileRange::new(Arc::clone(&self.file), range);
        reader.read_to_end(&mut bytes).map_err(|error| Error::io(format!("reading {}", show(name)), error))?;
        Ok(bytes)
    }
}

fn read_members(file: &Arc<File>, len_bytes: u64) -> Result<HashMap<Vec<u8>, Member>> {
    let mut members = HashMap::new();
    let mut position = 0;
    loop {
        // A fresh reader at each header: contents are stepped over, not read.
        let mut reader = TarReader::new(FileRange::new(Arc::clone(file), position..len_bytes));
        let Some(entry) = reader.next_entry()? else { return Ok(members) };
        let start = position + reader.position_bytes();
        let member = match entry.kind {
            EntryKind::File { size_bytes } if size_bytes <= reader.unread_bytes() => {
                Some(Member::File(start..start + size_bytes))
            }
            EntryKind::File { .. } => {
                return Err(Error::unsupported(format!("member {} is a sparse file", show(&entry.path))));
            }
            EntryKind::HardLink(target) => Some(Member::Link(join(&components(&target)?))),
            EntryKind::Symlink(target) => Some(Member::Link(resolve(&entry.path, &target)?)),
            _ => None,
        };
        if let Some(member) = member {
            members.insert(join(&components(&entry.path)?), member);
        }
        if members.len() > MEMBERS_MAX {
            return Err(Error::unsupported(format!("an archive of more than {MEMBERS_MAX} members")));
        }
        position = start + reader.unread_bytes();
        if position > len_bytes {
            return Err(Error::bad_source(format!("the archive is truncated in {}", show(&entry.path))));
        }
    }
}

/// The target of a symbolic link at `path`, seen from the root of the archive. `docker save` links layers of several
/// images as `../OTHER/layer.tar`.
fn resolve(path: &[u8], target: &[u8]) -> Result<Vec<u8>> {
    let mut names = components(path)?;
    names.pop();
    for name in target.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    Ok(join(&names))
}

fn join(names: &[&[u8]]) -> Vec<u8> {
    names.join(&b'/')
}
