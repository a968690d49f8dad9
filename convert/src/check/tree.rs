//! Two trees, object by object.

use std::collections::HashMap;

use ublkimg_image::{FileData, Kind, Node, NodeId, Tree};

use crate::error::{Error, Result};

/// Compares all names, attributes, links and contents; `same_content` compares two files by their nodes and data. Returns the
/// number of names.
///
/// # Errors
/// `VerificationFailed` naming the first path that differs and how; what `same_content` returns.
pub(super) fn compare(
    expected: &Tree,
    found: &Tree,
    mut same_content: impl FnMut(NodeId, &FileData, NodeId, &FileData) -> Result<bool>,
) -> Result<u64> {
    // Nodes that stand for each other: several names of one file must be names of one file on the other side.
    let (mut to_found, mut to_expected) = (HashMap::new(), HashMap::new());
    let mut places = Places::default();
    let mut names = 0;
    let mut open = vec![(NodeId::ROOT, NodeId::ROOT, NodeId::ROOT, &b""[..])];
    while let Some((left, right, parent, name)) = open.pop() {
        names += 1;
        let differs = |how: &str| Err(Error::damaged(format!("{}: {how}", places.path(parent, name))));
        match (to_found.insert(left, right), to_expected.insert(right, left)) {
            (None, None) => {}
            (Some(other), _) if other == right => continue,
            _ => return differs("its hard links differ"),
        }
        let (left_node, right_node) = (expected.node(left), found.node(right));
        if let Some(how) = difference(left_node, right_node) {
            return differs(how);
        }
        match (&left_node.kind, &right_node.kind) {
            (Kind::Directory(left_entries), Kind::Directory(right_entries)) => {
                if let Some(name) = left_entries.keys().find(|name| !right_entries.contains_key(*name)) {
                    return differs(&format!("{} is missing", name.escape_ascii()));
                }
                if let Some(name) = right_entries.keys().find(|name| !left_entries.contains_key(*name)) {
                    return differs(&format!("{} should not be there", name.escape_ascii()));
                }
                places.0.insert(left, (parent, name));
                let pairs = left_entries.iter().zip(right_entries.values()).rev();
                open.extend(pairs.map(|((name, child), other)| (*child, *other, left, &name[..])));
            }
            (Kind::File(left_data), Kind::File(right_data)) => {
                if left_data.size_bytes != right_data.size_bytes {
                    let (want, have) = (left_data.size_bytes, right_data.size_bytes);
                    return differs(&format!("{have} bytes instead of {want}"));
                }
                if !same_content(left, left_data, right, right_data)? {
                    return differs("its content differs");
                }
            }
            _ => {}
        }
    }
    Ok(names)
}

/// Where directories are: parent and name. Paths are made when they are wanted, as all of them could be far larger than the
/// tree.
#[derive(Default)]
struct Places<'a>(HashMap<NodeId, (NodeId, &'a [u8])>);

impl Places<'_> {
    fn path(&self, mut parent: NodeId, name: &[u8]) -> String {
        let mut path = format!("/{}", name.escape_ascii());
        while parent != NodeId::ROOT
            && let Some((next, name)) = self.0.get(&parent)
        {
            path.insert_str(0, &format!("/{}", name.escape_ascii()));
            parent = *next;
        }
        path
    }
}

/// What differs in the nodes themselves.
fn difference(left: &Node, right: &Node) -> Option<&'static str> {
    let same_kind = match (&left.kind, &right.kind) {
        (Kind::Directory(_), Kind::Directory(_)) | (Kind::File(_), Kind::File(_)) => true,
        (left, right) => left == right,
    };
    let (a, b) = (&left.meta, &right.meta);
    [
        (same_kind, "its type, target or device number differs"),
        (a.mode == b.mode, "its mode differs"),
        ((a.uid, a.gid) == (b.uid, b.gid), "its owner differs"),
        (a.mtime == b.mtime, "its time differs"),
        (a.xattrs == b.xattrs, "its extended attributes differ"),
    ]
    .into_iter()
    .find_map(|(same, how)| (!same).then_some(how))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ublkimg_image::Meta;

    use super::*;

    fn tree(names: &[(&str, usize)]) -> Tree {
        let mut tree = Tree::new(Meta::default());
        let mut nodes = HashMap::new();
        for (name, node) in names {
            let id = *nodes.entry(*node).or_insert_with(|| {
                tree.add(Node {
                    meta: Meta { uid: u32::try_from(*node).unwrap(), ..Meta::default() },
                    kind: Kind::Fifo,
                })
            });
            tree.link(NodeId::ROOT, *name, id);
        }
        let directory = tree.add(Node { meta: Meta::default(), kind: Kind::Directory(BTreeMap::new()) });
        tree.link(NodeId::ROOT, "directory", directory);
        tree
    }

    fn outcome(left: &[(&str, usize)], right: &[(&str, usize)]) -> Result<u64, String> {
        compare(&tree(left), &tree(right), |_, _, _, _| Ok(true)).map_err(|error| error.to_string())
    }

    #[test]
    fn differences_are_named() {
        assert_eq!(outcome(&[("a", 1), ("b", 1), ("c", 2)], &[("a", 1), ("b", 1), ("c", 2)]), Ok(5));
        let cases: [(&[_], &[_], &str); 5] = [
            (&[("a", 1)], &[("a", 2)], "/a: its owner differs"),
            (&[("a", 1)], &[], "/: a is missing"),
            (&[], &[("a", 1)], "/: a should not be there"),
            (&[("a", 1), ("b", 1)], &[("a", 1), ("b", 2)], "/b: its hard links differ"),
            (&[("a", 1), ("b", 2)], &[("a", 1), ("b", 1)], "/b: its hard links differ"),
        ];
        for (left, right, message) in cases {
            assert_eq!(outcome(left, right), Err(message.to_owned()));
        }
    }
}
