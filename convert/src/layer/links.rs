//! Hard links inside a layer.

use std::collections::{BTreeMap, HashMap};

use ublkimg_image::{Kind, LowerLink, NodeId};

use super::{LayerBuilder, NAME_BYTES_TOTAL_MAX, Walk, for_each_path};
use crate::error::{Error, Result};
use crate::path::{components, show};

/// Where an entry is: a directory and a name in it.
pub(super) type Place = (NodeId, Vec<u8>);

/// What the target of a link is at the moment.
enum Target {
    Node(NodeId),
    /// Not there, but this is its place; perhaps another link waits there.
    Missing(Place),
    /// Not even its directory is there, or it is itself a directory that no entry describes.
    Nowhere,
}

impl LayerBuilder {
    /// Makes `names` another name of the file at `target`, now or when that has come.
    pub(super) fn add_hard_link(&mut self, names: &[&[u8]], target: &[u8]) -> Result<()> {
        let target_names = components(target)?;
        let (Some((name, parents)), false) = (names.split_last(), target_names.is_empty()) else {
            return Err(Error::bad_source("a hard link of a directory"));
        };
        let parent = self.directory(parents)?;
        let place = (parent, name.to_vec());
        if let Target::Node(node) = self.find(&target_names)? {
            self.link(place, node)
        } else {
            self.unlink(&place);
            self.pending_links.insert(place, target_names.join(&b'/'));
            Ok(())
        }
    }

    /// Follows all waiting links to the end of their chains. Returns those that end below this layer.
    pub(super) fn resolve_links(&mut self) -> Result<Vec<LowerLink>> {
        let mut lower: BTreeMap<Place, Vec<u8>> = BTreeMap::new();
        while let Some((place, mut target)) = self.pending_links.pop_first() {
            let mut chain = vec![place];
            let node = loop {
                match self.find(&components(&target)?)? {
                    Target::Node(node) => break Some(node),
                    Target::Nowhere => break None,
                    Target::Missing(next) => {
                        if let Some(end) = lower.get(&next) {
                            target.clone_from(end);
                            break None;
                        }
                        let Some(next_target) = self.pending_links.remove(&next) else { break None };
                        target = next_target;
                        chain.push(next);
                    }
                }
            };
            for place in chain {
                match node {
                    Some(node) => self.link(place, node)?,
                    None => {
                        lower.insert(place, target.clone());
                    }
                }
            }
        }
        self.with_paths(lower)
    }

    fn link(&mut self, place: Place, node: NodeId) -> Result<()> {
        if self.tree.entries(node).is_some() {
            return Err(Error::bad_source(format!("hard link {} to a directory", show(&place.1))));
        }
        self.pending_links.remove(&place);
        self.tree.link(place.0, place.1, node);
        Ok(())
    }

    fn unlink(&mut self, place: &Place) {
        if let Kind::Directory(entries) = &mut self.tree.node_mut(place.0).kind {
            entries.remove(&place.1);
        }
    }

    fn find(&self, names: &[&[u8]]) -> Result<Target> {
        let Some((name, parents)) = names.split_last() else { return Ok(Target::Node(NodeId::ROOT)) };
        let mut walk = Walk::new(parents);
        while let Some(name) = walk.next_name() {
            let Some(child) = self.child(walk.here(), &name) else { return Ok(Target::Nowhere) };
            match &self.tree.node(child).kind {
                Kind::Directory(_) => walk.enter(child)?,
                Kind::Symlink(target) => walk.follow(target)?,
                _ => return Ok(Target::Nowhere),
            }
        }
        Ok(match self.child(walk.here(), name) {
            // Only implied: in the layers below it may be a link to a directory, which can have another name.
            Some(node) if self.implied[node.index()] => Target::Nowhere,
            Some(node) => Target::Node(node),
            None => Target::Missing((walk.here(), name.to_vec())),
        })
    }

    /// Gives places their paths; those in directories that were replaced have none and drop out.
    fn with_paths(&mut self, lower: BTreeMap<Place, Vec<u8>>) -> Result<Vec<LowerLink>> {
        let mut parents: HashMap<NodeId, Option<Vec<u8>>> = lower.keys().map(|(parent, _)| (*parent, None)).collect();
        if parents.is_empty() {
            return Ok(Vec::new());
        }
        let mut path_bytes = 0;
        for_each_path(&self.tree, |path, id, _| {
            if let Some(found) = parents.get_mut(&id) {
                path_bytes += path.len();
                if path_bytes <= NAME_BYTES_TOTAL_MAX {
                    *found = Some(path.to_vec());
                }
            }
        });
        self.charge(path_bytes)?;
        let mut links = Vec::with_capacity(lower.len());
        for ((parent, name), target) in lower {
            if let Some(Some(parent)) = parents.get(&parent) {
                let path = if parent.is_empty() { name } else { [parent, b"/".as_slice(), &name].concat() };
                self.charge(path.len() + target.len())?;
                links.push(LowerLink { path, target });
            }
        }
        links.sort_by(|left, right| left.path.cmp(&right.path));
        Ok(links)
    }
}
