//! One source layer as a tree: what it adds, replaces and deletes.
//!
//! Entries come in any order and repeat; the last one for a path wins, except that a directory entry for a directory
//! replaces its attributes and keeps its children. A whiteout removes a name *from the layers below only*, wherever it
//! stands in the archive, so whiteouts and opaque marks are collected and applied when all entries are known. So are
//! hard links to names that have not come yet; a link whose target never comes points into a lower layer and goes to
//! the merge record, as do directories that exist only because something is in them.
//!
//! Parents that are symbolic links are resolved inside the layer, as container engines resolve them inside the root,
//! with a bound on the hops; a parent that is a file is an error. `..` in a link's target stays below the root.

mod directory;
mod links;
mod tar;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ublkimg_image::{DeviceNumber, Kind, MergeRecord, Meta, Node, NodeId, Tree};

use crate::error::{Error, Result};
use crate::path::show;
use crate::spool::{ContentId, Spool};

pub(crate) use directory::read_directory;
pub(crate) use tar::{Role, keep_xattrs, read_tar, role};

/// Most entries of one layer: the largest images known have about a million. Bounds memory to a few GiB.
const ENTRIES_MAX: usize = 4 << 20;

/// Most bytes of names, link targets and extended attributes of one layer; bounds memory too.
const NAME_BYTES_TOTAL_MAX: usize = 512 << 20;

/// Most symbolic links followed on the way to one entry (Linux: 40).
pub(crate) const SYMLINK_HOPS_MAX: u32 = 40;

/// Most directories above an entry once links are resolved. A path of the longest name length fits twice.
const DEPTH_MAX: usize = 4096;

/// Longest target of a symbolic link; the file system's limit.
const SYMLINK_BYTES_MAX: usize = 4095;

/// The extended attribute that hides everything below a directory.
pub(crate) const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";

/// A layer, ready to be laid out.
#[derive(Debug)]
pub(crate) struct Layer {
    /// The layer's own tree with whiteouts in overlayfs form. Layouts of files are not set.
    pub(crate) tree: Tree,
    /// The content of each regular file in the tree.
    pub(crate) files: HashMap<NodeId, ContentId>,
    /// What the tree cannot say; `metadata_blocks` is not set.
    pub(crate) record: MergeRecord,
}

/// Attributes of a directory that no entry describes.
pub(crate) fn implied_meta() -> Meta {
    Meta { mode: 0o755, ..Meta::default() }
}

/// Collects the entries of a layer.
#[derive(Debug)]
struct LayerBuilder {
    tree: Tree,
    files: HashMap<NodeId, ContentId>,
    /// By node number: directories without an entry of their own.
    implied: Vec<bool>,
    opaque: BTreeSet<NodeId>,
    whiteouts: BTreeSet<(NodeId, Vec<u8>)>,
    /// Hard links by place, whose targets (as written, normalised) were not there when they came.
    pending_links: BTreeMap<(NodeId, Vec<u8>), Vec<u8>>,
    name_bytes: usize,
}

impl LayerBuilder {
    fn new() -> Self {
        Self {
            tree: Tree::new(implied_meta()),
            files: HashMap::new(),
            implied: vec![true],
            opaque: BTreeSet::new(),
            whiteouts: BTreeSet::new(),
            pending_links: BTreeMap::new(),
            name_bytes: 0,
        }
    }

    /// Counts what an entry adds to memory.
    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.name_bytes += bytes;
        if self.name_bytes > NAME_BYTES_TOTAL_MAX || self.tree.len() > ENTRIES_MAX {
            return Err(Error::unsupported(format!(
                "more than {ENTRIES_MAX} entries or {NAME_BYTES_TOTAL_MAX} bytes of names in one layer"
            )));
        }
        Ok(())
    }

    fn add_node(&mut self, meta: Meta, kind: Kind, implied: bool) -> NodeId {
        let id = self.tree.add(Node { meta, kind });
        self.implied.push(implied);
        id
    }

    /// Adds or updates the directory at `names`.
    fn add_directory(&mut self, names: &[&[u8]], meta: Meta) -> Result<()> {
        let Some((name, parents)) = names.split_last() else {
            self.tree.node_mut(NodeId::ROOT).meta = meta;
            self.implied[NodeId::ROOT.index()] = false;
            return Ok(());
        };
        let parent = self.directory(parents)?;
        self.pending_links.remove(&(parent, name.to_vec()));
        match self.child(parent, name) {
            Some(existing) if self.tree.entries(existing).is_some() => {
                self.tree.node_mut(existing).meta = meta;
                self.implied[existing.index()] = false;
            }
            _ => {
                let id = self.add_node(meta, Kind::Directory(BTreeMap::new()), false);
                self.tree.link(parent, *name, id);
            }
        }
        Ok(())
    }

    /// Adds anything but a directory or a hard link; replaces what is there.
    fn add_leaf(&mut self, names: &[&[u8]], meta: Meta, kind: Kind) -> Result<NodeId> {
        if let Kind::Symlink(target) = &kind
            && (target.is_empty() || target.len() > SYMLINK_BYTES_MAX)
        {
            return Err(Error::bad_source(format!("a symbolic link to {} bytes", target.len())));
        }
        let Some((name, parents)) = names.split_last() else {
            return Err(Error::bad_source("the root is not a directory"));
        };
        let parent = self.directory(parents)?;
        let id = self.add_node(meta, kind, false);
        self.pending_links.remove(&(parent, name.to_vec()));
        self.tree.link(parent, *name, id);
        Ok(id)
    }

    /// Deletes `name` from the layers below.
    fn add_whiteout(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<()> {
        let parent = self.directory(parents)?;
        self.whiteouts.insert((parent, name.to_vec()));
        Ok(())
    }

    /// Hides all that the layers below have in the directory.
    fn add_opaque(&mut self, names: &[&[u8]]) -> Result<()> {
        let directory = self.directory(names)?;
        self.opaque.insert(directory);
        Ok(())
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        self.tree.entries(directory)?.get(name).copied()
    }

    /// The directory at `names`; what is missing on the way is made.
    fn directory(&mut self, names: &[&[u8]]) -> Result<NodeId> {
        let mut walk = Walk::new(names);
        while let Some(name) = walk.next_name() {
            match self.child(walk.here(), &name) {
                None => {
                    let id = self.add_node(implied_meta(), Kind::Directory(BTreeMap::new()), true);
                    self.charge(name.len())?;
                    self.pending_links.remove(&(walk.here(), name.clone()));
                    self.tree.link(walk.here(), name, id);
                    walk.enter(id)?;
                }
                Some(child) => match &self.tree.node(child).kind {
                    Kind::Directory(_) => walk.enter(child)?,
                    Kind::Symlink(target) => walk.follow(target)?,
                    _ => return Err(Error::bad_source(format!("its parent {} is not a directory", show(&name)))),
                },
            }
        }
        Ok(walk.here())
    }

    /// Applies what had to wait for the last entry.
    fn finish(mut self, spool: &Spool) -> Result<Layer> {
        let lower_links = self.resolve_links()?;
        self.settle_whiteouts();
        for directory in std::mem::take(&mut self.opaque) {
            self.tree.node_mut(directory).meta.xattrs.insert(OPAQUE_XATTR.to_vec(), b"y".to_vec());
        }
        let mut record = MergeRecord { lower_links, ..MergeRecord::default() };
        let mut path_bytes = 0;
        for_each_path(&self.tree, |path, id, node| {
            let list = match &node.kind {
                Kind::Directory(_) if self.implied[id.index()] => &mut record.implied_directories,
                // Made by an entry, so not one of the whiteouts, which come below.
                Kind::CharDevice(DeviceNumber { major: 0, minor: 0 }) => &mut record.plain_devices,
                _ => return,
            };
            path_bytes += path.len();
            // Links on the way make paths longer than the archive says.
            if path_bytes <= NAME_BYTES_TOTAL_MAX {
                list.push(path.to_vec());
            }
        });
        self.charge(path_bytes)?;
        for (parent, name) in std::mem::take(&mut self.whiteouts) {
            let id = self.add_node(Meta::default(), Kind::CharDevice(DeviceNumber::default()), false);
            self.tree.link(parent, name, id);
        }
        for (node, content) in &self.files {
            if let Kind::File(file) = &mut self.tree.node_mut(*node).kind {
                file.size_bytes = spool.content(*content).size_bytes;
            }
        }
        Ok(Layer { tree: self.tree, files: self.files, record })
    }

    /// Drops whiteouts of names that the layer itself has: what it has there replaces the lower one anyway. Only a
    /// directory would let the lower one show through: it becomes opaque, with attributes of its own.
    fn settle_whiteouts(&mut self) {
        for (parent, name) in std::mem::take(&mut self.whiteouts) {
            match self.child(parent, &name) {
                Some(child) if self.tree.entries(child).is_some() => {
                    self.opaque.insert(child);
                    self.implied[child.index()] = false;
                }
                Some(_) => {}
                None => {
                    self.whiteouts.insert((parent, name));
                }
            }
        }
    }
}

/// A walk down a tree along names that symbolic links can redirect; shared by layers and the merge.
pub(crate) struct Walk {
    /// The directories from the root to here.
    path: Vec<NodeId>,
    /// Names still to go, the next one last.
    todo: Vec<Vec<u8>>,
    hops: u32,
}

impl Walk {
    pub(crate) fn new(names: &[&[u8]]) -> Self {
        Self { path: vec![NodeId::ROOT], todo: names.iter().rev().map(|name| name.to_vec()).collect(), hops: 0 }
    }

    /// A walk that has come to `path` (the root first) and is to go on along `target`.
    pub(crate) fn from(path: Vec<NodeId>, target: &[u8]) -> Result<Self> {
        let mut walk = Self { path, todo: Vec::new(), hops: 0 };
        walk.follow(target)?;
        Ok(walk)
    }

    /// The directory that the walk is in.
    pub(crate) fn here(&self) -> NodeId {
        *self.path.last().unwrap_or(&NodeId::ROOT)
    }

    /// The directories from the root to here.
    pub(crate) fn into_path(self) -> Vec<NodeId> {
        self.path
    }

    /// The next name to look up here; `..` is gone up already.
    pub(crate) fn next_name(&mut self) -> Option<Vec<u8>> {
        loop {
            let name = self.todo.pop()?;
            match name.as_slice() {
                b"" | b"." => {}
                b".." => {
                    if self.path.len() > 1 {
                        self.path.pop();
                    }
                }
                _ => return Some(name),
            }
        }
    }

    /// Goes down into a directory.
    pub(crate) fn enter(&mut self, directory: NodeId) -> Result<()> {
        if self.path.len() > DEPTH_MAX {
            return Err(Error::bad_source(format!("more than {DEPTH_MAX} directories deep")));
        }
        self.path.push(directory);
        Ok(())
    }

    /// Goes on along the target of a symbolic link found here.
    pub(crate) fn follow(&mut self, target: &[u8]) -> Result<()> {
        self.hops += 1;
        if self.hops > SYMLINK_HOPS_MAX {
            return Err(Error::bad_source("too many symbolic links on the way"));
        }
        if target.starts_with(b"/") {
            self.path.truncate(1);
        }
        self.todo.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
        Ok(())
    }
}

/// Calls `visit` for everything in the tree, parents first, names in byte order. Hard links are visited at every path.
pub(crate) fn for_each_path<'a>(tree: &'a Tree, mut visit: impl FnMut(&[u8], NodeId, &'a Node)) {
    let mut path: Vec<u8> = Vec::new();
    visit(&path, NodeId::ROOT, tree.node(NodeId::ROOT));
    let Some(entries) = tree.entries(NodeId::ROOT) else { return };
    let mut stack = vec![(entries.iter(), 0)];
    while let Some((entries, len)) = stack.last_mut() {
        path.truncate(*len);
        let Some((name, id)) = entries.next() else {
            stack.pop();
            continue;
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        visit(&path, *id, tree.node(*id));
        if let Some(entries) = tree.entries(*id) {
            stack.push((entries.iter(), path.len()));
        }
    }
}

#[cfg(test)]
mod tests;
