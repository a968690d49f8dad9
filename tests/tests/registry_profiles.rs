//! Profiles in a registry with the referrers API, one without it, Debian's docker-registry and an OCI layout: the same
//! calls, the same outcome.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use bytes::Bytes;
use ublkimg_registry::descriptor::{
    Descriptor, Index, MEDIA_TYPE_CONFIG, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Platform,
};
use ublkimg_registry::erofs_manifest::{ErofsManifest, MetadataRef, choose};
use ublkimg_registry::profile::{
    ARTIFACT_TYPE, HotRef, MEDIA_TYPE_HOT, ProfileChoice, ProfileManifest, Trust, profiles,
};
use ublkimg_registry::{BlobSource, ClientOptions, Digest, ErrorKind, Location, NewProfile, Repository};
use ublkimg_tests::docker_registry::DockerRegistry;
use ublkimg_tests::registry::{Config, TestRegistry};
use ublkimg_tests::skip;
use ublkimg_tests::temp_root::TempRoot;

async fn open(location: &str) -> Repository {
    let options = ClientOptions { auth_file: Some("/dev/null".into()), ..ClientOptions::default() };
    Repository::open(&location.parse().unwrap(), &options).await.unwrap()
}

async fn push(repository: &Repository, bytes: &'static [u8]) -> Digest {
    let digest = Digest::of(bytes);
    let source = BlobSource::Bytes(Bytes::from_static(bytes));
    repository.push_blob(&digest, bytes.len() as u64, source, None).await.unwrap();
    digest
}

/// An image of nothing but metadata, under the tag; its manifest.
async fn push_image(repository: &Repository, tag: Option<&str>) -> Descriptor {
    let config = br#"{"os":"linux","architecture":"arm","variant":"v7","os.features":["erofs"]}"#;
    push(repository, config).await;
    let metadata = push(repository, b"metadata").await;
    let manifest = ErofsManifest {
        config: Descriptor::of(MEDIA_TYPE_CONFIG, config),
        layers: Vec::new(),
        verity: None,
        metadata: MetadataRef { digest: metadata, size_bytes: 8, bundle_range: 4..8, uncompressed_digest: metadata },
        annotations: BTreeMap::new(),
    };
    let bytes = manifest.to_bytes();
    let image = Descriptor::of(MEDIA_TYPE_MANIFEST, &bytes);
    repository.push_manifest(MEDIA_TYPE_MANIFEST, bytes.into(), tag).await.unwrap();
    image
}

fn command(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn profile(image: &Descriptor, name: &str, has_hot_blob: bool) -> NewProfile {
    let trace = Bytes::from(format!("the trace of {name}"));
    let hot = Bytes::from(format!("the hot blob of {name}"));
    let table = Bytes::from(format!("the table of {name}"));
    let manifest = ProfileManifest {
        subject: image.clone(),
        command: Some(command(name)),
        name: Some(name.to_owned()),
        trace: ProfileManifest::describe_trace(&trace, has_hot_blob),
        hot: has_hot_blob.then(|| HotRef { blob: Descriptor::of(MEDIA_TYPE_HOT, &hot), table }),
        annotations: BTreeMap::new(),
    };
    NewProfile { manifest, trace, hot: has_hot_blob.then_some(BlobSource::Bytes(hot)) }
}

/// The names that the index under the tag lists.
async fn listed(repository: &Repository, image: &Digest) -> Vec<String> {
    let resolved = repository.resolve().await.unwrap();
    assert_eq!(resolved.media_type, MEDIA_TYPE_INDEX);
    profiles(&resolved.bytes, image).unwrap().into_iter().map(|profile| profile.name.unwrap()).collect()
}

async fn scenario(location: &str) {
    let repository = open(location).await;
    let tag = location.parse::<Location>().unwrap().tag().map(str::to_owned);
    let image = push_image(&repository, tag.as_deref()).await;

    // Around a bare manifest there is an index afterwards, by which the image is found as before.
    let web = profile(&image, "web", true);
    let pushed = repository.push_profile(&web, true).await.unwrap();
    let resolved = repository.resolve().await.unwrap();
    assert_eq!(resolved.digest, pushed.index);
    let chosen = choose(&resolved.bytes, &"linux/arm/v7".parse::<Platform>().unwrap()).unwrap();
    assert_eq!((chosen.digest, chosen.size), (image.digest, image.size));
    assert_eq!(repository.push_profile(&web, true).await.unwrap(), pushed, "again");

    // A start: the index is known, one more request at most brings the manifest, and that the rest.
    let index = resolved.bytes;
    let auto = ProfileChoice::Auto;
    let other = command("unknown");
    let found = repository.find_profile(Some(&index), &image.digest, &auto, Some(&other)).await.unwrap().unwrap();
    assert_eq!((found.trust, found.descriptor.digest), (Trust::Bytes, pushed.manifest));
    let manifest = repository.fetch_profile(&found, &image.digest).await.unwrap();
    assert_eq!(manifest, web.manifest);
    assert_eq!(repository.fetch_trace(&manifest).await.unwrap(), web.trace);
    let hot = &manifest.hot.as_ref().unwrap().blob;
    let mut stream = repository.blob_stream(&hot.digest, 4..hot.size);
    assert_eq!(stream.next().await.unwrap().unwrap(), "hot blob of web");
    assert!(stream.next().await.is_none());
    let error = repository.fetch_profile(&found, &other).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "of another image");

    // More of them; one takes the other's place.
    repository.push_profile(&profile(&image, "test", false), false).await.unwrap();
    let mut rival = profile(&image, "test", false);
    rival.manifest.command = Some(command("changed"));
    repository.push_profile(&rival, false).await.unwrap();
    assert_eq!(listed(&repository, &image.digest).await, ["web", "test"]);

    // What only hangs on the image is found by its name and by its digest, and gives an order at most.
    let hint = repository.push_profile_referrer(&profile(&image, "hint", false)).await.unwrap();
    assert_eq!(listed(&repository, &image.digest).await, ["web", "test"]);
    let referrers = repository.referrers(&image.digest, Some(ARTIFACT_TYPE)).await.unwrap();
    assert!(referrers.iter().any(|entry| entry.digest == hint), "{referrers:?}");
    let index = repository.resolve().await.unwrap().bytes;
    let find = async |choice: &str| {
        repository.find_profile(Some(&index), &image.digest, &choice.parse().unwrap(), Some(&command("hint"))).await
    };
    let found = find("hint").await.unwrap().unwrap();
    assert_eq!((found.trust, found.descriptor.digest), (Trust::Order, hint));
    assert_eq!(
        repository.fetch_profile(&found, &image.digest).await.unwrap().trace.inline().unwrap().unwrap(),
        "the trace of hint"
    );
    assert_eq!(find(&hint.to_string()).await.unwrap().unwrap().trust, Trust::Bytes, "pinned");
    assert_eq!(find("auto").await.unwrap().unwrap().name.as_deref(), Some("web"), "the default that is listed");
    assert_eq!(find("none").await.unwrap(), None);
    assert_eq!(find("absent").await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn in_registries_with_and_without_the_referrers_api() {
    for referrers in [true, false] {
        let registry = TestRegistry::start(Config { referrers, ..Config::default() }).unwrap();
        scenario(&registry.reference("a/b", "v1")).await;
        let tags = registry.manifest("a/b", "v1").unwrap().unwrap();
        let image = Index::parse(&tags).unwrap().manifests[0].digest;
        let fallback = registry.manifest("a/b", &format!("sha256-{}", image.hex())).unwrap();
        assert_eq!(fallback.is_some(), !referrers, "the tag is kept where it is needed");
    }
}

#[tokio::test]
async fn in_dockers_registry() {
    if !DockerRegistry::is_installed() {
        skip!("no docker-registry here");
    }
    let root = TempRoot::new().unwrap();
    let registry = DockerRegistry::start(root.path()).unwrap();
    scenario(&registry.reference("a/b", "v1")).await;
}

#[tokio::test]
async fn in_layouts() {
    let root = TempRoot::new().unwrap();
    for location in ["tagged:v1", "untagged"] {
        scenario(&format!("oci:{}/{location}", root.path().display())).await;
    }
}

#[tokio::test]
async fn a_profile_goes_to_the_tag_of_its_image_only() {
    let registry = TestRegistry::start(Config::default()).unwrap();
    let repository = open(&registry.reference("a", "v1")).await;
    let image = push_image(&repository, Some("v1")).await;
    let mut wrong = profile(&image, "web", true);
    wrong.manifest.subject.digest = command("another");
    let before = registry.stats().requests_of("upload");
    assert_eq!(repository.push_profile(&wrong, true).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(registry.stats().requests_of("upload"), before, "said before anything is sent");
    let pinned = open(&format!("{}/a:v1@{}", registry.addr(), image.digest)).await;
    let error = pinned.push_profile(&profile(&image, "web", true), true).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let mut incomplete = profile(&image, "web", true);
    incomplete.hot = None;
    assert_eq!(repository.push_profile(&incomplete, true).await.unwrap_err().kind(), ErrorKind::Invalid);
}
