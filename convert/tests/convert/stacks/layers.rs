//! What a layer does, apart from how an archive says it.

use std::collections::BTreeMap;

pub(super) type Path = Vec<u8>;

/// A layer, whatever the order of its entries.
pub(super) struct Layer {
    pub(super) changes: Vec<Change>,
    /// Directories that come into being only because something is in them.
    pub(super) implied: Vec<Path>,
}

/// One step of a layer.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// `alias` leads to the same place through a symbolic link of a lower layer.
    Object { path: Path, alias: Option<Path>, meta: Meta, kind: Kind },
    /// Another name of a file, with the attributes that it has.
    Link { path: Path, target: Path, meta: Meta, target_is_below: bool },
    /// Deletes what the layers below have there.
    Whiteout(Path),
    /// Hides what the layers below have in there.
    Opaque(Path),
}

impl Change {
    /// The name of its entry.
    pub(super) fn path(&self) -> Path {
        match self {
            Self::Object { path, .. } | Self::Link { path, .. } => path.clone(),
            Self::Opaque(path) => join(path, b".wh..wh..opq"),
            Self::Whiteout(path) => join(parent(path), &[b".wh.", name(path)].concat()),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Meta {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
    pub(super) xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Directory,
    File(Vec<Run>),
    Symlink(Path),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// A part of a file's content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) len: usize,
    /// `None` for zeros.
    pub(super) seed: Option<u64>,
}

impl Run {
    pub(super) fn bytes(self) -> Vec<u8> {
        match self.seed {
            None => vec![0; self.len],
            Some(seed) => crate::fixture::noise(seed, self.len),
        }
    }
}

pub(super) fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |slash| &path[..slash])
}

pub(super) fn name(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(path, |slash| &path[slash + 1..])
}

pub(super) fn join(directory: &[u8], name: &[u8]) -> Path {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// Whether `path` lies in the directory, at any depth.
pub(super) fn is_inside(path: &[u8], directory: &[u8]) -> bool {
    directory.is_empty() && !path.is_empty() || path.strip_prefix(directory).is_some_and(|rest| rest.starts_with(b"/"))
}

/// The directories above `path`, the root not among them, the nearest first.
pub(super) fn above(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(Some(parent(path)), |path| Some(parent(path))).take_while(|path| !path.is_empty())
}
