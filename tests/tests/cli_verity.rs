//! `convert --verity`: the tree is the one that the kernel's documentation describes, over the device as it is served.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use ublkimg_tests::command::ublkimg;
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::temp_root::TempRoot;

const BLOCK: usize = 4096;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn blob(layout: &Path, digest: &Value) -> std::path::PathBuf {
    layout.join("blobs/sha256").join(digest.as_str().unwrap().strip_prefix("sha256:").unwrap())
}

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// Level by level, the top first; and the digest of that.
fn tree_over(device: &[u8], salt: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let digest = |block: &[u8]| Sha256::new().chain_update(salt).chain_update(block).finalize().to_vec();
    let (mut tree, mut below) = (Vec::new(), device.to_vec());
    loop {
        let mut level: Vec<u8> = below.chunks(BLOCK).flat_map(digest).collect();
        level.resize(level.len().next_multiple_of(BLOCK), 0);
        tree.splice(0..0, level.iter().copied());
        if level.len() == BLOCK {
            return (tree, digest(&level));
        }
        below = level;
    }
}

#[test]
fn the_tree_is_that_of_the_device_and_the_same_each_time() {
    let root = TempRoot::new().unwrap();
    SampleImage::default().write_layout(&root.join("source"), "v1").unwrap();
    let source = format!("oci:{}:v1", root.join("source").display());
    let convert = |name: &str, more: &[&str]| {
        let destination = format!("oci:{}:v1", root.join(name).display());
        let converted = ublkimg(root.path()).args(["convert", &source, &destination]).args(more).run().success();
        (destination, converted.stdout.trim().rsplit('@').next().unwrap().to_owned())
    };
    let (image, digest) = convert("one", &["--verity"]);
    assert_eq!(convert("two", &["--verity", "--threads", "1", "--no-cache"]).1, digest, "same in, same out");
    ublkimg(root.path()).args(["check", &image]).run().success();
    let inspected = ublkimg(root.path()).args(["inspect", "--json", &image]).run().success().stdout;
    ublkimg(root.path()).args(["check", &image, "--source", &source]).run().success();

    let layout = root.join("one");
    let index = json(&blob(&layout, &json(&layout.join("index.json"))["manifests"][0]["digest"]));
    let manifest = json(&blob(&layout, &index["manifests"][0]["digest"]));
    let layers = manifest["layers"].as_array().unwrap();
    let [.., stored, metadata] = &layers[..] else { panic!("{layers:?}") };
    assert_eq!(stored["mediaType"], "application/vnd.erofs+zstd", "others need not know another type");
    assert_eq!(stored["annotations"]["org.erofs.role"], "device");
    let flat = root.join("flat");
    ublkimg(root.path()).args(["export", &image, flat.to_str().unwrap()]).run().success();
    let device = std::fs::read(&flat).unwrap();
    let stored_tree = zstd::decode_all(std::fs::File::open(blob(&layout, &stored["digest"])).unwrap()).unwrap();
    let (rest, zeros) = device.split_at(device.len() - 256 * BLOCK);
    assert!(zeros.iter().all(|byte| *byte == 0));
    let (covered, on_device) = rest.split_at(rest.len() - stored_tree.len());
    assert!(on_device == stored_tree, "the tree lies behind what it covers");
    let blocks = u32::from_le_bytes(covered[1024 + 36..1024 + 40].try_into().unwrap());
    assert_eq!(blocks as usize, covered.len() / BLOCK, "the file system ends where the tree starts");

    let salt = metadata["annotations"]["org.erofs.uncompressed-digest"].as_str().unwrap();
    let salt = salt.strip_prefix("sha256:").unwrap();
    let (tree, top) = tree_over(covered, &bytes_of(salt));
    assert!(stored_tree == tree, "{} bytes, not {}", stored_tree.len(), tree.len());
    let stated = stored["annotations"]["vnd.ublkimg.verity.root"].as_str().unwrap();
    assert_eq!(bytes_of(stated.strip_prefix("sha256:").unwrap()), top);
    assert_eq!(serde_json::from_str::<Value>(&inspected).unwrap()["verity_root"], stated);

    if Command::new("veritysetup").arg("--version").stdout(Stdio::null()).status().is_err() {
        return println!("no veritysetup here: compared with the tree of this test alone");
    }
    let mut verify = Command::new("veritysetup");
    verify.arg("verify").arg(&flat).arg(&flat).arg(stated.strip_prefix("sha256:").unwrap());
    verify.args(["--no-superblock", "--hash=sha256", "--format=1", "--data-block-size=4096", "--hash-block-size=4096"]);
    verify.arg(format!("--data-blocks={blocks}")).arg(format!("--hash-offset={}", covered.len()));
    let verified = verify.arg(format!("--salt={salt}")).output().unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}

/// The blob with `new` in place of `old`, as a new blob, whose digest is returned. Both are as long, so sizes in descriptors stay true.
fn changed(layout: &Path, digest: &Value, old: &str, new: &str) -> String {
    let text = std::fs::read_to_string(blob(layout, digest)).unwrap();
    assert!(text.contains(old) && old.len() == new.len(), "{old} in {text}");
    let text = text.replace(old, new);
    let hex: String = Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(layout.join("blobs/sha256").join(&hex), text).unwrap();
    format!("sha256:{hex}")
}

#[test]
fn a_root_of_another_device_is_found() {
    let root = TempRoot::new().unwrap();
    SampleImage::default().write_layout(&root.join("source"), "v1").unwrap();
    let layout = root.join("one");
    let (source, image) = (format!("oci:{}:v1", root.join("source").display()), format!("oci:{}:v1", layout.display()));
    ublkimg(root.path()).args(["convert", &source, &image, "--verity"]).run().success();

    let top = json(&layout.join("index.json"))["manifests"][0]["digest"].clone();
    let of_manifest = json(&blob(&layout, &top))["manifests"][0]["digest"].clone();
    let manifest = json(&blob(&layout, &of_manifest));
    let tree = manifest["layers"].as_array().unwrap().iter().rev().nth(1).unwrap();
    let stated = tree["annotations"]["vnd.ublkimg.verity.root"].as_str().unwrap();
    let other = format!("sha256:{}", "5".repeat(64));
    let other_manifest = changed(&layout, &of_manifest, stated, &other);
    let other_top = changed(&layout, &top, of_manifest.as_str().unwrap(), &other_manifest);
    let index = std::fs::read_to_string(layout.join("index.json")).unwrap();
    std::fs::write(layout.join("index.json"), index.replace(top.as_str().unwrap(), &other_top)).unwrap();

    ublkimg(root.path()).args(["check", &image]).run().refused(6, &["the verity tree", "another root than the device"]);
}
