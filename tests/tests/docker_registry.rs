//! The registry client against Debian's docker-registry, a registry that we did not write.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::OnceLock;

use bytes::Bytes;
use serde_json::json;
use tokio::io::AsyncReadExt;
use ublkimg_registry::{BlobSource, ClientOptions, Digest, ErrorKind, Pushed, Repository};
use ublkimg_tests::command::ublkimg;
use ublkimg_tests::docker_registry::DockerRegistry;
use ublkimg_tests::sample_image::{SampleImage, noise};
use ublkimg_tests::skip;
use ublkimg_tests::temp_root::TempRoot;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A registry of a test's own, or the reason why there is none.
fn start() -> Option<(TempRoot, DockerRegistry)> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    if !INSTALLED.get_or_init(DockerRegistry::is_installed) {
        return None;
    }
    let root = TempRoot::new().unwrap();
    let registry = DockerRegistry::start(root.path()).unwrap();
    Some((root, registry))
}

async fn open(registry: &DockerRegistry, repository: &str, tag: &str) -> Repository {
    let location = registry.reference(repository, tag).parse().unwrap();
    Repository::open(&location, &ClientOptions::default()).await.unwrap()
}

/// A blob and its digest.
fn blob(seed: u64, len_bytes: usize) -> (Digest, Bytes) {
    let bytes = Bytes::from(noise(seed, len_bytes));
    (Digest::of(&bytes), bytes)
}

#[tokio::test]
async fn push_resolve_and_read() {
    let Some((root, registry)) = start() else { skip!("no docker-registry here") };
    let repository = open(&registry, "a/b", "v1").await;
    assert_eq!(repository.resolve().await.unwrap_err().kind(), ErrorKind::NotFound);

    let (digest, bytes) = blob(1, 3_000_000);
    let size_bytes = bytes.len() as u64;
    assert!(!repository.has_blob(&digest).await.unwrap());
    let source = BlobSource::Bytes(bytes.clone());
    let pushed = repository.push_blob(&digest, size_bytes, source.clone(), None).await.unwrap();
    assert_eq!(pushed, Pushed::Uploaded);
    assert!(repository.has_blob(&digest).await.unwrap());
    assert_eq!(repository.push_blob(&digest, size_bytes, source, None).await.unwrap(), Pushed::Existed);

    let (of_file, contents) = blob(2, 100_000);
    let file = root.file("blob", &contents).unwrap();
    repository.push_blob(&of_file, 100_000, BlobSource::File(file), None).await.unwrap();

    for range in [0..1, 1_234_567..1_300_000, 2_999_999..3_000_000, 0..3_000_000] {
        let part = repository.blob_range(&digest, range.clone()).await.unwrap();
        let (start, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
        assert!(part == bytes[start..end], "{range:?}");
    }
    let mut whole = Vec::new();
    repository.blob(&digest, size_bytes).await.unwrap().read_to_end(&mut whole).await.unwrap();
    assert!(whole == bytes);

    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": "application/octet-stream", "digest": digest.to_string(), "size": size_bytes},
        "layers": [],
    });
    let manifest = Bytes::from(manifest.to_string());
    let digest = repository.push_manifest(MANIFEST, manifest.clone(), Some("v1")).await.unwrap();
    let resolved = repository.resolve().await.unwrap();
    assert_eq!((resolved.digest, resolved.media_type.as_str(), &resolved.bytes), (digest, MANIFEST, &manifest));
    assert_eq!(repository.manifest(&digest).await.unwrap(), manifest);
}

#[tokio::test]
async fn mount_from_another_repository() {
    let Some((_root, registry)) = start() else { skip!("no docker-registry here") };
    let (from, to) = (open(&registry, "from", "v1").await, open(&registry, "to", "v1").await);
    let (digest, bytes) = blob(3, 50_000);
    from.push_blob(&digest, 50_000, BlobSource::Bytes(bytes.clone()), None).await.unwrap();
    // Without a body to fall back on a push would fail.
    let pushed = to.push_blob(&digest, 50_000, BlobSource::Bytes(bytes.clone()), Some("from")).await.unwrap();
    assert_eq!(pushed, Pushed::Mounted);
    assert!(to.blob_range(&digest, 0..50_000).await.unwrap() == bytes);

    let (other, bytes) = blob(4, 50_000);
    let pushed = to.push_blob(&other, 50_000, BlobSource::Bytes(bytes), Some("from")).await.unwrap();
    assert_eq!(pushed, Pushed::Uploaded, "what cannot be mounted is uploaded");
}

#[tokio::test]
async fn what_is_not_there() {
    let Some((_root, registry)) = start() else { skip!("no docker-registry here") };
    let repository = open(&registry, "a", "v1").await;
    let (digest, bytes) = blob(5, 1000);
    let kind = |error: ublkimg_registry::Error| error.kind();
    assert_eq!(kind(repository.manifest(&digest).await.unwrap_err()), ErrorKind::NotFound);
    assert_eq!(kind(repository.blob_range(&digest, 0..10).await.unwrap_err()), ErrorKind::NotFound);
    repository.push_blob(&digest, 1000, BlobSource::Bytes(bytes), None).await.unwrap();
    // docker-registry answers 416 with a wrong Content-Length.
    let past_the_end = repository.blob_range(&digest, 900..1100).await.unwrap_err();
    assert_eq!(kind(past_the_end), ErrorKind::Corrupt);
}

#[test]
fn converted_images_are_the_same_in_every_registry() {
    let Some((root, registry)) = start() else { skip!("no docker-registry here") };
    SampleImage::default().write_layout(&root.join("source"), "v1").unwrap();
    let convert = |destination: &str| {
        let source = format!("oci:{}:v1", root.join("source").display());
        let outcome = ublkimg(root.path()).args(["convert", &source, destination]).run().success();
        outcome.stdout.trim_end().rsplit_once('@').unwrap().1.to_owned()
    };
    let in_layout = convert(&format!("oci:{}:v1", root.join("destination").display()));
    let reference = registry.reference("converted", "v1");
    assert_eq!(convert(&reference), in_layout);
    ublkimg(root.path()).args(["inspect", "--json", &reference]).run().success();
}
