//! Conversions from end to end: images built with the system's tar, converted, exported, checked and mounted.

#![expect(clippy::unwrap_used, reason = "tests")]

mod archives;
mod errors;
mod fixture;
mod media_types;
mod optimize;
mod registry;
mod same;
mod stacks;
mod tree;
mod umoci;

use std::fs::File;

use ublkimg_convert::{NoProgress, Options, Source, Summary, convert, export};
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{ClientOptions, Location, Repository};

/// Converts between places written as text.
async fn run(source: &str, destination: &str) -> ublkimg_convert::Result<Summary> {
    run_with(source, destination, &Options::default()).await
}

async fn run_with(source: &str, destination: &str, options: &Options) -> ublkimg_convert::Result<Summary> {
    let source: Source = source.parse().unwrap();
    let destination: Location = destination.parse().unwrap();
    convert(&source, &destination, options, std::sync::Arc::new(NoProgress)).await
}

async fn repository(location: &str) -> Repository {
    Repository::open(&location.parse().unwrap(), &ClientOptions::default()).await.unwrap()
}

/// The flat image as a file.
async fn exported(location: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let out = File::options().write(true).open(file.path()).unwrap();
    export(&repository(location).await, &Platform::host(), &out).await.unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn three_layers_of_all_compressions_make_the_same_tree_as_tar_does() {
    if !fixture::is_root() {
        println!("SKIP: needs root to make device nodes, to change owners and to mount");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layers = fixture::three_layers(dir.path());
    let source = format!("oci:{}/source:v1", dir.path().display());
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    fixture::push_image(&source, &layers).await;
    let summary = run(&source, &destination).await.unwrap();
    assert_eq!(summary.images[0].layers.len(), 3);

    let flat = exported(&destination).await;
    fixture::fsck(flat.path());
    let expected = fixture::apply_layers(dir.path(), &layers);
    fixture::with_mount(flat.path(), |mounted| {
        tree::assert_same(&expected, mounted);
    });
    check_layer_blobs(&destination, &summary).await;
}

/// Each blob is an image of its own for `zstd -d` and the kernel.
async fn check_layer_blobs(location: &str, summary: &Summary) {
    let repository = repository(location).await;
    for layer in &summary.images[0].layers {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = repository.blob(&layer.digest, layer.size_bytes).await.unwrap();
        let mut blob = tokio::fs::File::create(dir.path().join("blob.zst")).await.unwrap();
        tokio::io::copy(&mut reader, &mut blob).await.unwrap();
        blob.sync_all().await.unwrap();
        fixture::command("zstd", &["-q", "-d", "blob.zst"], dir.path());
        let raw = dir.path().join("blob");
        assert_eq!(std::fs::metadata(&raw).unwrap().len(), layer.raw_bytes);
        fixture::fsck(&raw);
        if fixture::is_root() {
            fixture::with_mount(&raw, |mounted| assert!(mounted.read_dir().unwrap().all(|entry| entry.is_ok())));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_becomes_the_same_tree() {
    if !fixture::is_root() {
        println!("SKIP: needs root to make device nodes, to change owners and to mount");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fixture::base_tree(&root);
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    let summary = run(&format!("dir:{}", root.display()), &destination).await.unwrap();
    assert_eq!((summary.images[0].layers.len(), summary.images[0].layers[0].source), (1, None));
    let flat = exported(&destination).await;
    fixture::fsck(flat.path());
    fixture::with_mount(flat.path(), |mounted| {
        tree::assert_same(&root, mounted);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_layers_is_an_empty_root() {
    let dir = tempfile::tempdir().unwrap();
    let source = format!("oci:{}/source:v1", dir.path().display());
    let destination = format!("oci:{}/converted:v1", dir.path().display());
    fixture::push_image(&source, &[]).await;
    let summary = run(&source, &destination).await.unwrap();
    assert!(summary.images[0].layers.is_empty());
    fixture::fsck(exported(&destination).await.path());
}
