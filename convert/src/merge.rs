//! Layers on top of each other: the tree that a container sees.
//!
//! Each step applies one layer, as its blob describes it (merge record and metadata, never data), to the merge of those
//! below. Nothing here depends on how the layer was read, so a layer blob made earlier, or by somebody else, merges the
//! same. What a layer deletes is deleted from the layers below only, whatever the layer itself has under that name; hard
//! links into lower layers are looked up *before* the layer changes anything.
//!
//! A directory that the layer only implied takes the place of nothing: over a directory it keeps that one's attributes,
//! over a symbolic link to a directory its contents go where the link leads, as container engines resolve parents.
//!
//! A chunk that several layers have is read where the lowest one has it ([`shared`]): one address, one place in caches.

mod shared;

use std::collections::{BTreeMap, HashMap, HashSet};

use ublkimg_image::{ChunkIndex, DeviceNumber, Kind, LowerLink, MergeRecord, Meta, Node, NodeId, Tree};

use crate::error::{Error, Result};
use crate::layer::{OPAQUE_XATTR, Walk, implied_meta};
use crate::path::{components, show};
use shared::{ChunkPlaces, DevicePlaces};

/// Most nodes that a merge may hold, replaced ones included; bounds memory to a few GiB.
const NODES_MAX: usize = 16 << 20;

/// The layers merged so far.
#[derive(Debug)]
pub(crate) struct Merge {
    tree: Tree,
    devices: u16,
    chunks: ChunkPlaces,
}

/// One layer while it is being applied.
struct Upper<'a> {
    tree: &'a Tree,
    data: DevicePlaces<'a>,
    implied: HashSet<NodeId>,
    plain_devices: HashSet<NodeId>,
    /// Nodes of the layer that are in the merge already, for hard links.
    merged: HashMap<NodeId, NodeId>,
}

impl Merge {
    pub(crate) fn new() -> Self {
        Self { tree: Tree::new(implied_meta()), devices: 0, chunks: ChunkPlaces::default() }
    }

    /// The merged tree; files are in [`Space::Device`](ublkimg_image::Space::Device), by layer.
    pub(crate) fn into_tree(self) -> Tree {
        self.tree
    }

    /// Puts a layer on top. `tree` is what its metadata says, `index` says where its chunks are.
    ///
    /// # Errors
    /// `BadSource` for a hard link to nothing.
    pub(crate) fn apply(&mut self, tree: &Tree, record: &MergeRecord, index: &ChunkIndex) -> Result<()> {
        let find = |paths: &[Vec<u8>]| paths.iter().filter_map(|path| tree.lookup(path)).collect();
        let mut upper = Upper {
            tree,
            data: self.chunks.add_device(self.devices, record.metadata_blocks, index),
            implied: find(&record.implied_directories),
            plain_devices: find(&record.plain_devices),
            merged: HashMap::new(),
        };
        let links = self.find_targets(&record.lower_links)?;
        self.apply_directories(&mut upper)?;
        for (path, node) in links {
            self.add_link(path, node)?;
        }
        self.devices = self.devices.checked_add(1).ok_or_else(|| Error::unsupported("more than 65535 layers"))?;
        Ok(())
    }

    fn apply_directories(&mut self, upper: &mut Upper<'_>) -> Result<()> {
        let root = &upper.tree.node(NodeId::ROOT).meta;
        if !upper.implied.contains(&NodeId::ROOT) {
            self.tree.node_mut(NodeId::ROOT).meta = plain_meta(root);
        }
        if is_opaque(root) {
            self.clear(NodeId::ROOT);
        }
        // The directories of the layer from the root to here: what is left of their entries, and the path of directories
        // that each has in the merge. Depth first, so that there is a path for each level, not for each directory.
        let tree = upper.tree;
        let entries_of = |directory: NodeId| tree.entries(directory).into_iter().flatten();
        let mut open = vec![(entries_of(NodeId::ROOT), vec![NodeId::ROOT])];
        while let Some((entries, to)) = open.last_mut() {
            let Some((name, child)) = entries.next() else {
                open.pop();
                continue;
            };
            match &tree.node(*child).kind {
                Kind::CharDevice(DeviceNumber { major: 0, minor: 0 }) if !upper.plain_devices.contains(child) => {
                    self.remove(last(to), name);
                }
                Kind::Directory(_) => {
                    let path = self.apply_directory(upper, *child, to, name)?;
                    open.push((entries_of(*child), path));
                }
                _ => {
                    let id = self.add_leaf(upper, *child)?;
                    self.tree.link(last(to), name.clone(), id);
                }
            }
        }
        Ok(())
    }

    /// Makes `name` in the directory at the end of `to` the layer's directory `child`; returns the path it has then.
    fn apply_directory(&mut self, upper: &Upper<'_>, child: NodeId, to: &[NodeId], name: &[u8]) -> Result<Vec<NodeId>> {
        let meta = &upper.tree.node(child).meta;
        let implied = upper.implied.contains(&child);
        let parent = last(to);
        let existing = self.tree.entries(parent).and_then(|entries| entries.get(name).copied());
        if let Some(existing) = existing {
            if self.tree.entries(existing).is_some() {
                if is_opaque(meta) {
                    self.clear(existing);
                }
                if !implied {
                    self.tree.node_mut(existing).meta = plain_meta(meta);
                }
                return Ok(join(to, existing));
            }
            if implied
                && let Kind::Symlink(target) = &self.tree.node(existing).kind
                && let Some(path) = self.walk(Walk::from(to.to_vec(), target)?)?
            {
                return Ok(path);
            }
        }
        let id = self.add(Node { meta: plain_meta(meta), kind: Kind::Directory(BTreeMap::new()) })?;
        self.tree.link(parent, name, id);
        Ok(join(to, id))
    }

    /// The node of the merge for anything but a directory; one for all its names.
    fn add_leaf(&mut self, upper: &mut Upper<'_>, id: NodeId) -> Result<NodeId> {
        if let Some(merged) = upper.merged.get(&id) {
            return Ok(*merged);
        }
        let mut node = upper.tree.node(id).clone();
        if let Kind::File(data) = &mut node.kind {
            *data = upper.data.move_file(data)?;
        }
        let merged = self.add(node)?;
        upper.merged.insert(id, merged);
        Ok(merged)
    }

    fn add(&mut self, node: Node) -> Result<NodeId> {
        if self.tree.len() >= NODES_MAX {
            return Err(Error::unsupported(format!("more than {NODES_MAX} entries in all layers")));
        }
        Ok(self.tree.add(node))
    }

    fn clear(&mut self, directory: NodeId) {
        if let Kind::Directory(entries) = &mut self.tree.node_mut(directory).kind {
            entries.clear();
        }
    }

    fn remove(&mut self, directory: NodeId, name: &[u8]) {
        if let Kind::Directory(entries) = &mut self.tree.node_mut(directory).kind {
            entries.remove(name);
        }
    }

    /// Where a walk along directories and symbolic links ends; `None` if something on the way is missing.
    fn walk(&self, mut walk: Walk) -> Result<Option<Vec<NodeId>>> {
        while let Some(name) = walk.next_name() {
            let Some(child) = self.tree.entries(walk.here()).and_then(|entries| entries.get(&name)) else {
                return Ok(None);
            };
            match &self.tree.node(*child).kind {
                Kind::Directory(_) => walk.enter(*child)?,
                Kind::Symlink(target) => walk.follow(target)?,
                _ => return Ok(None),
            }
        }
        Ok(Some(walk.into_path()))
    }

    /// The node at `path`; links are followed on the way, not at the end.
    fn find(&self, path: &[u8]) -> Result<Option<NodeId>> {
        let names = components(path)?;
        let Some((name, parents)) = names.split_last() else { return Ok(Some(NodeId::ROOT)) };
        let parent = self.walk(Walk::new(parents))?;
        Ok(parent.and_then(|path| self.tree.entries(last(&path))?.get(*name).copied()))
    }

    fn find_targets<'a>(&self, links: &'a [LowerLink]) -> Result<Vec<(&'a [u8], NodeId)>> {
        let mut found: HashMap<&[u8], NodeId> = HashMap::new();
        let mut targets = Vec::with_capacity(links.len());
        for LowerLink { path, target } in links {
            let node = match found.get(target.as_slice()) {
                Some(node) => Some(*node),
                None => self.find(target)?,
            };
            let node = node.filter(|node| self.tree.entries(*node).is_none()).ok_or_else(|| {
                let (path, target) = (show(path), show(target));
                Error::bad_source(format!("entry {path}: hard link to {target}, which is not a file in a layer below"))
            })?;
            found.insert(path, node);
            targets.push((path.as_slice(), node));
        }
        Ok(targets)
    }

    fn add_link(&mut self, path: &[u8], node: NodeId) -> Result<()> {
        let names = components(path)?;
        let parent = match names.split_last() {
            Some((name, parents)) => self.walk(Walk::new(parents))?.map(|path| (last(&path), *name)),
            None => None,
        };
        let (parent, name) =
            parent.ok_or_else(|| Error::bad_source(format!("entry {}: its directory is gone", show(path))))?;
        self.tree.link(parent, name, node);
        Ok(())
    }
}

fn last(path: &[NodeId]) -> NodeId {
    path.last().copied().unwrap_or(NodeId::ROOT)
}

fn join(path: &[NodeId], id: NodeId) -> Vec<NodeId> {
    [path, &[id]].concat()
}

fn is_opaque(meta: &Meta) -> bool {
    meta.xattrs.get(OPAQUE_XATTR).is_some_and(|value| value == b"y")
}

/// A directory's attributes without the marks of the union mount.
fn plain_meta(meta: &Meta) -> Meta {
    let mut meta = meta.clone();
    meta.xattrs.remove(OPAQUE_XATTR);
    meta
}

#[cfg(test)]
mod tests;
