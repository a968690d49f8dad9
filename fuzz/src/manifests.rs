//! Manifests and indexes: JSON from a registry.

use ublkimg_registry::Digest;
use ublkimg_registry::descriptor::{Descriptor, Index, Manifest, Platform};
use ublkimg_registry::erofs_manifest::{
    ErofsManifest, LAYERS_MAX, LayerOrigin, LayerRef, MetadataRef, VerityRef, choose,
};
use ublkimg_registry::profile::{ProfileManifest, add_to_index, profiles};

/// One document, taken for each kind that there is.
pub(crate) fn manifest(data: &[u8]) {
    if let Ok(manifest) = ErofsManifest::parse(data) {
        assert!(manifest.layers.len() <= LAYERS_MAX);
        for layer in manifest.devices() {
            assert!(layer.index_range.start < layer.index_range.end && layer.index_range.end <= layer.size_bytes);
        }
        assert!(manifest.metadata.bundle_range.end <= manifest.metadata.size_bytes);
        assert_eq!(ErofsManifest::parse(&manifest.to_bytes()).expect("what was parsed"), manifest);
    }
    let image = Digest::of(b"image");
    if let Ok(profile) = ProfileManifest::parse(data)
        && let Ok(bytes) = profile.to_bytes()
    {
        assert!(ProfileManifest::parse(&bytes).is_ok());
        let _ = add_to_index(&index_seed(), &bytes, true);
    }
    if let Ok(index) = Index::parse(data) {
        assert!(profiles(data, &image).expect("an index").len() <= index.manifests.len());
        let _ = choose(data, &Platform::new("linux", "amd64"));
        // An index that can be edited is one afterwards, with the profile in it.
        if let Ok(edited) = add_to_index(data, &profile_seed(), true) {
            assert!(!profiles(&edited, &image).expect("what was edited").is_empty());
        }
    }
    let _: Result<Manifest, _> = serde_json::from_slice(data);
}

fn digest(number: u8) -> Digest {
    Digest([number; 32])
}

fn index_seed() -> Vec<u8> {
    let platform = r#"{"architecture":"amd64","os":"linux","os.features":["erofs"]}"#;
    format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":7,"platform":{platform}}}]}}"#,
        Digest::of(b"image")
    )
    .into_bytes()
}

/// A profile of the image in [`index_seed`].
fn profile_seed() -> Vec<u8> {
    let subject = Descriptor::new("application/vnd.oci.image.manifest.v1+json", Digest::of(b"image"), 7);
    let profile = ProfileManifest {
        subject,
        command: Some(digest(1)),
        name: Some("web".to_owned()),
        trace: ProfileManifest::describe_trace(b"trace", false),
        hot: None,
        annotations: [("a".to_owned(), "b".to_owned())].into(),
    };
    profile.to_bytes().expect("a sound profile").to_vec()
}

pub(crate) fn manifest_seeds() -> Vec<Vec<u8>> {
    let layer = |number: u8| LayerRef {
        digest: digest(number),
        size_bytes: 1000,
        index_range: 900..1000,
        index_digest: digest(number + 1),
        uncompressed_digest: digest(number + 2),
        origin: Some(LayerOrigin {
            source_layer: Some(digest(number + 3)),
            diff_id: digest(number + 4),
            settings: "converter level-3".to_owned(),
            record_digest: digest(number + 5),
        }),
    };
    let image = ErofsManifest {
        config: Descriptor::new("application/vnd.oci.image.config.v1+json", digest(0), 5),
        layers: vec![layer(1), layer(5)],
        verity: Some(VerityRef { tree: layer(13), root: digest(17) }),
        metadata: MetadataRef {
            digest: digest(9),
            size_bytes: 100,
            bundle_range: 90..100,
            uncompressed_digest: digest(10),
        },
        annotations: [("a".to_owned(), "b".to_owned())].into(),
    };
    let with_profile = add_to_index(&index_seed(), &profile_seed(), true).expect("an index of the image");
    vec![image.to_bytes(), index_seed(), with_profile.to_vec(), b"{\"schemaVersion\":2,\"layers\":null}".to_vec()]
}
