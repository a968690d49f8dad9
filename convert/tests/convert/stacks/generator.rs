//! Random stacks of layers that favour the hard cases: whiteouts, opaque directories, changes of type, hard links within a
//! layer and into lower ones, duplicate entries, parents that nobody mentions or that are links, odd names and attributes.
//!
//! A model of the merged tree, by path, keeps the stacks meaningful: what a layer says must not depend on the order in
//! which its entries are applied, as engines go by the order and an image of one layer cannot. Whatever two engines could
//! do in two ways is not generated.

use std::collections::{BTreeMap, BTreeSet};

use super::layers::{Change, Kind, Layer, Meta, Path, Run, above, is_inside, join, parent};
use super::random::Random;

/// What the layers so far have at a path.
#[derive(Clone, Debug)]
struct Known {
    kind: Tag,
    /// `None` for a directory that no entry describes.
    meta: Option<Meta>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Tag {
    Directory,
    File,
    /// With the directory that it leads to, if it does.
    Symlink(Option<Path>),
    Other,
}

type Tree = BTreeMap<Path, Known>;

/// A layer under construction.
struct Builder<'a> {
    random: &'a mut Random,
    /// What the layers below made.
    below: &'a Tree,
    changes: Vec<Change>,
    /// The objects of this layer with an entry.
    own: Tree,
    whiteouts: BTreeSet<Path>,
    opaque: BTreeSet<Path>,
    /// Paths of lower layers that this layer relies on: they stay what they are.
    relied_on: BTreeSet<Path>,
}

/// A stack, the lowest layer first.
pub(super) fn stack(seed: u64) -> Vec<Layer> {
    let mut random = Random::new(seed);
    let count = *random.choose(&[1, 2, 2, 3, 3, 3, 4, 5, 8, 12]);
    let mut below = Tree::new();
    let mut layers = Vec::new();
    for number in 0..count {
        let size = if number == 0 { 30 + random.below(60) } else { 2 + random.below(40) };
        let mut builder = Builder {
            random: &mut random,
            below: &below,
            changes: Vec::new(),
            own: Tree::new(),
            whiteouts: BTreeSet::new(),
            opaque: BTreeSet::new(),
            relied_on: BTreeSet::new(),
        };
        if builder.random.once_in(4) {
            let meta = some_meta(builder.random, &Kind::Directory);
            builder.changes.push(Change::Object { path: Path::new(), alias: None, meta, kind: Kind::Directory });
        }
        for _ in 0..size {
            builder.change();
        }
        let (mut layer, merged) = builder.finish();
        if number == 0 {
            layer.implied.push(Path::new());
        }
        below = merged;
        layers.push(layer);
    }
    layers
}

impl Builder<'_> {
    fn change(&mut self) {
        match self.random.below(20) {
            0..=7 => self.new_object(),
            8 | 9 => self.whiteout(),
            10 => self.opaque(),
            11 | 12 => self.replace(),
            13 | 14 => self.link_below(),
            15 | 16 => self.link_own(),
            17 => self.directory_again(),
            18 => self.through_a_link(),
            _ => self.duplicate(),
        }
    }

    fn new_object(&mut self) {
        let mut path = self.some_directory();
        if self.random.once_in(8) {
            path = join(&path, &some_name(self.random));
        }
        let path = join(&path, &some_name(self.random));
        self.put_anything(&path);
    }

    /// Something else in the place of what is below.
    fn replace(&mut self) {
        if let Some((path, _)) = self.some_below(|_| true) {
            self.put_anything(&path);
        }
    }

    fn put_anything(&mut self, path: &[u8]) {
        let (kind, tag) = self.some_kind();
        let meta = some_meta(self.random, &kind);
        self.put(path, meta, kind, tag);
    }

    fn put(&mut self, path: &[u8], meta: Meta, kind: Kind, tag: Tag) -> bool {
        let fits = path.len() < 1500
            && self.can_enter(parent(path))
            && !self.own.contains_key(path)
            && !self.relied_on.iter().any(|relied| relied == path || is_inside(relied, path) && tag != Tag::Directory)
            && (tag == Tag::Directory || !self.touches_inside(path));
        if fits {
            self.changes.push(Change::Object { path: path.to_vec(), alias: None, meta: meta.clone(), kind });
            self.own.insert(path.to_vec(), Known { kind: tag, meta: Some(meta) });
        }
        fits
    }

    fn whiteout(&mut self) {
        let path = match self.some_below(|_| true) {
            Some((path, _)) if !self.random.once_in(8) => path,
            _ => join(&self.some_directory(), &some_name(self.random)),
        };
        let parent_is_there = parent(&path).is_empty() || self.below.contains_key(parent(&path));
        let relied_on = self.relied_on.iter().any(|relied| *relied == path || is_inside(relied, &path));
        if !parent_is_there || relied_on || !self.can_enter(parent(&path)) || self.whiteouts.contains(&path) {
            return;
        }
        let remade = self.own.get(&path).is_some_and(|own| own.kind == Tag::Directory);
        if self.touches_inside(&path) && !(remade && self.passes_own_directories(&path)) {
            return;
        }
        self.changes.push(Change::Whiteout(path.clone()));
        self.whiteouts.insert(path);
    }

    fn opaque(&mut self) {
        let Some((mut path, _)) = self.some_below(|known| known.kind == Tag::Directory) else { return };
        if self.random.once_in(10) {
            path.clear();
        }
        let relied_on = self.relied_on.iter().any(|relied| is_inside(relied, &path));
        let is_directory = self.own.get(&path).is_none_or(|own| own.kind == Tag::Directory);
        if is_directory && !relied_on && self.can_enter(&path) && self.passes_own_directories(&path) {
            self.changes.push(Change::Opaque(path.clone()));
            self.opaque.insert(path);
        }
    }

    fn link_below(&mut self) {
        let Some((target, known)) = self.some_below(|known| known.kind != Tag::Directory) else { return };
        let Some(meta) = known.meta else { return };
        let replaced = above(&target).any(|path| self.own.get(path).is_some_and(|own| own.kind != Tag::Directory));
        if self.own.contains_key(&target) || replaced {
            return;
        }
        self.link(target, known.kind, meta, true);
    }

    fn link_own(&mut self) {
        let files: Vec<Path> =
            self.own.iter().filter(|(_, own)| own.kind != Tag::Directory).map(|(path, _)| path.clone()).collect();
        if files.is_empty() {
            return;
        }
        let target = self.random.choose(&files).clone();
        let Known { kind, meta } = self.own[&target].clone();
        // A second entry for the target would make it another file, and an alias is not known to the layer.
        let is_entry = |change: &&Change| change.path() == target;
        let has_alias = |change: &Change| matches!(change, Change::Object { alias: Some(_), .. });
        let entries =
            self.changes.iter().filter(is_entry).map(|change| if has_alias(change) { 2 } else { 1 }).sum::<u32>();
        if let Some(meta) = meta
            && entries == 1
        {
            self.link(target, kind, meta, false);
        }
    }

    fn link(&mut self, target: Path, kind: Tag, meta: Meta, target_is_below: bool) {
        let path = join(&self.some_directory(), &some_name(self.random));
        if path == target || !self.put(&path, meta.clone(), Kind::Fifo, kind) {
            return;
        }
        self.changes.pop();
        self.changes.push(Change::Link { path, target: target.clone(), meta, target_is_below });
        if target_is_below {
            // That the target goes is fine: the link keeps it. Only what stands for it must not come from this layer.
            self.own.entry(target).or_insert(Known { kind: Tag::Other, meta: None });
        }
    }

    /// New attributes for a directory of the layers below.
    fn directory_again(&mut self) {
        if let Some((path, _)) = self.some_below(|known| known.kind == Tag::Directory) {
            let meta = some_meta(self.random, &Kind::Directory);
            self.put(&path, meta, Kind::Directory, Tag::Directory);
        }
    }

    /// An object whose parent is a symbolic link to a directory in a lower layer.
    fn through_a_link(&mut self) {
        let Some((link, Known { kind: Tag::Symlink(Some(directory)), .. })) =
            self.some_below(|known| matches!(known.kind, Tag::Symlink(Some(_))))
        else {
            return;
        };
        let name = some_name(self.random);
        let untouched = |path: &[u8]| {
            let entry = |path: &[u8]| self.own.contains_key(path);
            !entry(path) && !above(path).any(entry) && !self.hides(path) && !self.touches_inside(path)
        };
        let is_directory = self.below.get(&directory).is_some_and(|known| known.kind == Tag::Directory);
        if !is_directory || !untouched(&link) || !untouched(&directory) {
            return;
        }
        let (kind, meta) = (Kind::File(some_content(self.random)), some_meta(self.random, &Kind::Fifo));
        if self.put(&join(&directory, &name), meta, kind, Tag::File)
            && let Some(Change::Object { alias, .. }) = self.changes.last_mut()
        {
            *alias = Some(join(&link, &name));
            self.relied_on.extend([join(&directory, &name), link, directory]);
        }
    }

    /// Another entry before one that is there, which the later one replaces.
    fn duplicate(&mut self) {
        let is_link_or_target = |path: &Path| {
            self.changes.iter().any(|change| match change {
                Change::Link { path: link, target, .. } => link == path || target == path,
                _ => false,
            })
        };
        let objects: Vec<usize> = (0..self.changes.len())
            .filter(|number| match &self.changes[*number] {
                Change::Object { path, alias: None, .. } => !is_link_or_target(path) && self.own.contains_key(path),
                _ => false,
            })
            .collect();
        if objects.is_empty() {
            return;
        }
        let at = *self.random.choose(&objects);
        let (path, old_is_directory) = match &self.changes[at] {
            Change::Object { path, kind, .. } => (path.clone(), matches!(kind, Kind::Directory)),
            _ => return,
        };
        let kind = match self.some_kind() {
            (kind, Tag::File | Tag::Other) if !old_is_directory => kind,
            _ => Kind::Directory,
        };
        if matches!(kind, Kind::Directory) == old_is_directory {
            let meta = some_meta(self.random, &kind);
            self.changes.insert(at, Change::Object { path, alias: None, meta, kind });
        }
    }

    /// Whether something may be in the directory, whatever the order of the entries.
    fn can_enter(&self, directory: &[u8]) -> bool {
        let is_good = |path: &[u8]| {
            let own = self.own.get(path);
            let remade = own.is_some_and(|own| own.kind == Tag::Directory);
            let replaced = own.is_some_and(|own| own.kind != Tag::Directory);
            let below = self.below.get(path);
            let not_a_directory = below.is_some_and(|below| below.kind != Tag::Directory);
            let goes = below.is_some() && self.hides(path);
            !replaced && (remade || !not_a_directory && !goes && !self.whiteouts.contains(path))
        };
        directory.is_empty() || is_good(directory) && above(directory).all(is_good)
    }

    /// Whether a whiteout or an opaque directory takes away what the layers below have at `path`.
    fn hides(&self, path: &[u8]) -> bool {
        let marked = |path: &[u8]| self.opaque.contains(path) || self.whiteouts.contains(path);
        self.whiteouts.contains(path) || marked(b"") || above(path).any(marked)
    }

    /// Whether each directory of the layers below between `path` and what this layer has in it has an entry.
    fn passes_own_directories(&self, path: &[u8]) -> bool {
        let passes = |touched: &Path| {
            above(touched).take_while(|between| is_inside(between, path)).all(|between| {
                !self.below.contains_key(between) || self.own.get(between).is_some_and(|own| own.kind == Tag::Directory)
            })
        };
        self.touched().filter(|touched| is_inside(touched, path)).all(passes)
    }

    fn touches_inside(&self, path: &[u8]) -> bool {
        self.touched().any(|touched| is_inside(touched, path)) || self.opaque.contains(path)
    }

    fn touched(&self) -> impl Iterator<Item = &Path> {
        self.own.keys().chain(&self.whiteouts).chain(&self.opaque)
    }

    fn some_below(&mut self, wanted: impl Fn(&Known) -> bool) -> Option<(Path, Known)> {
        let found: Vec<_> = self.below.iter().filter(|(_, known)| wanted(known)).collect();
        if found.is_empty() {
            return None;
        }
        let (path, known) = *self.random.choose(&found);
        Some((path.clone(), known.clone()))
    }

    /// A directory of this layer or one below, or the root.
    fn some_directory(&mut self) -> Path {
        let all = self.own.iter().chain(self.below).filter(|(_, known)| known.kind == Tag::Directory);
        let mut directories: Vec<Path> = all.map(|(path, _)| path.clone()).collect();
        directories.push(Vec::new());
        self.random.choose(&directories).clone()
    }

    fn some_kind(&mut self) -> (Kind, Tag) {
        match self.random.below(16) {
            0..=7 => (Kind::File(some_content(self.random)), Tag::File),
            8..=11 => (Kind::Directory, Tag::Directory),
            12 => (Kind::Fifo, Tag::Other),
            13 => {
                let (major, minor) = *self.random.choose(&[(1, 3), (0, 1), (259, 0xf_ffff), (4095, 255), (5, 256)]);
                let block = self.random.once_in(2);
                (if block { Kind::BlockDevice(major, minor) } else { Kind::CharDevice(major, minor) }, Tag::Other)
            }
            _ => {
                let directory = self.some_directory();
                match self.random.below(4) {
                    0 => (Kind::Symlink(b"nowhere/at all".to_vec()), Tag::Symlink(None)),
                    1 => (Kind::Symlink(b"../long/".repeat(40)), Tag::Symlink(None)),
                    _ if directory.is_empty() => (Kind::Symlink(b"\xff\xfe".to_vec()), Tag::Symlink(None)),
                    _ => (Kind::Symlink([b"/", &directory[..]].concat()), Tag::Symlink(Some(directory))),
                }
            }
        }
    }

    /// The layer, and the tree with it.
    fn finish(self) -> (Layer, Tree) {
        let is_file =
            |path: &[u8]| self.own.get(path).is_some_and(|own| own.kind != Tag::Directory && own.meta.is_some());
        let gone = |path: &Path| self.hides(path) || above(path).any(is_file);
        let mut merged: Tree = self
            .below
            .iter()
            .filter(|(path, _)| !gone(path))
            .map(|(path, known)| (path.clone(), known.clone()))
            .collect();
        let named = self.own.iter().filter(|(_, own)| own.meta.is_some());
        for (path, own) in named {
            merged.insert(path.clone(), own.clone());
        }
        let paths: Vec<Path> = self.changes.iter().map(Change::path).collect();
        let mut implied = Vec::new();
        for path in paths.iter().flat_map(|path| above(path)) {
            if !merged.contains_key(path) {
                merged.insert(path.to_vec(), Known { kind: Tag::Directory, meta: None });
                implied.push(path.to_vec());
            }
        }
        (Layer { changes: self.changes, implied }, merged)
    }
}

fn some_name(random: &mut Random) -> Vec<u8> {
    const NAMES: [&[u8]; 24] = [
        b"a",
        b"b",
        b"c",
        b"d",
        b"e",
        b"usr",
        b"lib",
        b"bin",
        b"with space",
        b"new\nline",
        b"\xff\xfe\x80",
        "\u{fc}n\u{ef}".as_bytes(),
        b"back\\slash",
        b".hidden",
        b"..dots",
        b"-dash",
        b"!",
        b"a.b",
        b"wh.x",
        b"=",
        b"f1",
        b"f2",
        b"f3",
        b"f4",
    ];
    match random.below(24) {
        0 => vec![b'n'; 255],
        1 => [b"long-".repeat(12), vec![b'0' + u8::try_from(random.below(4)).unwrap()]].concat(),
        _ => random.choose(&NAMES).to_vec(),
    }
}

fn some_content(random: &mut Random) -> Vec<Run> {
    const CHUNK: usize = 256 << 10;
    let seed = Some(random.below(40) as u64);
    let lens = match random.below(20) {
        0 => vec![(CHUNK, seed)],
        1 => vec![(CHUNK + 1, seed)],
        2 => vec![(CHUNK - 1, seed), (1 + random.below(CHUNK), None)],
        3 => vec![(2 * CHUNK, None), (10, seed), (random.below(CHUNK), None)],
        4 => vec![(10, seed), (CHUNK * (1 + random.below(3)), None), (4096, Some(1)), (5, None), (7, Some(2))],
        5 => vec![(CHUNK, Some(100)), (CHUNK, Some(101)), (CHUNK, Some(100)), (random.below(5000), seed)],
        6 | 7 => vec![],
        8 => vec![(4096 * (1 + random.below(3)), seed)],
        _ => vec![(1 + random.below(9000), seed)],
    };
    lens.into_iter().filter(|(len, _)| *len > 0).map(|(len, seed)| Run { len, seed }).collect()
}

fn some_meta(random: &mut Random, kind: &Kind) -> Meta {
    let mode = *random.choose(&[0o644, 0o755, 0o600, 0o4755, 0o2711, 0o1777, 0, 0o7777, 0o444]);
    let ids = [0, 0, 0, 5, 1000, 65_534, 70_000, 2_097_152, 4_000_000_000];
    let mut xattrs = BTreeMap::new();
    let holds_user_xattrs = matches!(kind, Kind::File(_) | Kind::Directory);
    if holds_user_xattrs && random.once_in(4) {
        xattrs.insert("user.note".to_owned(), b"with\nnewline, NUL \0 and = sign".to_vec());
    }
    if holds_user_xattrs && random.once_in(12) {
        xattrs.insert(format!("user.{}", "x".repeat(200)), vec![b'v'; 1 + random.below(700)]);
        xattrs.insert("trusted.secret".to_owned(), vec![1, 2, 0, 255]);
    }
    if holds_user_xattrs && random.once_in(12) {
        let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
        let name = if matches!(kind, Kind::Directory) { "system.posix_acl_default" } else { "security.capability" };
        let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let value = if name.starts_with("system") { acl.to_vec() } else { capability.to_vec() };
        xattrs.insert(name.to_owned(), value);
    }
    Meta {
        mode: if matches!(kind, Kind::Symlink(_)) { 0o777 } else { mode },
        uid: *random.choose(&ids),
        gid: *random.choose(&ids),
        seconds: *random.choose(&[0, 1, 1_700_000_000, -1, -86_400 * 365 * 5, 0x1_0000_0001]),
        nanoseconds: *random.choose(&[0, 0, 1, 500_000_000, 999_999_999]),
        xattrs,
    }
}
