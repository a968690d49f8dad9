//! What others make of our images: erofs-utils, and the kernel when it lets us mount.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use support::compare::compare;
use support::fixture::Fixture;
use support::host::{Mount, no_mount, no_tool, run};
use support::{SPACE_BLOCKS, Spaces, tree};
use ublkimg_image::{
    BLOCK_SIZE, DeviceMap, DeviceSlot, Kind, Sha256, Space, Tree, flat_block0, write_layer, write_merged,
};

const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;

fn skip(reason: &str) {
    eprintln!("SKIP: {reason}");
}

fn blocks(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len() / BLOCK_SIZE).unwrap()
}

fn write_file(path: PathBuf, parts: &[&[u8]]) -> PathBuf {
    let mut file = File::create(&path).unwrap();
    parts.iter().for_each(|part| file.write_all(part).unwrap());
    path
}

/// A complete layer image in a file.
fn layer_image(directory: &Path) -> (Fixture, PathBuf) {
    let fixture = Fixture::new(&[Space::Own], 0);
    let metadata = write_layer(&fixture.tree, blocks(&fixture.data[0])).unwrap();
    let path = write_file(directory.join("layer.erofs"), &[&metadata, &fixture.data[0]]);
    (fixture, path)
}

/// Blobs with some blocks of layer metadata in front, and the merged metadata.
fn merged_image(blobs: u16) -> (Fixture, Vec<u8>) {
    let spaces: Vec<_> = (0..blobs).map(Space::Device).collect();
    let fixture = Fixture::new(&spaces, 5);
    let slot = |data: &Vec<u8>| DeviceSlot { blocks: blocks(data), tag: Sha256::of(data) };
    let slots: Vec<_> = fixture.data.iter().map(slot).collect();
    let metadata = write_merged(&fixture.tree, &slots).unwrap();
    (fixture, metadata)
}

/// A merged image as a device serves it.
fn flat_image(directory: &Path) -> (Fixture, PathBuf) {
    let (fixture, mut metadata) = merged_image(2);
    let lengths: Vec<_> = fixture.data.iter().map(|data| blocks(data)).collect();
    let map = DeviceMap::new(blocks(&metadata), &lengths).unwrap();
    let block0 = flat_block0(metadata.first_chunk().unwrap(), map.total_blocks()).unwrap();
    metadata[..BLOCK_SIZE].copy_from_slice(&block0);
    let path = write_file(directory.join("flat.erofs"), &[&metadata, &fixture.data[0], &fixture.data[1]]);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(u64::from(map.total_blocks()) * BLOCK_BYTES).unwrap();
    (fixture, path)
}

/// A layer image of a random tree; all of its data are zeros.
fn random_image(directory: &Path, tree: &Tree) -> PathBuf {
    let metadata = write_layer(tree, SPACE_BLOCKS).unwrap();
    let path = write_file(directory.join("random.erofs"), &[&metadata]);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(metadata.len() as u64 + u64::from(SPACE_BLOCKS) * BLOCK_BYTES).unwrap();
    path
}

fn random_trees(count: usize) -> Vec<Tree> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| tree(Spaces::Own, 100).new_tree(&mut runner).unwrap().current()).collect()
}

#[test]
fn fsck_finds_images_clean() {
    if no_tool("fsck.erofs") {
        return skip("fsck.erofs (erofs-utils) is not installed");
    }
    let directory = tempfile::tempdir().unwrap();
    run("fsck.erofs", &[layer_image(directory.path()).1]);
    run("fsck.erofs", &[flat_image(directory.path()).1]);
    for tree in random_trees(20) {
        run("fsck.erofs", &[random_image(directory.path(), &tree)]);
    }
}

#[test]
fn dump_counts_the_inodes() {
    if no_tool("dump.erofs") {
        return skip("dump.erofs (erofs-utils) is not installed");
    }
    let directory = tempfile::tempdir().unwrap();
    let (fixture, path) = layer_image(directory.path());
    let text = run("dump.erofs", &[Path::new("-s"), &path]);
    let line = text.lines().find(|line| line.starts_with("Filesystem inode count:")).unwrap();
    assert_eq!(line.split_whitespace().last(), Some(&*fixture.tree.len().to_string()));
}

#[test]
fn kernel_reads_a_layer_image() {
    if let Some(reason) = no_mount() {
        return skip(reason);
    }
    let directory = tempfile::tempdir().unwrap();
    let (fixture, path) = layer_image(directory.path());
    let mount = Mount::new(&directory.path().join("mnt"), &path, &[]);
    let count = compare(&fixture.tree, &mount.path, &|file| fixture.content(file));
    assert!(count > 3200, "{count} paths");
}

fn check_merged_image_with_devices(blobs: u16) {
    if let Some(reason) = no_mount() {
        return skip(reason);
    }
    let directory = tempfile::tempdir().unwrap();
    let (fixture, metadata) = merged_image(blobs);
    let image = write_file(directory.path().join("merged.erofs"), &[&metadata]);
    let write_blob =
        |(number, data): (usize, &Vec<u8>)| write_file(directory.path().join(format!("blob{number}")), &[data]);
    let blobs: Vec<_> = fixture.data.iter().enumerate().map(write_blob).collect();
    let mount = Mount::new(&directory.path().join("mnt"), &image, &blobs);
    compare(&fixture.tree, &mount.path, &|file| fixture.content(file));
}

/// The stored form: metadata with its device table, one block device per blob.
#[test]
fn kernel_reads_a_merged_image_with_devices() {
    check_merged_image_with_devices(2);
}

#[test]
fn kernel_reads_a_device_table_longer_than_block_0() {
    check_merged_image_with_devices(25);
}

/// The served form: one flat device.
#[test]
fn kernel_reads_a_flat_image() {
    if let Some(reason) = no_mount() {
        return skip(reason);
    }
    let directory = tempfile::tempdir().unwrap();
    let (fixture, path) = flat_image(directory.path());
    let mount = Mount::new(&directory.path().join("mnt"), &path, &[]);
    compare(&fixture.tree, &mount.path, &|file| fixture.content(file));
}

#[test]
fn kernel_reads_random_images() {
    if let Some(reason) = no_mount() {
        return skip(reason);
    }
    for mut tree in random_trees(10) {
        let ids: Vec<_> = tree.iter().map(|(id, _)| id).collect();
        for id in ids {
            let node = tree.node_mut(id);
            // The kernel parses ACLs (random bytes are none), and allows user.* on files and directories only.
            let may_have_user = matches!(node.kind, Kind::Directory(_) | Kind::File(_));
            node.meta
                .xattrs
                .retain(|name, _| !name.starts_with(b"system.") && (may_have_user || !name.starts_with(b"user.")));
        }
        let directory = tempfile::tempdir().unwrap();
        let path = random_image(directory.path(), &tree);
        let mount = Mount::new(&directory.path().join("mnt"), &path, &[]);
        compare(&tree, &mount.path, &|file| vec![0; usize::try_from(file.size_bytes).unwrap()]);
    }
}

/// Images of mkfs.erofs that use no more than ours do are read; the others are refused, not misread.
#[test]
fn mkfs_images_are_read_or_refused() {
    if no_tool("mkfs.erofs") {
        return skip("mkfs.erofs (erofs-utils) is not installed");
    }
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("a/empty"), b"").unwrap();
    std::os::unix::fs::symlink("../target", source.join("a/link")).unwrap();
    fs::hard_link(source.join("a/empty"), source.join("a/b/again")).unwrap();
    for number in 0..500 {
        fs::create_dir(source.join(format!("a/b/{number}"))).unwrap();
    }
    let image = directory.path().join("image");
    let make = |format: &str| {
        run("mkfs.erofs", &[Path::new(format), Path::new("-x-1"), &image, &source]);
        ublkimg_image::read_tree(&fs::read(&image).unwrap())
    };
    let (tree, _) = make("-Eforce-inode-extended").unwrap();
    assert_eq!(tree.len(), 1 + 2 + 500 + 2);
    assert_eq!(tree.lookup(b"a/empty"), tree.lookup(b"a/b/again"));
    let link = tree.lookup(b"a/link").unwrap();
    assert_eq!(tree.node(link).kind, Kind::Symlink(b"../target".to_vec()));
    let kind = make("-Eforce-inode-compact").unwrap_err().kind();
    assert_eq!(kind, ublkimg_image::ErrorKind::Unsupported);
}
