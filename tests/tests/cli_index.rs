//! What a converted tag lists: the original beside the converted image, several platforms, profiles that stay.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::{Value, json};
use ublkimg_image::Sha256;
use ublkimg_tests::command::{Outcome, ublkimg};
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Config, TestRegistry};
use ublkimg_tests::sample_image::noise;
use ublkimg_tests::tar::{Entry, LongNames, archive};
use ublkimg_tests::temp_root::TempRoot;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

struct Fixture {
    root: TempRoot,
    registry: TestRegistry,
}

impl Fixture {
    /// A registry with `app:v1` for amd64, `app:v2` with another layer, and `app:all` for several platforms.
    fn new() -> Self {
        let root = TempRoot::new().unwrap();
        let registry = TestRegistry::start(Config::default()).unwrap();
        let layout = OciLayout::create(&root.join("source")).unwrap();
        for (tag, seed) in [("v1", 1), ("v2", 2)] {
            let layer = |name: &str, seed| Layer {
                tar: archive(&[Entry::file(name, noise(seed, 50_000))], LongNames::Pax),
                compression: Compression::Gzip,
            };
            layout.add_image(tag, &[layer("base", 7), layer("top", seed)]).unwrap();
            registry.load_layout(&root.join("source"), Some(tag), "app", tag).unwrap();
        }
        let fixture = Self { root, registry };
        let entries = json!([
            fixture.listed("v1", &json!({"os": "linux", "architecture": "amd64"})),
            fixture.listed("v2", &json!({"os": "linux", "architecture": "arm64", "variant": "v8"})),
            fixture.listed("v1", &json!({"os": "unknown", "architecture": "unknown"})),
            fixture.listed("v1", &json!({"os": "windows", "architecture": "amd64"})),
        ]);
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        fixture.registry.put_manifest("app", INDEX, index.to_string(), Some("all")).unwrap();
        fixture
    }

    /// The manifest of `app:TAG` as an index lists it.
    fn listed(&self, tag: &str, platform: &Value) -> Value {
        let bytes = self.registry.manifest("app", tag).unwrap().unwrap();
        json!({"mediaType": MANIFEST, "digest": Sha256::of(&bytes).to_string(), "size": bytes.len(), "platform": platform})
    }

    fn reference(&self, repository: &str, tag: &str) -> String {
        self.registry.reference(repository, tag)
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        ublkimg(self.root.path()).args(arguments).run()
    }

    fn convert(&self, source: &str, destination: &str, options: &[&str]) -> Value {
        let outcome = self.run(&[&["convert", "--json", source, destination], options].concat()).success();
        serde_json::from_str(&outcome.stdout).unwrap()
    }

    /// What `REPOSITORY:TAG` lists.
    fn entries(&self, repository: &str, tag: &str) -> Vec<Value> {
        let bytes = self.registry.manifest(repository, tag).unwrap().unwrap();
        let index: Value = serde_json::from_slice(&bytes).unwrap();
        index["manifests"].as_array().unwrap().clone()
    }

    fn digest(&self, repository: &str, tag: &str) -> String {
        Sha256::of(&self.registry.manifest(repository, tag).unwrap().unwrap()).to_string()
    }
}

fn platforms(entries: &[Value]) -> Vec<String> {
    let name = |entry: &Value| {
        let platform = &entry["platform"];
        let features = platform["os.features"].as_array().map_or("", |_| "+erofs");
        format!("{}{features}", platform["architecture"].as_str().unwrap())
    };
    entries.iter().map(name).collect()
}

#[test]
fn one_tag_serves_ordinary_runtimes_and_us() {
    let fixture = Fixture::new();
    let app = fixture.reference("app", "v1");
    let original = fixture.digest("app", "v1");
    fixture.run(&["convert", &app, &app]).refused(2, &[&app, "--index"]);
    assert_eq!(fixture.digest("app", "v1"), original, "nothing was replaced");

    fixture.registry.reset_stats();
    let first = fixture.convert(&app, &app, &["--index"]);
    let entries = fixture.entries("app", "v1");
    assert_eq!(platforms(&entries), ["amd64", "amd64+erofs"]);
    assert_eq!(
        (entries[0]["digest"].as_str(), &entries[1]["digest"]),
        (Some(&*original), &first["images"][0]["manifest"])
    );
    assert_eq!(fixture.registry.stats().uploads.len(), 4, "two layers, metadata, config: nothing of the original");
    let inspected = fixture.run(&["inspect", "--json", &app]).success();
    let inspected: Value = serde_json::from_str(&inspected.stdout).unwrap();
    assert_eq!(inspected["manifest"], first["images"][0]["manifest"]);

    // The original in the index is what is converted next time.
    fixture.registry.reset_stats();
    let again = fixture.convert(&app, &app, &["--index"]);
    assert_eq!(again["index"], first["index"]);
    assert_eq!(fixture.registry.stats().uploads, [].into());
    fixture.run(&["check", &app, "--source", &app]).success();
}

#[test]
fn the_original_comes_along_into_another_registry() {
    let fixture = Fixture::new();
    let app = fixture.reference("app", "v1");
    let other = TestRegistry::start(Config::default()).unwrap();
    let there = other.reference("there", "v1");
    fixture.registry.reset_stats();
    fixture.convert(&app, &there, &["--index", "--no-cache"]);
    let read_once = |registry: &TestRegistry| {
        let stats = registry.stats();
        assert_eq!((stats.blobs.len(), stats.duplicate_bytes), (3, 0), "config and two layers: {:#?}", stats.blobs);
    };
    read_once(&fixture.registry);
    let bytes = fixture.registry.manifest("app", "v1").unwrap().unwrap();
    let digest = Sha256::of(&bytes);
    assert_eq!(other.manifest("there", &digest.to_string()).unwrap(), Some(bytes.clone()));
    let manifest: Value = serde_json::from_slice(&bytes).unwrap();
    let blobs = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]);
    for blob in blobs {
        let digest: Sha256 = blob["digest"].as_str().unwrap().parse().unwrap();
        assert_eq!(other.contents("there", digest).unwrap(), fixture.registry.contents("app", digest).unwrap());
        assert!(other.contents("there", digest).unwrap().is_some());
    }
    // Of what was converted before, the original alone is read.
    let later = other.reference("later", "v1");
    fixture.convert(&app, &later, &["--no-cache"]);
    fixture.registry.reset_stats();
    fixture.convert(&app, &later, &["--no-cache", "--index"]);
    read_once(&fixture.registry);
    assert_eq!(other.manifest("later", "v1").unwrap(), other.manifest("there", "v1").unwrap());
    // In a layout, which runtimes can read too.
    let layout = format!("oci:{}:v1", fixture.root.join("layout").display());
    fixture.convert(&app, &layout, &["--index"]);
    fixture.run(&["check", fixture.root.join("layout").to_str().unwrap(), "--source", &app]).success();
    // And what has no manifest has nothing to keep.
    let directory = format!("dir:{}", fixture.root.dir("tree").unwrap().display());
    fixture.run(&["convert", "--index", &directory, &layout]).refused(2, &["no manifest"]);
}

#[test]
fn one_platform_or_all() {
    let fixture = Fixture::new();
    let (all, made) = (fixture.reference("app", "all"), fixture.reference("made", "v1"));
    let one = fixture.convert(&all, &made, &["--platform", "linux/arm64"]);
    assert_eq!(platforms(&fixture.entries("made", "v1")), ["arm64+erofs"]);
    let both = fixture.convert(&all, &made, &["--all-platforms", "--index"]);
    let entries = fixture.entries("made", "v1");
    assert_eq!(platforms(&entries), ["amd64", "amd64+erofs", "arm64", "arm64+erofs"]);
    assert_eq!(entries[2]["platform"]["variant"], "v8", "as the source lists it");
    assert_eq!(both["images"].as_array().unwrap().len(), 2);
    assert_eq!(both["images"][1]["manifest"], one["images"][0]["manifest"]);
    // What the layers have in common is converted once.
    assert_eq!(both["images"][0]["layers"][0]["digest"], both["images"][1]["layers"][0]["digest"]);
    let inspected = fixture.run(&["inspect", "--json", "--platform", "linux/arm64", &made]).success();
    let inspected: Value = serde_json::from_str(&inspected.stdout).unwrap();
    assert_eq!(inspected["manifest"], one["images"][0]["manifest"]);
    let checked = fixture.run(&["check", "--json", &made, "--source", &all]).success();
    let checked: Value = serde_json::from_str(&checked.stdout).unwrap();
    assert_eq!(checked["images"].as_array().unwrap().len(), 2);

    fixture.run(&["convert", &all, &made, "--platform", "linux/riscv64"]).refused(3, &["linux/riscv64", "linux/arm64"]);
    fixture.run(&["convert", &all, &made, "--platform", "riscv64"]).refused(2, &["riscv64"]);
}

#[test]
fn profiles_stay_as_long_as_their_image_is_listed() {
    let fixture = Fixture::new();
    let (app, made) = (fixture.reference("app", "v1"), fixture.reference("made", "v1"));
    fixture.convert(&app, &made, &[]);
    let list = fixture.root.file("list", "top\n").unwrap();
    let trace = fixture.root.join("trace");
    let (list, trace) = (list.to_str().unwrap(), trace.to_str().unwrap());
    fixture.run(&["trace", "from-list", list, "--image", &made, "-o", trace]).success();
    fixture.run(&["optimize", &made, "--trace", trace, "--name", "web"]).success();
    let with_profile = fixture.digest("made", "v1");
    assert_eq!(fixture.entries("made", "v1").len(), 2);

    let again = fixture.convert(&app, &made, &[]);
    assert_eq!(again["index"].as_str(), Some(&*with_profile), "the tag is as it was");
    fixture.convert(&app, &made, &["--index"]);
    let entries = fixture.entries("made", "v1");
    assert_eq!(platforms(&entries), ["amd64", "amd64+erofs", "unknown"]);
    fixture.run(&["check", &made]).success();

    // Another image: its profile would be of no use.
    fixture.convert(&fixture.reference("app", "v2"), &made, &[]);
    assert_eq!(platforms(&fixture.entries("made", "v1")), ["amd64+erofs"]);
}
