//! Images to convert, made with the system's tools, and the tools to check what comes out.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use sha2::Digest as _;
use ublkimg_registry::{BlobSource, Digest};

use crate::repository;

/// A layer as it is stored, and as it is unpacked.
pub(crate) struct StoredLayer {
    pub(crate) media_type: &'static str,
    pub(crate) stored: Vec<u8>,
    pub(crate) tar: PathBuf,
}

pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a program that must succeed; returns what it prints.
pub(crate) fn command(program: &str, arguments: &[&str], dir: &Path) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    output.stdout
}

/// Checks an image with erofs-utils, if they are installed.
pub(crate) fn fsck(image: &Path) {
    match Command::new("fsck.erofs").arg(image).output() {
        Ok(output) => assert!(
            output.status.success(),
            "fsck.erofs: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => println!("SKIP: fsck.erofs: {error}"),
    }
}

/// Mounts an image through a loop device for as long as `look` takes.
pub(crate) fn with_mount(image: &Path, look: impl FnOnce(&Path)) {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap();
    if !filesystems.lines().any(|line| line.ends_with("\terofs")) {
        println!("SKIP: this kernel has no EROFS (modprobe erofs)");
        return;
    }
    let mount_point = tempfile::tempdir().unwrap();
    let path = mount_point.path().to_owned();
    command(
        "mount",
        &["-t", "erofs", "-o", "ro,loop", image.to_str().unwrap(), path.to_str().unwrap()],
        Path::new("/"),
    );
    let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(&path)));
    command("umount", &[mount_point.path().to_str().unwrap()], Path::new("/"));
    looked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Bytes that do not compress to nothing, different for each seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&(state & 0x0f0f_ffff_ffff_ffff).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn touch(path: &Path, when: &str) {
    command("touch", &["-h", "-d", when, path.to_str().unwrap()], Path::new("/"));
}

/// A tree with one of everything, at `root`.
pub(crate) fn base_tree(root: &Path) {
    for number in 0..300_u64 {
        let len = usize::try_from(number * number % 20_000).unwrap();
        write(&root.join(format!("usr/share/small/{}/{number}", number % 7)), &noise(number, len));
    }
    for number in 0..1500 {
        write(&root.join(format!("usr/share/many/!{number}-{}", "x".repeat(number % 40))), b"");
    }
    write(&root.join("usr/lib/large"), &noise(1000, 1_300_000));
    write(&root.join("usr/lib/exact"), &noise(1001, 262_144));
    write(&root.join("usr/lib/copy-of-large"), &noise(1000, 1_300_000));
    write(&root.join("usr/lib/zeros"), &vec![0; 700_000]);
    let sparse = File::create(root.join("usr/lib/sparse")).unwrap();
    sparse.set_len(3_000_000).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &noise(5, 5000), 1_000_000).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", 2_999_997).unwrap();
    write(&root.join("etc/passwd"), b"root:x:0:0\n");
    fs::hard_link(root.join("etc/passwd"), root.join("etc/passwd-")).unwrap();
    fs::hard_link(root.join("etc/passwd"), root.join("usr/link-to-passwd")).unwrap();
    symlink("usr/lib", root.join("lib")).unwrap();
    symlink("x/".repeat(150), root.join("long-link")).unwrap();
    write(&root.join(OsStr::from_bytes(b"etc/not-utf8-\xff\xfe")), b"1");
    write(&root.join(format!("etc/{}", "n".repeat(255))), b"2");
    write(&root.join(format!("deep/{}/file", "d/".repeat(150))), b"3");
    fs::create_dir_all(root.join("tmp")).unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    write(&root.join("usr/bin/su"), b"su");
    fs::set_permissions(root.join("usr/bin/su"), fs::Permissions::from_mode(0o4755)).unwrap();
    chown(root.join("etc/not-there"), None, None).unwrap_err();
    write(&root.join("home/user/file"), b"mine");
    chown(root.join("home/user"), Some(70_000), Some(4_000_000_000)).unwrap();
    chown(root.join("home/user/file"), Some(70_000), Some(70_001)).unwrap();
    fs::create_dir_all(root.join("dev")).unwrap();
    command("mknod", &["dev/null", "c", "1", "3"], root);
    command("mknod", &["dev/loop", "b", "259", "300000"], root);
    command("mknod", &["dev/zero-zero", "c", "0", "0"], root);
    command("mkfifo", &["dev/pipe"], root);
    for (path, name, value) in [
        ("usr/bin/su", "security.capability", &b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..]),
        ("home/user", "user.note", b"with\nnewline"),
        ("home/user/file", "user.empty", b""),
        ("home/user/file", "trusted.secret", b"\x01\x02"),
    ] {
        xattr::set(root.join(path), name, value).unwrap();
    }
    touch(&root.join("etc/passwd"), "1969-12-31 23:59:58.75 UTC");
    touch(&root.join("usr/lib/large"), "2024-05-06 07:08:09.123456789 UTC");
    touch(&root.join("lib"), "2001-01-01 00:00:00.5 UTC");
    touch(&root.join("usr"), "2002-02-02 00:00:00.000000001 UTC");
}

/// Packs `names` below `root`, parents first, with everything that tar can say.
fn pack(root: &Path, tar: &Path, options: &[&str]) {
    let fixed =
        ["--xattrs", "--xattrs-include=*", "--numeric-owner", "--sort=name", "-S", "-cf", tar.to_str().unwrap()];
    command("tar", &[options, &fixed, &["."]].concat(), root);
}

/// A base layer, a layer that changes and deletes, and one with a hard link into the base.
pub(crate) fn three_layers(dir: &Path) -> Vec<StoredLayer> {
    let base = dir.join("base");
    base_tree(&base);
    let tar = dir.join("1.tar");
    pack(&base, &tar, &["--format=pax"]);
    let bytes = fs::read(&tar).unwrap();
    // Two gzip members, cut in the middle of a header block.
    let (first, second) = bytes.split_at(bytes.len() / 2 + 100);
    let first_layer = StoredLayer { media_type: TAR_GZIP, stored: [gzip(first), gzip(second)].concat(), tar };

    let change = dir.join("change");
    write(&change.join("usr/lib/large"), &noise(2000, 1_200_000));
    write(&change.join("usr/share/small/3/10"), b"changed");
    write(&change.join("usr/share/small/.wh.5"), b"");
    write(&change.join("etc/.wh.passwd-"), b"");
    write(&change.join("deep/.wh..wh..opq"), b"");
    write(&change.join("deep/new"), b"new");
    write(&change.join("lib"), b"now a file");
    fs::create_dir_all(change.join("long-link/now-a-directory")).unwrap();
    write(&change.join("dev/null"), b"now a file");
    write(&change.join("new/.wh.nothing"), b"");
    let tar = dir.join("2.tar");
    pack(&change, &tar, &["--format=gnu"]);
    let bytes = fs::read(&tar).unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 3);
    let frame = |data: &[u8]| zstd::bulk::compress(data, 1).unwrap();
    let second_layer = StoredLayer { media_type: TAR_ZSTD, stored: [frame(first), frame(second)].concat(), tar };

    let link = dir.join("link");
    write(&link.join("etc/passwd"), b"only to have a link to it");
    fs::hard_link(link.join("etc/passwd"), link.join("etc/shadow")).unwrap();
    write(&link.join("opt/file"), b"opt");
    let tar = dir.join("3.tar");
    pack(&link, &tar, &["--format=gnu"]);
    command("tar", &["--delete", "-f", tar.to_str().unwrap(), "./etc/passwd"], dir);
    let third_layer = StoredLayer { media_type: TAR, stored: fs::read(&tar).unwrap(), tar };
    vec![first_layer, second_layer, third_layer]
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// The tree that the layers make, by the means of `tar` and `rm`.
pub(crate) fn apply_layers(dir: &Path, layers: &[StoredLayer]) -> PathBuf {
    let root = dir.join("applied");
    fs::create_dir(&root).unwrap();
    for layer in layers {
        let tar = layer.tar.to_str().unwrap();
        for name in command("tar", &["-tf", tar], dir).split(|byte| *byte == b'\n') {
            let path = root.join(OsStr::from_bytes(name));
            let Some(name) = path.file_name().map(|name| name.as_bytes().to_vec()) else { continue };
            if name == b".wh..wh..opq" {
                let directory = path.parent().unwrap();
                fs::remove_dir_all(directory).unwrap();
                fs::create_dir(directory).unwrap();
            } else if let Some(name) = name.strip_prefix(b".wh.") {
                remove(&path.with_file_name(OsStr::from_bytes(name)));
            }
        }
        let options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-p", "--exclude=.wh.*", "-xf", tar];
        command("tar", &options, &root);
    }
    root
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// A config for layers with these digests.
pub(crate) fn config(diff_ids: &[String]) -> Vec<u8> {
    let architecture = ublkimg_registry::descriptor::Platform::host().architecture;
    json!({
        "architecture": architecture,
        "os": "linux",
        "created": "2024-01-01T00:00:00Z",
        "config": { "Cmd": ["/bin/sh"], "Env": ["A=b"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": diff_ids.iter().map(|_| json!({ "created_by": "test" })).collect::<Vec<_>>(),
    })
    .to_string()
    .into_bytes()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Digest(sha2::Sha256::digest(bytes).into()).to_string()
}

/// Puts an ordinary image with these layers at `location`.
pub(crate) async fn push_image(location: &str, layers: &[StoredLayer]) {
    let diff_ids: Vec<String> = layers.iter().map(|layer| sha256(&fs::read(&layer.tar).unwrap())).collect();
    let stored: Vec<(&str, Vec<u8>)> = layers.iter().map(|layer| (layer.media_type, layer.stored.clone())).collect();
    push_layers(location, &stored, &config(&diff_ids)).await;
}

/// Puts an image with these layer blobs and this config at `location`.
pub(crate) async fn push_layers(location: &str, layers: &[(&str, Vec<u8>)], config: &[u8]) {
    let mut descriptors = Vec::new();
    for (media_type, stored) in layers {
        let (digest, size) = push_blob(location, stored).await;
        descriptors.push(json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size }));
    }
    push_manifest(location, &descriptors, config).await;
}

async fn push_blob(location: &str, bytes: &[u8]) -> (Digest, u64) {
    let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
    let source = BlobSource::Bytes(bytes.to_vec().into());
    repository(location).await.push_blob(&digest, size, source, None).await.unwrap();
    (digest, size)
}

/// Puts an image with these layers, which need not be there, and this config at `location`.
pub(crate) async fn push_manifest(location: &str, layers: &[serde_json::Value], config: &[u8]) {
    let (digest, size) = push_blob(location, config).await;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest.to_string(),
            "size": size,
        },
        "layers": layers,
    });
    let repository = repository(location).await;
    let location: ublkimg_registry::Location = location.parse().unwrap();
    let bytes = manifest.to_string().into_bytes().into();
    repository.push_manifest("application/vnd.oci.image.manifest.v1+json", bytes, location.tag()).await.unwrap();
}
