//! `ublkimg convert` as scripts use it: what it prints, its exit codes, and that a failure leaves nothing half-made.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use ublkimg_image::Sha256;
use ublkimg_tests::command::{Outcome, ublkimg};
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Auth, Config, Credentials, Fault, TestRegistry, Toxic};
use ublkimg_tests::sample_image::{SampleImage, noise};
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};
use ublkimg_tests::temp_root::TempRoot;

/// A root with a source layout `source`, and the directories that conversions use.
struct Fixture {
    root: TempRoot,
    layout: OciLayout,
    manifest: Value,
}

impl Fixture {
    /// With one image, `v1`, of these layers.
    fn new(layers: &[Layer]) -> Self {
        let root = TempRoot::new().unwrap();
        root.dir("spool").unwrap();
        let layout = OciLayout::create(&root.join("source")).unwrap();
        let manifest = layout.add_image("v1", layers).unwrap();
        Self { root, layout, manifest }
    }

    /// With a layer of one file and a layer of half a megabyte of noise.
    fn small() -> Self {
        let layer = |entry| Layer { tar: archive(&[entry], LongNames::Pax), compression: Compression::Gzip };
        Self::new(&[layer(Entry::file("a", "1")), layer(Entry::file("noise", noise(1, 500_000)))])
    }

    fn layer_path(&self, layer: usize) -> PathBuf {
        self.layout.blob_path(self.layer_digest(layer))
    }

    fn layer_digest(&self, layer: usize) -> Sha256 {
        self.manifest["layers"][layer]["digest"].as_str().unwrap().parse().unwrap()
    }

    fn source(&self) -> String {
        format!("oci:{}:v1", self.root.join("source").display())
    }

    fn destination(&self) -> String {
        format!("oci:{}:v2", self.root.join("destination").display())
    }

    fn convert(&self, source: &str, destination: &str) -> Outcome {
        ublkimg(self.root.path()).args(["convert", source, destination, "--tmpdir"]).arg(self.root.join("spool")).run()
    }

    fn nothing_is_half_made(&self) {
        assert_eq!(names(&self.root.join("spool")), [""; 0], "temporary files");
        let destination = self.root.join("destination");
        if destination.exists() {
            for name in names(&destination.join("blobs/sha256")) {
                let bytes = std::fs::read(destination.join("blobs/sha256").join(&name)).unwrap();
                assert_eq!(Sha256::of(&bytes).hex(), name, "a blob that is not whole");
            }
            let index: Value = std::fs::read(destination.join("index.json"))
                .map_or(Value::Null, |b| serde_json::from_slice(&b).unwrap());
            assert!(index["manifests"].as_array().is_none_or(Vec::is_empty), "{index}");
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn the_same_image_on_every_way() {
    let root = TempRoot::new().unwrap();
    SampleImage::default().write_layout(&root.join("source"), "v1").unwrap();
    let registry = TestRegistry::start(Config::default()).unwrap();
    registry.load_layout(&root.join("source"), Some("v1"), "plain", "v1").unwrap();
    let plain = format!("oci:{}:v1", root.join("source").display());
    let layout = format!("oci:{}:v2", root.join("destination").display());
    let pushed = registry.reference("converted", "v2");

    let to_layout = ublkimg(root.path()).args(["convert", &plain, &layout]).run().success();
    let digest = to_layout.stdout.trim_end().rsplit_once('@').unwrap().1.to_owned();
    assert_eq!(to_layout.stdout, format!("{layout}@{digest}\n"));
    let to_registry =
        ublkimg(root.path()).args(["convert", &registry.reference("plain", "v1"), &pushed]).run().success();
    assert_eq!(to_registry.stdout, format!("{pushed}@{digest}\n"), "the same bytes from the same layers");
    let index = registry.manifest("converted", "v2").unwrap().unwrap();
    assert_eq!(Sha256::of(&index).to_string(), digest);

    registry.reset_stats();
    let again = ublkimg(root.path()).args(["convert", "--json", "--threads", "1", &plain, &pushed]).run().success();
    let json: Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!(json["index"], digest.as_str());
    assert_eq!(json["images"][0]["layers"].as_array().unwrap().len(), 3);
    assert!(json["images"][0]["layers"].as_array().unwrap().iter().all(|layer| layer["existed"] == true), "{json}");

    let inspected = ublkimg(root.path()).args(["inspect", "--json", &pushed]).run().success();
    let json: Value = serde_json::from_str(&inspected.stdout).unwrap();
    assert!(json.is_object(), "{json}");
}

#[test]
fn bad_usage() {
    let fixture = Fixture::small();
    fixture.convert("UPPER/case:x", &fixture.destination()).refused(2, &["UPPER/case:x"]);
    fixture.convert(&fixture.source(), "oci:").refused(2, &["oci:"]);
    let outcome = ublkimg(fixture.root.path()).args(["convert", &fixture.source()]).run();
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{}", outcome.stderr);
    fixture.nothing_is_half_made();
}

#[test]
fn missing_images() {
    let fixture = Fixture::small();
    let registry = TestRegistry::start(Config::default()).unwrap();
    let missing = registry.reference("no/image", "v1");
    fixture.convert(&missing, &fixture.destination()).refused(3, &[&registry.addr().to_string(), "no/image", "v1"]);
    let no_tag = fixture.source().replace(":v1", ":v9");
    fixture.convert(&no_tag, &fixture.destination()).refused(3, &["v9"]);
    let no_layout = format!("oci:{}:v1", fixture.root.join("nowhere").display());
    fixture.convert(&no_layout, &fixture.destination()).refused(3, &["nowhere"]);
    for kind in ["oci-archive", "docker-archive", "dir"] {
        let missing = format!("{kind}:{}", fixture.root.join("nowhere").display());
        fixture.convert(&missing, &fixture.destination()).refused(3, &["nowhere"]);
    }
    std::fs::remove_file(fixture.layer_path(1)).unwrap();
    let digest = fixture.layer_digest(1).to_string();
    fixture.convert(&fixture.source(), &fixture.destination()).refused(3, &[&digest]);
    fixture.nothing_is_half_made();
}

#[test]
fn credentials_missing_and_wrong() {
    let fixture = Fixture::small();
    let credentials = Credentials::new("user", "secret");
    let bearer = Auth::Bearer { credentials: credentials.clone(), anonymous_pull: true, token_lifetime_s: 60 };
    for auth in [Auth::Basic(credentials), bearer] {
        let registry = TestRegistry::start(Config { auth, ..Config::default() }).unwrap();
        let destination = registry.reference("a", "v1");
        let address = registry.addr().to_string();
        fixture.convert(&fixture.source(), &destination).refused(4, &[&address]);
        let with_password = |password: &str| {
            let encoded =
                base64::Engine::encode(&base64::engine::general_purpose::STANDARD, format!("user:{password}"));
            let auths = serde_json::json!({"auths": {address.as_str(): {"auth": encoded}}});
            let file = fixture.root.file("auth.json", auths.to_string()).unwrap();
            let source = fixture.source();
            ublkimg(fixture.root.path()).args(["convert", &source, &destination, "--auth-file"]).arg(file).run()
        };
        let wrong = with_password("guess");
        wrong.refused(4, &[&address]);
        assert!(!wrong.stderr.contains("guess"), "passwords are not for logs");
        assert_eq!(registry.manifest("a", "v1").unwrap(), None);
        with_password("secret").success();
    }
}

#[test]
fn a_registry_that_is_down() {
    let fixture = Fixture::small();
    let registry = TestRegistry::start(Config::default()).unwrap();
    registry.set_fault("down", Fault::new("*", Toxic::Refuse));
    let destination = registry.reference("a", "v1");
    fixture.convert(&fixture.source(), &destination).refused(7, &[&registry.addr().to_string()]);
    fixture.nothing_is_half_made();
}

#[test]
fn trouble_on_the_way_is_waited_out() {
    let fixture = Fixture::small();
    let registry = TestRegistry::start(Config::default()).unwrap();
    registry.load_layout(&fixture.root.join("source"), None, "plain", "v1").unwrap();
    registry.set_fault("busy", Fault::new("*/manifests/*", Toxic::TooManyRequests { retry_after_s: 1 }).times(1));
    registry
        .set_fault("cut", Fault::new("*/blobs/sha256*", Toxic::Reset { after_bytes: 100_000 }).method("GET").times(2));
    registry.set_fault("error", Fault::new("*/blobs/uploads/*", Toxic::Status { code: 503 }).times(1));
    fixture.convert(&registry.reference("plain", "v1"), &registry.reference("converted", "v1")).success();
    for name in ["busy", "cut", "error"] {
        assert!(registry.fault_hits(name) > 0, "{name}");
    }
}

#[test]
fn damaged_layers() {
    let cut = Fixture::small();
    let digest = cut.layer_digest(1).to_string();
    let file = std::fs::OpenOptions::new().write(true).open(cut.layer_path(1)).unwrap();
    let len_bytes = file.metadata().unwrap().len();
    file.set_len(len_bytes / 2).unwrap();
    cut.convert(&cut.source(), &cut.destination()).refused(6, &[&digest]);
    cut.nothing_is_half_made();

    let flipped = Fixture::small();
    let digest = flipped.layer_digest(1).to_string();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(flipped.layer_path(1)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, len_bytes / 2).unwrap();
    file.write_all_at(&[byte[0] ^ 1], len_bytes / 2).unwrap();
    flipped.convert(&flipped.source(), &flipped.destination()).refused(6, &[&digest]);
    flipped.nothing_is_half_made();
}

/// The digests are right; what they vouch for is not.
#[test]
fn malformed_layers() {
    let good = archive(&[Entry::file("a", noise(1, 5000))], LongNames::Pax);
    let cases: [(Vec<u8>, &[&str]); 5] = [
        (archive(&[Entry::file("x/../../etc/passwd", "")], LongNames::Pax), &["../.."]),
        (good[..2048].to_vec(), &["truncated"]),
        (b"hello, world\n".repeat(100), &["checksum"]),
        (archive(&[Entry::hard_link("link", "no/such/target")], LongNames::Pax), &["link"]),
        (archive(&[Entry::file("f", ""), Entry::file("f/g", "")], LongNames::Pax), &["f/g"]),
    ];
    for (tar, names) in cases {
        let fixture = Fixture::new(&[Layer { tar, compression: Compression::None }]);
        let outcome = fixture.convert(&fixture.source(), &fixture.destination());
        outcome.refused(11, names);
        fixture.nothing_is_half_made();
    }
}

#[test]
fn sources_that_are_no_images() {
    let fixture = Fixture::small();
    let registry = TestRegistry::start(Config::default()).unwrap();
    for (name, manifest) in [("rubbish", "{"), ("empty", "{}"), ("version", r#"{"schemaVersion": 1}"#)] {
        registry.put_manifest(name, "application/vnd.oci.image.manifest.v1+json", manifest, Some("v1")).unwrap();
        let source = registry.reference(name, "v1");
        let outcome = fixture.convert(&source, &fixture.destination());
        outcome.refused(11, &[&source]);
    }
    fixture.nothing_is_half_made();
}

#[test]
fn a_full_disk() {
    if !skip::is_root() {
        skip!("a small file system needs root");
    }
    let fixture = Fixture::small();
    let spool = fixture.root.tmpfs("spool", 200 * 1024).unwrap();
    fixture.convert(&fixture.source(), &fixture.destination()).refused(10, &[spool.to_str().unwrap()]);
    fixture.nothing_is_half_made();
}

#[test]
fn a_full_disk_at_the_destination() {
    if !skip::is_root() {
        skip!("a small file system needs root");
    }
    let fixture = Fixture::small();
    let destination = fixture.root.tmpfs("destination", 200 * 1024).unwrap();
    fixture.convert(&fixture.source(), &fixture.destination()).refused(10, &[destination.to_str().unwrap()]);
    let left = std::fs::read_dir(destination.join("blobs/sha256")).unwrap();
    assert!(left.into_iter().all(|blob| !blob.unwrap().file_name().to_string_lossy().contains("tmp")));
}
