//! What archives mean, case by case.

use std::fmt::Write as _;

use ublkimg_image::{DeviceNumber, Kind, LowerLink, Meta, NodeId};

use super::{Layer, LayerBuilder, NAME_BYTES_TOTAL_MAX, OPAQUE_XATTR, for_each_path, read_tar};
use crate::chunk_size::ChunkSize;
use crate::error::Result;
use crate::frames::Compress;
use crate::spool::Spool;
use crate::tar::builder::{HeaderBuilder, TarBuilder};
use crate::{Error, ErrorKind};

fn read(tar: &TarBuilderBytes) -> Result<(Layer, Spool)> {
    let mut spool = Spool::new(&std::env::temp_dir(), ChunkSize::MAX, HOW)?;
    let layer = read_tar(tar.as_slice(), &mut spool)?;
    Ok((layer, spool))
}

const HOW: Compress = Compress { level: 1, threads: std::num::NonZeroUsize::MIN };

type TarBuilderBytes = Vec<u8>;

fn tar() -> TarBuilder {
    TarBuilder::default()
}

fn layer(tar: TarBuilder) -> Layer {
    read(&tar.finish()).unwrap().0
}

fn error(tar: TarBuilder) -> Error {
    read(&tar.finish()).map(|_| "no error").unwrap_err()
}

/// One word per object: path and type; `!` for a whiteout, `+` for an opaque directory, `?` for an implied one, `=N`
/// for the N-th object that has several names.
fn shape(layer: &Layer) -> String {
    let mut text = String::new();
    let mut names: Vec<(NodeId, usize)> = Vec::new();
    for_each_path(&layer.tree, |_, id, node| {
        if !matches!(node.kind, Kind::Directory(_)) {
            match names.iter_mut().find(|(seen, _)| *seen == id) {
                Some((_, count)) => *count += 1,
                None => names.push((id, 1)),
            }
        }
    });
    names.retain(|(_, count)| *count > 1);
    for_each_path(&layer.tree, |path, id, node| {
        if path.is_empty() {
            return;
        }
        let whiteout = node.kind == Kind::CharDevice(DeviceNumber::default())
            && !layer.record.plain_devices.iter().any(|plain| plain == path);
        let mark = match &node.kind {
            Kind::Directory(_) => "/",
            Kind::File(_) => "",
            Kind::Symlink(_) => "@",
            Kind::CharDevice(_) if whiteout => "!",
            Kind::CharDevice(_) => "c",
            Kind::BlockDevice(_) => "b",
            Kind::Fifo => "|",
            Kind::Socket => "s",
        };
        let opaque = if node.meta.xattrs.contains_key(OPAQUE_XATTR) { "+" } else { "" };
        let implied = if layer.record.implied_directories.iter().any(|implied| implied == path) { "?" } else { "" };
        let link = names.iter().position(|(linked, _)| *linked == id).map(|number| format!("={number}"));
        let separator = if text.is_empty() { "" } else { " " };
        let path = String::from_utf8_lossy(path);
        write!(text, "{separator}{path}{mark}{opaque}{implied}{}", link.unwrap_or_default()).unwrap();
    });
    text
}

fn content(layer: &Layer, spool: &Spool, path: &str) -> Vec<u8> {
    let id = layer.tree.lookup(path.as_bytes()).unwrap();
    let content = spool.content(layer.files[&id]);
    let mut bytes = vec![0; usize::try_from(content.size_bytes).unwrap()];
    for piece in &content.stored {
        let start = piece.piece as usize * crate::spool::PIECE_BYTES;
        let len = usize::try_from(content.piece_len_bytes(piece.piece)).unwrap();
        spool.read(&mut bytes[start..start + len], piece.at).unwrap();
    }
    bytes
}

#[test]
fn whiteouts_do_not_depend_on_order() {
    for tar in [
        tar().dir("a/", 0o755).file("a/.wh.gone", b"").file("a/stays", b"x"),
        tar().file("a/stays", b"x").file("a/.wh.gone", b"").dir("a/", 0o755),
    ] {
        assert_eq!(shape(&layer(tar)), "a/ a/gone! a/stays");
    }
    // A name that the layer itself has replaces the lower one: no whiteout.
    for tar in [tar().file(".wh.f", b"").file("f", b"x"), tar().file("f", b"x").file(".wh.f", b"")] {
        assert_eq!(shape(&layer(tar)), "f");
    }
    // But a directory must not show what was below it.
    for tar in [tar().file(".wh.d", b"").file("d/f", b""), tar().file("d/f", b"").file(".wh.d", b"")] {
        assert_eq!(shape(&layer(tar)), "d/+ d/f");
    }
}

#[test]
fn opaque_marks_do_not_depend_on_order() {
    for tar in [
        tar().dir("a/", 0o700).file("a/.wh..wh..opq", b"").file("a/f", b""),
        tar().file("a/f", b"").file("a/.wh..wh..opq", b"").dir("a/", 0o700),
    ] {
        assert_eq!(shape(&layer(tar)), "a/+ a/f");
    }
    assert_eq!(shape(&layer(tar().file("a/.wh..wh..opq", b""))), "a/+?");
    let root = layer(tar().file(".wh..wh..opq", b""));
    assert!(root.tree.node(NodeId::ROOT).meta.xattrs.contains_key(OPAQUE_XATTR));
}

#[test]
fn other_aufs_names_are_skipped_and_odd_whiteouts_refused() {
    let tar_with_aufs =
        tar().file(".wh..wh.aufs", b"").file(".wh..wh.plnk/1.2", b"x").file(".wh..wh.orph/", b"").file("f", b"");
    assert_eq!(shape(&layer(tar_with_aufs)), "f");
    for name in ["a/.wh.", ".wh..", ".wh...", ".wh.a/b"] {
        let error = error(tar().file(name, b""));
        assert_eq!(error.kind(), ErrorKind::BadSource, "{name}");
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn estargz_extras_are_dropped() {
    let tar =
        tar().file(".no.prefetch.landmark", b"x").file("stargz.index.json", b"{}").file("a/stargz.index.json", b"");
    assert_eq!(shape(&layer(tar)), "a/? a/stargz.index.json");
}

#[test]
fn the_last_entry_wins_and_directories_merge() {
    let (found, spool) = read(&tar().file("f", b"one").file("f", b"two").finish()).unwrap();
    assert_eq!(content(&found, &spool, "f"), b"two");
    let merged = layer(tar().dir("d/", 0o700).file("d/a", b"").dir("d", 0o711).file("d/b", b""));
    assert_eq!(shape(&merged), "d/ d/a d/b");
    assert_eq!(merged.tree.node(merged.tree.lookup(b"d").unwrap()).meta.mode, 0o711);
    assert_eq!(shape(&layer(tar().file("d/a", b"").file("d", b""))), "d");
    assert_eq!(shape(&layer(tar().file("d", b"").dir("d", 0o755).file("d/a", b""))), "d/ d/a");
    assert_eq!(shape(&layer(tar().symlink("d", "x").dir("d", 0o755).file("d/a", b""))), "d/ d/a");
}

#[test]
fn missing_parents_and_roots_are_implied() {
    let found = layer(tar().file("a/b/c", b""));
    assert_eq!(shape(&found), "a/? a/b/? a/b/c");
    assert_eq!(found.record.implied_directories, [&b""[..], b"a", b"a/b"]);
    let parent = found.tree.node(found.tree.lookup(b"a").unwrap());
    assert_eq!((parent.meta.mode, parent.meta.mtime.seconds), (0o755, 0));
    let found = layer(tar().entry(HeaderBuilder::new(b'5', "./").mode(0o750).owner(3, 4), b"").file("./a", b""));
    assert!(found.record.implied_directories.is_empty());
    let root = &found.tree.node(NodeId::ROOT).meta;
    assert_eq!((root.mode, root.uid, root.gid), (0o750, 3, 4));
}

#[test]
fn hard_links_to_earlier_and_later_entries() {
    assert_eq!(shape(&layer(tar().file("a", b"x").hard_link("b", "./a"))), "a=0 b=0");
    assert_eq!(shape(&layer(tar().hard_link("b", "/a").file("a", b"x"))), "a=0 b=0");
    assert_eq!(shape(&layer(tar().hard_link("c", "b").hard_link("b", "a").file("a", b"x"))), "a=0 b=0 c=0");
    assert_eq!(shape(&layer(tar().symlink("a", "x").hard_link("b", "a"))), "a@=0 b@=0");
    // Replacing one name leaves the other alone.
    let (found, spool) = read(&tar().file("a", b"1").hard_link("b", "a").file("a", b"2").finish()).unwrap();
    assert_eq!(shape(&found), "a b");
    assert_eq!((content(&found, &spool, "a"), content(&found, &spool, "b")), (b"2".to_vec(), b"1".to_vec()));
    // A later entry at the place of a waiting link wins.
    assert_eq!(shape(&layer(tar().hard_link("b", "a").file("b", b"x").file("a", b""))), "a b");
    // The size field of a link means nothing.
    let odd = tar().file("a", b"x").entry(HeaderBuilder::new(b'1', "b").link("a").size(1), b"").file("c", b"");
    assert_eq!(shape(&layer(odd)), "a=0 b=0 c");
}

#[test]
fn hard_links_into_lower_layers_go_to_the_record() {
    let link = |path: &str, target: &str| LowerLink { path: path.into(), target: target.into() };
    let found = layer(tar().hard_link("d/b", "/usr/a").hard_link("c", "d/b"));
    assert_eq!(shape(&found), "d/?");
    assert_eq!(found.record.lower_links, [link("c", "usr/a"), link("d/b", "usr/a")]);
    // A chain that comes the other way round, and a cycle, which the merge will refuse.
    let found = layer(tar().hard_link("c", "b").hard_link("b", "a"));
    assert_eq!(found.record.lower_links, [link("b", "a"), link("c", "a")]);
    let found = layer(tar().hard_link("a", "b").hard_link("b", "a"));
    assert_eq!(found.record.lower_links.len(), 2);
    // The directory of the link was replaced.
    let found = layer(tar().hard_link("d/b", "a").file("d", b""));
    assert_eq!((shape(&found).as_str(), found.record.lower_links.len()), ("d", 0));
}

#[test]
fn hard_links_to_directories_are_refused() {
    for tar in [
        tar().dir("d", 0o755).hard_link("b", "d"),
        tar().hard_link("b", "d").dir("d", 0o755),
        tar().hard_link("b", "/"),
    ] {
        assert_eq!(error(tar).kind(), ErrorKind::BadSource);
    }
}

#[test]
fn parents_that_are_links_are_resolved_inside() {
    assert_eq!(
        shape(&layer(tar().dir("usr/lib", 0o755).symlink("lib", "usr/lib").file("lib/f", b""))),
        "lib@ usr/? usr/lib/ usr/lib/f"
    );
    assert_eq!(shape(&layer(tar().symlink("a/l", "../../../b").file("a/l/f", b""))), "a/? a/l@ b/? b/f");
    assert_eq!(shape(&layer(tar().symlink("l", "/b/./c").file("l/f", b""))), "b/? b/c/? b/c/f l@");
    let loops = error(tar().symlink("a", "b").symlink("b", "a").file("a/f", b""));
    assert!(loops.to_string().contains("a/f"), "{loops}");
    let file = error(tar().file("a", b"").file("a/f", b""));
    assert_eq!(file.kind(), ErrorKind::BadSource);
}

#[test]
fn escapes_are_refused_by_name() {
    for path in ["../evil", "a/../../evil", ".."] {
        let error = error(tar().file(path, b"x"));
        assert_eq!(error.kind(), ErrorKind::BadSource);
        assert!(error.to_string().contains(path), "{error}");
    }
    assert_eq!(error(tar().hard_link("a", "../evil")).kind(), ErrorKind::BadSource);
    assert_eq!(shape(&layer(tar().file("/abs", b""))), "abs");
}

#[test]
fn devices_fifos_and_symlinks() {
    let device = |kind, path, major, minor| HeaderBuilder::new(kind, path).device(major, minor);
    let found = layer(
        tar()
            .entry(device(b'3', "c", 5, 1), b"")
            .entry(device(b'4', "b", 259, 0xf_ffff), b"")
            .entry(device(b'3', "zero", 0, 0), b"")
            .entry(HeaderBuilder::new(b'6', "p"), b"")
            .symlink("s", "target"),
    );
    assert_eq!(shape(&found), "bb cc p| s@ zeroc");
    assert_eq!(found.record.plain_devices, [b"zero"]);
    let kind = |path: &[u8]| found.tree.node(found.tree.lookup(path).unwrap()).kind.clone();
    assert_eq!(kind(b"b"), Kind::BlockDevice(DeviceNumber { major: 259, minor: 0xf_ffff }));
    assert_eq!(error(tar().entry(device(b'3', "c", 4096, 0), b"")).kind(), ErrorKind::BadSource);
    assert_eq!(error(tar().symlink("s", "")).kind(), ErrorKind::BadSource);
}

#[test]
fn xattrs_are_kept_or_dropped_by_namespace() {
    let found = layer(
        tar()
            .pax(&[
                ("SCHILY.xattr.user.raw", b"\0\n="),
                ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
                ("SCHILY.xattr.security.selinux", b"label"),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
                ("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0"),
                ("SCHILY.xattr.com.apple.x", b"1"),
                ("LIBARCHIVE.xattr.user.%62", b"dmFsdWU"),
            ])
            .dir("d", 0o755),
    );
    let names: Vec<String> = found
        .tree
        .node(found.tree.lookup(b"d").unwrap())
        .meta
        .xattrs
        .keys()
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    assert_eq!(names, ["security.capability", "system.posix_acl_access", "user.b", "user.raw"]);
}

#[test]
fn long_paths_and_names_have_limits() {
    assert_eq!(error(tar().pax(&[("path", &[b'a'; 300])]).file("x", b"")).kind(), ErrorKind::BadSource);
    // The longest name there is can be deleted.
    let name = "n".repeat(255);
    let whiteout = |name: &str| tar().pax(&[("path", format!("d/.wh.{name}").as_bytes())]).file("x", b"");
    assert_eq!(shape(&layer(whiteout(&name))), format!("d/? d/{name}!"));
    assert_eq!(error(whiteout(&format!("{name}n"))).kind(), ErrorKind::BadSource);
    assert_eq!(error(tar().pax(&[("linkpath", &[b'a'; 4096])]).symlink("x", "y")).kind(), ErrorKind::BadSource);
    // Links that lead ever deeper end somewhere.
    let deep = "x/".repeat(2000);
    let mut archive = tar();
    for path in ["l", "l/l", "l/l/l"] {
        archive = archive.pax(&[("linkpath", deep.as_bytes())]).symlink(path, "y");
    }
    let archive = archive.file("l/l/l/f", b"");
    assert_eq!(error(archive).kind(), ErrorKind::BadSource);
}

/// A link makes each path below it as long as its target: what the record says of them is memory too.
#[test]
fn paths_that_links_make_long_are_counted() {
    let deep = "deep/".repeat(500).into_bytes();
    for hard_links in [false, true] {
        let mut builder = LayerBuilder::new();
        builder.add_leaf(&[b"l"], Meta::default(), Kind::Symlink(deep.clone())).unwrap();
        builder.add_directory(&vec![b"deep".as_slice(); 500], Meta::default()).unwrap();
        for number in 0..100 {
            let name = format!("{number}");
            let names = [b"l".as_slice(), name.as_bytes(), b"f"];
            if hard_links {
                builder.add_hard_link(&names, b"below").unwrap();
            } else {
                builder.directory(&names).unwrap();
            }
        }
        builder.name_bytes = NAME_BYTES_TOTAL_MAX - 100_000;
        let spool = Spool::new(&std::env::temp_dir(), ChunkSize::MAX, HOW).unwrap();
        assert_eq!(builder.finish(&spool).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
