//! A layer from a tar archive.

use std::collections::BTreeMap;
use std::io::Read;

use ublkimg_image::{FileData, Kind, Meta};

use super::{Layer, LayerBuilder};
use crate::error::{Error, Result};
use crate::path::{WHITEOUT_PREFIX, components, show};
use crate::spool::Spool;
use crate::tar::{Entry, EntryKind, Piece, TarReader};

/// What an entry does, by its name.
pub(crate) enum Role<'a> {
    /// It is a file, directory or other object.
    Object,
    /// It deletes this name from the layers below.
    Whiteout(&'a [u8]),
    /// It hides what the layers below have in its directory.
    Opaque,
    /// It means nothing to us.
    Ignored,
}

/// Reads a layer; contents of files go into `spool`. `input` is read to its end.
///
/// # Errors
/// `BadSource` or `Unsupported` naming the entry; those of `input` and `spool`.
pub(crate) fn read_tar(input: impl Read, spool: &mut Spool) -> Result<Layer> {
    let mut builder = LayerBuilder::new();
    let mut reader = TarReader::new(input);
    while let Some(entry) = reader.next_entry()? {
        let path = entry.path.clone();
        add_entry(&mut builder, entry, &mut reader, spool).map_err(|error| name_entry(error, &path))?;
    }
    reader.drain()?;
    spool.settle()?;
    builder.finish(spool)
}

/// Puts the entry's name in front of the message unless it is there.
fn name_entry(error: Error, path: &[u8]) -> Error {
    let name = show(path);
    if error.to_string().contains(&name) { error } else { error.within(format_args!("entry {name}")) }
}

fn add_entry(
    builder: &mut LayerBuilder,
    entry: Entry,
    reader: &mut TarReader<impl Read>,
    spool: &mut Spool,
) -> Result<()> {
    let names = components(&entry.path)?;
    builder
        .charge(entry.path.len() + entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>())?;
    match role(&names)? {
        Role::Ignored => return Ok(()),
        Role::Opaque => return builder.add_opaque(&names[..names.len() - 1]),
        Role::Whiteout(name) => return builder.add_whiteout(&names[..names.len() - 1], name),
        Role::Object => {}
    }
    let meta = Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        xattrs: keep_xattrs(entry.xattrs),
    };
    match entry.kind {
        EntryKind::Directory => builder.add_directory(&names, meta),
        EntryKind::HardLink(target) => {
            builder.charge(target.len())?;
            builder.add_hard_link(&names, &target)
        }
        EntryKind::File { size_bytes } => {
            let mut content = spool.write();
            reader.read_content(|piece| match piece {
                Piece::Data(bytes) => content.data(bytes),
                Piece::Zeros(len_bytes) => content.zeros(len_bytes),
            })?;
            let content = content.finish()?;
            let kind = Kind::File(FileData { size_bytes, ..FileData::EMPTY });
            let node = builder.add_leaf(&names, meta, kind)?;
            builder.files.insert(node, content);
            Ok(())
        }
        EntryKind::Symlink(target) => {
            builder.charge(target.len())?;
            builder.add_leaf(&names, meta, Kind::Symlink(target)).map(drop)
        }
        EntryKind::CharDevice(number) => builder.add_leaf(&names, meta, Kind::CharDevice(number)).map(drop),
        EntryKind::BlockDevice(number) => builder.add_leaf(&names, meta, Kind::BlockDevice(number)).map(drop),
        EntryKind::Fifo => builder.add_leaf(&names, meta, Kind::Fifo).map(drop),
    }
}

/// Source: OCI image-spec, layer.md, "Whiteouts"; aufs's other `.wh..wh.` names; eStargz's table of contents and
/// landmarks (containerd/stargz-snapshotter, docs/estargz.md), which lie at the root.
pub(crate) fn role<'a>(names: &[&'a [u8]]) -> Result<Role<'a>> {
    let Some((name, parents)) = names.split_last() else { return Ok(Role::Object) };
    if parents.is_empty() && matches!(*name, b"stargz.index.json" | b".prefetch.landmark" | b".no.prefetch.landmark") {
        return Ok(Role::Ignored);
    }
    if parents.iter().any(|parent| parent.starts_with(b".wh..wh.")) {
        return Ok(Role::Ignored);
    }
    if parents.iter().any(|parent| parent.starts_with(WHITEOUT_PREFIX)) {
        return Err(Error::bad_source("an entry below a whiteout"));
    }
    match name.strip_prefix(WHITEOUT_PREFIX) {
        None => Ok(Role::Object),
        Some(b".wh..opq") => Ok(Role::Opaque),
        Some(other) if other.starts_with(WHITEOUT_PREFIX) => Ok(Role::Ignored),
        Some(b"" | b"." | b"..") => Err(Error::bad_source("a whiteout of nothing")),
        Some(name) => Ok(Role::Whiteout(name)),
    }
}

/// Drops attributes that have no place in an image: overlayfs' own, which would act up in a union mount; SELinux
/// labels, which belong to the host's policy; and namespaces that Linux file systems do not store.
pub(crate) fn keep_xattrs(mut xattrs: BTreeMap<Vec<u8>, Vec<u8>>) -> BTreeMap<Vec<u8>, Vec<u8>> {
    xattrs.retain(|name, _| {
        let foreign = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
        let acl = matches!(name.as_slice(), b"system.posix_acl_access" | b"system.posix_acl_default");
        let stored = [&b"user."[..], b"trusted.", b"security."].iter().any(|prefix| name.starts_with(prefix));
        !foreign && name != b"security.selinux" && (acl || stored)
    });
    xattrs
}
