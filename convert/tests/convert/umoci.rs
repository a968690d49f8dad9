//! Against umoci, an independent implementation of OCI layers: random stacks, and images made of packages.

use std::path::Path;
use std::process::Command;

use ublkimg_convert::{ChunkSize, Options};

use crate::{check_layer_blobs, exported, fixture, run_with, tree};

/// Whether umoci and what is needed to compare with it is here; says if not.
pub(crate) fn is_there() -> bool {
    if !fixture::is_root() {
        println!("SKIP: needs root to make device nodes, to change owners and to mount");
        return false;
    }
    let found = Command::new("umoci").arg("--version").output();
    if let Err(error) = &found {
        println!("SKIP: umoci: {error}");
    }
    found.is_ok()
}

/// Unpacks the image `tag` of the OCI layout `plain`, converts the one at `source`, and returns what is different between
/// the two trees. Checks what comes out with erofs-utils, and each layer blob alone.
pub(crate) async fn differences(plain: &Path, tag: &str, source: &str, chunk_size: ChunkSize) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let expected = dir.path().join("unpacked");
    let image = format!("{}:{tag}", plain.display());
    fixture::command("umoci", &["raw", "unpack", "--image", &image, expected.to_str().unwrap()], dir.path());
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    let options = Options { chunk_size, ..Options::default() };
    let summary = run_with(source, &destination, &options).await.unwrap();
    let flat = exported(&destination).await;
    fixture::fsck(flat.path());
    let mut differences = Vec::new();
    fixture::with_mount(flat.path(), |mounted| differences = tree::differences(&expected, mounted));
    check_layer_blobs(&destination, &summary).await;
    differences
}

/// `make debian-images` says where they are: OCI layouts in one directory, each with the tag `latest`.
#[tokio::test(flavor = "multi_thread")]
async fn images_of_packages_make_the_same_tree_as_umoci_does() {
    let Some(images) = std::env::var_os("UBLKIMG_IMAGES") else {
        println!("SKIP: UBLKIMG_IMAGES names no directory of images; make debian-images");
        return;
    };
    if !is_there() {
        return;
    }
    let entries = std::fs::read_dir(images).unwrap().map(|entry| entry.unwrap().path());
    let mut layouts: Vec<_> = entries.filter(|path| path.join("index.json").exists()).collect();
    layouts.sort();
    assert!(!layouts.is_empty());
    for layout in layouts {
        let source = format!("oci:{}:latest", layout.display());
        let differences = differences(&layout, "latest", &source, ChunkSize::default()).await;
        assert!(differences.is_empty(), "{}: {}", layout.display(), differences.join("\n"));
        println!("{}: the same", layout.display());
    }
}
