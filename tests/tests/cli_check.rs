//! `ublkimg check`, `export` and `inspect`: a converted image, looked at without a device.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::Value;
use ublkimg_image::Sha256;
use ublkimg_tests::command::{Invocation, Outcome, ublkimg};
use ublkimg_tests::compare::compare_trees;
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::sample_image::{SampleImage, noise};
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};
use ublkimg_tests::temp_root::TempRoot;

/// The sample image in the layout `source`, converted in the layout `made`.
struct Fixture {
    root: TempRoot,
}

impl Fixture {
    fn new() -> Self {
        let root = TempRoot::new().unwrap();
        SampleImage::default().write_layout(&root.join("source"), "v1").unwrap();
        let fixture = Self { root };
        fixture.run(&["convert", &fixture.source(), &format!("oci:{}:v1", fixture.made())]).success();
        fixture
    }

    fn source(&self) -> String {
        format!("oci:{}:v1", self.root.join("source").display())
    }

    fn made(&self) -> String {
        self.root.join("made").to_str().unwrap().to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        ublkimg(self.root.path()).args(arguments).run()
    }

    fn inspect(&self) -> Value {
        serde_json::from_str(&self.run(&["inspect", "--json", &self.made()]).success().stdout).unwrap()
    }

    fn blob_path(&self, digest: &Value) -> PathBuf {
        let digest: Sha256 = digest.as_str().unwrap().parse().unwrap();
        self.root.join("made/blobs/sha256").join(digest.hex())
    }
}

#[test]
fn a_whole_image_is_whole() {
    let fixture = Fixture::new();
    let checked = fixture.run(&["check", "--json", &fixture.made()]).success();
    let checked: Value = serde_json::from_str(&checked.stdout).unwrap();
    let image = &checked["images"][0];
    assert_eq!((&image["layers"], &image["compared"]), (&3.into(), &Value::Null));
    assert!(image["objects"].as_u64().unwrap() > 450, "{image}");

    let compared = fixture.run(&["check", "--json", &fixture.made(), "--source", &fixture.source()]).success();
    let compared: Value = serde_json::from_str(&compared.stdout).unwrap();
    assert!(compared["images"][0]["compared"].as_u64().unwrap() > 450, "{compared}");
    let text = fixture.run(&["check", &fixture.made(), "--source", &fixture.source()]).success();
    assert!(text.stdout.contains(" ok: 3 layers, "), "{}", text.stdout);
}

/// Whatever byte of a layer blob changes, the check names the blob.
#[test]
fn a_changed_byte_is_found_wherever_it_is() {
    let fixture = Fixture::new();
    let inspected = fixture.inspect();
    let blob = &inspected["layers"][0]["digest"];
    let path = fixture.blob_path(blob);
    let size_bytes = fs::metadata(&path).unwrap().len();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // Merge record, metadata, data, frame of the index, index, last byte.
    for at in [9, 600, size_bytes / 2, size_bytes - 40, size_bytes - 1] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        fixture.run(&["check", &fixture.made()]).refused(6, &[blob.as_str().unwrap()]);
        file.write_all_at(&byte, at).unwrap();
    }
    fixture.run(&["check", &fixture.made()]).success();
    let kept = fixture.root.join("kept");
    fs::rename(&path, &kept).unwrap();
    fixture.run(&["check", &fixture.made()]).refused(3, &[blob.as_str().unwrap()]);
    fs::rename(&kept, &path).unwrap();
    let metadata = fixture.blob_path(&inspected["metadata"]["digest"]);
    File::options().write(true).open(&metadata).unwrap().write_all_at(b"not what it was", 100).unwrap();
    fixture.run(&["check", &fixture.made()]).refused(6, &[]);
}

/// An image that is whole, but not of that source.
#[test]
fn another_source_is_told_apart() {
    let root = TempRoot::new().unwrap();
    let layout = OciLayout::create(&root.join("source")).unwrap();
    let base =
        || vec![Entry::file("etc/a", noise(1, 300_000)), Entry::hard_link("etc/b", "etc/a"), Entry::directory("etc")];
    let mut cases = vec![("v1", base())];
    let mut other = base();
    other[0] = Entry::file("etc/a", {
        let mut bytes = noise(1, 300_000);
        bytes[299_999] ^= 1;
        bytes
    });
    cases.push(("content", other));
    cases.push(("mode", vec![base()[0].clone().mode(0o600), base()[1].clone(), base()[2].clone()]));
    cases.push(("time", vec![base()[0].clone(), base()[1].clone(), Entry::directory("etc").mtime(7, 1)]));
    cases.push(("link", vec![base()[0].clone(), Entry::file("etc/b", noise(1, 300_000)), base()[2].clone()]));
    cases.push(("more", [base(), vec![Entry::file("etc/c", "")]].concat()));
    for (tag, entries) in &cases {
        let layer = Layer { tar: archive(entries, LongNames::Pax), compression: Compression::None };
        layout.add_image(tag, &[layer]).unwrap();
    }
    let source = |tag: &str| format!("oci:{}:{tag}", root.join("source").display());
    let made = root.join("made").to_str().unwrap().to_owned();
    let check = |tag: &str| ublkimg(root.path()).args(["check", &made, "--source", &source(tag)]).run();
    ublkimg(root.path()).args(["convert", &source("v1"), &format!("oci:{made}:v1")]).run().success();
    check("v1").success();
    let named = [
        ("content", "/etc/a: its content"),
        ("mode", "/etc/a: its mode"),
        ("time", "/etc: its time"),
        ("link", "/etc/b: its hard links"),
        ("more", "/etc: c is missing"),
    ];
    for (tag, text) in named {
        check(tag).refused(6, &[text]);
    }
    layout.add_image("two", &[]).unwrap();
    check("two").refused(6, &["1 layers"]);
    ublkimg(root.path()).args(["check", &source("v1")]).run().refused(5, &["convert"]);
}

#[test]
fn an_exported_image_mounts_without_us() {
    if !skip::is_root() {
        skip!("mounting needs root");
    }
    let fixture = Fixture::new();
    let out = fixture.root.dir("out").unwrap();
    let printed = fixture.run(&["export", &fixture.made(), out.to_str().unwrap()]).success();
    let file = PathBuf::from(printed.stdout.trim_end());
    assert_eq!((file.parent(), file.extension()), (Some(&*out), Some("erofs".as_ref())));
    let expected = fixture.root.dir("expected").unwrap();
    SampleImage::default().write_expected_tree(&expected).unwrap();
    let mounted = fixture.root.dir("mounted").unwrap();
    let mount = Invocation::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(&file).arg(&mounted).run();
    if mount.code != Some(0) {
        skip!("no loop mount of erofs here: {}", mount.stderr);
    }
    let differences = compare_trees(&expected, &mounted);
    Invocation::new("umount").arg(&mounted).run().success();
    assert_eq!(differences.unwrap(), Vec::<String>::new());

    // To a name; a file that is there stays; nothing half-made.
    let other = out.join("other");
    fixture.run(&["export", &fixture.made(), other.to_str().unwrap()]).success();
    assert_eq!(fs::read(&other).unwrap(), fs::read(&file).unwrap());
    fixture.run(&["export", &fixture.made(), other.to_str().unwrap()]).refused(2, &["exists"]);
    let small = fixture.root.tmpfs("small", 1 << 20).unwrap();
    fixture.run(&["export", &fixture.made(), small.to_str().unwrap()]).refused(10, &[]);
    assert_eq!(fs::read_dir(&small).unwrap().count(), 0);
}

#[test]
fn what_an_image_costs() {
    let root = TempRoot::new().unwrap();
    let layout = OciLayout::create(&root.join("source")).unwrap();
    let large = noise(1, 600_000);
    let layers = [
        vec![Entry::file("a", large.clone()), Entry::file("copy", large.clone()), Entry::file("small", "x")],
        vec![Entry::file("again", large), Entry::symlink("link", "a"), Entry::hard_link("hard", "a")],
    ];
    let layers = layers.map(|entries| Layer { tar: archive(&entries, LongNames::Pax), compression: Compression::Gzip });
    layout.add_image("v1", &layers).unwrap();
    let source = format!("oci:{}:v1", root.join("source").display());
    let made = root.join("made").to_str().unwrap().to_owned();
    ublkimg(root.path()).args(["convert", &source, &format!("oci:{made}:v1")]).run().success();

    let json = ublkimg(root.path()).args(["inspect", "--json", "--largest", "2", &made]).run().success();
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    let contents = &json["contents"];
    let counts = ["files", "directories", "others", "file_bytes"].map(|key| contents[key].as_u64().unwrap());
    assert_eq!(counts, [4, 1, 1, 1_800_001]);
    assert!(contents["shared_bytes"].as_u64().unwrap() >= 600_000, "{contents}");
    // The large file of the second layer has the chunks of the first layer's.
    assert_eq!(json["duplicates"]["chunks"], 3);
    assert!(json["duplicates"]["stored_bytes"].as_u64().unwrap() > 590_000);
    let largest: Vec<&str> =
        contents["largest"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    assert_eq!(largest, ["/a", "/again"]);
    assert!(json["metadata"]["raw_bytes"].as_u64().unwrap() >= 8192);
    assert_eq!(json["layers"][0]["settings"], json["layers"][1]["settings"]);
    let text = ublkimg(root.path()).args(["inspect", &made]).run().success().stdout;
    for part in ["4 files", "LARGEST FILES", "/again", "metadata"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
