//! Layers that were converted before are not downloaded, converted or uploaded again, and what comes out is the same.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use serde_json::Value;
use ublkimg_convert::StoredImage;
use ublkimg_image::{Kind, NodeId, Sha256, read_tree};
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{ClientOptions, Repository};
use ublkimg_tests::command::{Invocation, ublkimg};
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Config, Fault, Stats, TestRegistry, Toxic};
use ublkimg_tests::sample_image::noise;
use ublkimg_tests::tar::{Entry, LongNames, archive};
use ublkimg_tests::temp_root::TempRoot;

/// Merge record and metadata of a layer of one or two files, and more than that by far.
const START_BYTES_MAX: u64 = 4096;

/// A registry with source images in its repository `plain`.
struct Fixture {
    root: TempRoot,
    layout: OciLayout,
    registry: TestRegistry,
}

impl Fixture {
    fn new() -> Self {
        let root = TempRoot::new().unwrap();
        let layout = OciLayout::create(&root.join("source")).unwrap();
        Self { root, layout, registry: TestRegistry::start(Config::default()).unwrap() }
    }

    /// Adds an image of these layers as `plain:TAG`; returns its manifest.
    fn image(&self, tag: &str, layers: &[Vec<Entry>]) -> Value {
        let layers: Vec<Layer> = layers
            .iter()
            .map(|entries| Layer { tar: archive(entries, LongNames::Pax), compression: Compression::Gzip })
            .collect();
        let manifest = self.layout.add_image(tag, &layers).unwrap();
        self.registry.load_layout(&self.root.join("source"), Some(tag), "plain", tag).unwrap();
        manifest
    }

    /// `convert plain:SOURCE DESTINATION`, to be completed.
    fn command(&self, source: &str, (repository, tag): (&str, &str)) -> Invocation {
        let plain = self.registry.reference("plain", source);
        ublkimg(self.root.path()).args(["convert", "--json", &plain, &self.registry.reference(repository, tag)])
    }

    /// Converts with these options; returns what is printed and what moved.
    fn convert(&self, source: &str, destination: (&str, &str), options: &[&str]) -> (Value, Stats) {
        self.registry.reset_stats();
        let outcome = self.command(source, destination).args(options).run().success();
        assert_eq!(self.registry.open_uploads(), 0);
        (serde_json::from_str(&outcome.stdout).unwrap(), self.registry.stats())
    }

    /// The digest that an untouched registry and an empty cache give.
    fn full(&self, source: &str) -> Value {
        let destination = format!("oci:{}:{source}", self.root.join("full").display());
        let plain = self.registry.reference("plain", source);
        let outcome = ublkimg(self.root.path()).args(["convert", "--json", "--no-cache", &plain, &destination]).run();
        serde_json::from_str(&outcome.success().stdout).unwrap()
    }
}

fn layer_digests(manifest: &Value) -> Vec<String> {
    manifest["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

fn reused(json: &Value) -> Vec<bool> {
    json["images"][0]["layers"].as_array().unwrap().iter().map(|layer| layer["reused"].as_bool().unwrap()).collect()
}

fn file_layer(number: u64) -> Vec<Entry> {
    vec![Entry::file(&format!("layer-{number}/file"), noise(number, 60_000))]
}

#[test]
fn one_changed_layer_of_fifty_moves_alone() {
    let fixture = Fixture::new();
    let mut layers: Vec<Vec<Entry>> = (1..=50).map(file_layer).collect();
    fixture.image("v1", &layers);
    let (first, _) = fixture.convert("v1", ("made", "latest"), &["--no-cache"]);
    layers[49] = file_layer(999);
    let source = fixture.image("v2", &layers);
    let (second, stats) = fixture.convert("v2", ("made", "latest"), &["--no-cache"]);

    // Up: the layer's blob, the metadata and the config; index and manifest are no blobs.
    let made = layer_digests(&second["images"][0]);
    let uploaded: Vec<&String> = stats.uploads.keys().collect();
    assert_eq!(uploaded.len(), 3, "{uploaded:?}");
    assert!(stats.uploads.contains_key(&made[49]));
    assert_eq!(stats.requests_of("manifest_put"), 2);
    // Down: of the source the changed layer only, of the blobs their starts only.
    let source = layer_digests(&source);
    assert!(source[..49].iter().all(|digest| !stats.blobs.contains_key(digest)));
    assert_eq!(stats.blobs[&source[49]].duplicate_bytes, 0);
    for digest in &made[..49] {
        assert!(stats.blobs[digest].bytes_sent <= START_BYTES_MAX, "{:?}", stats.blobs[digest]);
    }
    assert!(reused(&second)[..49].iter().all(|reused| *reused) && !reused(&second)[49]);
    assert_eq!(made[..49], layer_digests(&first["images"][0])[..49]);
    assert_eq!(second["index"], fixture.full("v2")["index"], "the same bytes as a whole conversion");
}

#[test]
fn the_same_image_again_moves_no_layer() {
    let fixture = Fixture::new();
    let source = fixture.image("v1", &[file_layer(1), file_layer(2), file_layer(1)]);
    let source: BTreeSet<String> = layer_digests(&source).into_iter().collect();
    let (first, _) = fixture.convert("v1", ("made", "v1"), &[]);
    let made: BTreeSet<String> = layer_digests(&first["images"][0]).into_iter().collect();
    for options in [&[][..], &["--no-cache"], &["--threads", "1"]] {
        let (again, stats) = fixture.convert("v1", ("made", "v1"), options);
        assert_eq!((again["index"].clone(), reused(&again)), (first["index"].clone(), vec![true; 3]));
        assert_eq!(stats.uploads, [].into());
        assert!(source.iter().all(|digest| !stats.blobs.contains_key(digest)), "{:?}", stats.blobs);
        let start_bytes = if options == ["--no-cache"] { START_BYTES_MAX } else { 0 };
        for digest in &made {
            assert!(stats.blobs.get(digest).map_or(0, |blob| blob.bytes_sent) <= start_bytes, "{options:?}");
        }
    }
    let (other_settings, _) = fixture.convert("v1", ("made", "v1"), &["--level", "9"]);
    assert_eq!(reused(&other_settings), [false; 3]);
}

/// Layer 2 has `usr/x` without `usr`, which layer 1 made for one user only, and a hard link into layer 1.
#[test]
fn what_a_layer_implies_and_links_is_merged_as_if_converted_together() {
    let fixture = Fixture::new();
    let base = |mode, owner| {
        vec![
            Entry::directory("usr").mode(mode).owner(owner, owner),
            Entry::file("usr/lib/target", noise(7, 10_000)).mode(0o640),
        ]
    };
    let upper = vec![Entry::file("usr/x", "x"), Entry::hard_link("usr/link", "usr/lib/target")];
    fixture.image("v1", &[base(0o700, 5), upper.clone()]);
    fixture.image("v2", &[base(0o711, 6), upper.clone()]);
    fixture.image("v3", &[base(0o711, 6), vec![Entry::file("other", "")], upper]);
    for (tag, expected, mode_and_owner) in [
        ("v1", vec![false, false], (0o700, 5)),
        ("v2", vec![false, true], (0o711, 6)),
        ("v3", vec![true, false, true], (0o711, 6)),
    ] {
        let (json, _) = fixture.convert(tag, ("made", "latest"), &["--no-cache"]);
        assert_eq!(reused(&json), expected, "{tag}");
        assert_eq!(json["index"], fixture.full(tag)["index"], "{tag}");
        let tree = merged_tree(&fixture.registry.reference("made", "latest"));
        let usr = &tree.node(tree.lookup(b"usr").unwrap()).meta;
        assert_eq!((usr.mode & 0o7777, usr.uid), mode_and_owner, "{tag}");
        let link = tree.lookup(b"usr/link").unwrap();
        assert_eq!(tree.lookup(b"usr/lib/target"), Some(link));
        assert!(matches!(tree.node(link).kind, Kind::File(_)) && link != NodeId::ROOT);
    }
}

fn merged_tree(reference: &str) -> ublkimg_image::Tree {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stored = runtime.block_on(async {
        let repository = Repository::open(&reference.parse().unwrap(), &ClientOptions::default()).await.unwrap();
        StoredImage::read(&repository, &Platform::host()).await.unwrap()
    });
    read_tree(&stored.metadata).unwrap().0
}

#[test]
fn another_repository_gives_its_blobs_by_links() {
    let fixture = Fixture::new();
    fixture.image("v1", &[file_layer(1), file_layer(2)]);
    fixture.image("v2", &[file_layer(1), file_layer(3)]);
    let (first, _) = fixture.convert("v1", ("made", "v1"), &[]);
    // Named.
    let made = fixture.registry.reference("made", "v1");
    let (second, stats) = fixture.convert("v2", ("other/named", "v1"), &["--no-cache", "--reuse", &made]);
    assert_eq!(reused(&second), [true, false]);
    assert!(!stats.uploads.contains_key(&layer_digests(&first["images"][0])[0]));
    // Remembered.
    let (third, stats) = fixture.convert("v2", ("other/remembered", "v1"), &[]);
    assert_eq!(reused(&third), [true, false]);
    assert!(!stats.uploads.contains_key(&layer_digests(&first["images"][0])[0]));
    assert_eq!(third["index"], second["index"]);
    assert_eq!(third["index"], fixture.full("v2")["index"]);
    // What cannot be had is converted.
    let missing = fixture.registry.reference("no/image", "v1");
    let outcome =
        fixture.command("v2", ("other/missing", "v1")).args(["--no-cache", "--reuse", &missing]).run().success();
    assert!(outcome.stderr.contains("no/image"), "{}", outcome.stderr);
    assert_eq!(serde_json::from_str::<Value>(&outcome.stdout).unwrap()["index"], second["index"]);
}

#[test]
fn what_is_damaged_or_gone_is_converted_anew() {
    let fixture = Fixture::new();
    fixture.image("v1", &[file_layer(1), file_layer(2)]);
    let (first, _) = fixture.convert("v1", ("made", "v1"), &[]);
    let blob = layer_digests(&first["images"][0])[0].clone();
    // Bytes of the merge record, then of the metadata.
    for offset_bytes in [10, 60] {
        let flip = Fault::new(&format!("*/blobs/{blob}"), Toxic::BitFlip { offset_bytes });
        fixture.registry.set_fault("flip", flip.method("GET"));
        let (again, _) = fixture.convert("v1", ("made", "v1"), &["--no-cache"]);
        assert!(fixture.registry.fault_hits("flip") > 0);
        assert_eq!((again["index"].clone(), reused(&again)), (first["index"].clone(), vec![false, true]));
        fixture.registry.clear_faults();
    }
    // The blob is remembered, but no more there.
    let digest: Sha256 = blob.parse().unwrap();
    for options in [&[][..], &["--no-cache"]] {
        fixture.registry.delete(digest).unwrap();
        let (again, stats) = fixture.convert("v1", ("made", "v1"), options);
        assert_eq!((again["index"].clone(), reused(&again)), (first["index"].clone(), vec![false, true]));
        assert_eq!(stats.uploads.keys().collect::<Vec<_>>(), [&blob]);
    }
    // A cache that cannot be used is only slower.
    let no_directory = fixture.root.file("file", "").unwrap();
    let cache = no_directory.join("cache");
    let (again, _) = fixture.convert("v1", ("made", "v2"), &["--cache", cache.to_str().unwrap()]);
    assert_eq!(again["index"], first["index"]);
}
