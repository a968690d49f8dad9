//! Traces and profiles as scripts use them: what the commands print, write and refuse. No device is needed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use serde_json::Value;
use ublkimg_tests::command::{Outcome, ublkimg};
use ublkimg_tests::registry::{Config, TestRegistry};
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::temp_root::TempRoot;

/// The sample image, converted, as `sample:v1` of a registry.
struct Fixture {
    root: TempRoot,
    registry: TestRegistry,
}

impl Fixture {
    fn new() -> Self {
        let root = TempRoot::new().unwrap();
        let registry = TestRegistry::start(Config::default()).unwrap();
        SampleImage::default().write_layout(&root.join("source"), "v1").unwrap();
        let source = format!("oci:{}:v1", root.join("source").display());
        let fixture = Self { root, registry };
        fixture.run(&["convert", &source, &fixture.reference()]).success();
        fixture
    }

    fn reference(&self) -> String {
        self.registry.reference("sample", "v1")
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        ublkimg(self.root.path()).args(arguments).run()
    }

    /// What a command prints with `--json`.
    fn json(&self, arguments: &[&str]) -> Value {
        let outcome = self.run(&[arguments, &["--json"]].concat()).success();
        serde_json::from_str(&outcome.stdout).unwrap()
    }

    fn path(&self, name: &str) -> String {
        self.root.join(name).to_str().unwrap().to_owned()
    }

    /// A trace of these files, read one after another by `command`.
    fn trace(&self, name: &str, command: &[&str], files: &[&str]) -> String {
        let list = self.path(&format!("{name}.list"));
        std::fs::write(&list, files.join("\n")).unwrap();
        let trace = self.path(name);
        let image = self.reference();
        let arguments = ["trace", "from-list", &list, "--image", &image, "-o", &trace, "--command"];
        self.run(&[&arguments, command].concat()).success();
        trace
    }

    /// The manifest that hosts choose.
    fn chosen(&self) -> Value {
        self.json(&["inspect", &self.reference()])["manifest"].clone()
    }
}

const FILES: [&str; 3] = ["/data/prose", "bin/tool", "sizes/262145"];

#[test]
fn a_list_of_paths_becomes_a_trace_that_can_be_looked_at() {
    let fixture = Fixture::new();
    let image = fixture.reference();
    let list = fixture.path("list");
    // A link, a comment, a range, and three lines that name no file.
    let text = "/bin/sh\n# comment\n\n/data/prose:8192-4096\n/etc/removed\n/etc\nlinks/dangling\n";
    std::fs::write(&list, text).unwrap();
    let trace = fixture.path("trace");
    let made = fixture.run(&["trace", "from-list", &list, "--image", &image, "-o", &trace]).success();
    assert_eq!(made.stdout, format!("{trace}: 19 blocks (76.0 KiB)\n"));
    let skipped: Vec<&str> = made.stderr.lines().collect();
    assert_eq!(skipped.len(), 3, "{}", made.stderr);
    assert!(skipped[0].contains("list:5: /etc/removed: no such file"), "{}", made.stderr);

    let shown = fixture.json(&["trace", "show", &trace, "--image", &image]);
    assert_eq!(shown["blocks"], 19);
    assert_eq!(shown["manifest"], fixture.chosen());
    let files: Vec<(&str, u64, u64)> = shown["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| {
            let number = |key: &str| file[key].as_u64().unwrap();
            (file["path"].as_str().unwrap(), number("blocks"), number("file_blocks"))
        })
        .collect();
    assert_eq!(files, [("/bin/tool", 18, 18), ("/data/prose", 1, 768)]);
    assert_eq!(
        shown["timeline"].as_array().unwrap().iter().map(|step| step["blocks"].as_u64().unwrap()).sum::<u64>(),
        19
    );
    let text = fixture.run(&["trace", "show", &trace, "--image", &image]).success().stdout;
    assert!(text.contains("94.7 %") && text.contains("/data/prose"), "{text}");
    let without_image = fixture.json(&["trace", "show", &trace]);
    assert_eq!(without_image["files"], Value::Null);

    std::fs::write(&list, "/nothing\n").unwrap();
    fixture.run(&["trace", "from-list", &list, "--image", &image, "-o", &trace]).refused(2, &["list", "no line"]);
}

#[test]
fn traces_of_one_command_are_compared_and_merged() {
    let fixture = Fixture::new();
    let [first, second, third] = [FILES[0], FILES[1], FILES[2]];
    let a = fixture.trace("a", &["app", "--serve"], &[first, second]);
    let b = fixture.trace("b", &["app", "--serve"], &[second, third]);
    let other = fixture.trace("other", &["worker"], &[first]);
    let diff = fixture.json(&["trace", "diff", &a, &b]);
    assert_eq!((diff["common_blocks"].as_u64(), diff["only_left_blocks"].as_u64()), (Some(18), Some(768)));
    assert_eq!((diff["same_command"].as_bool(), diff["order_tau"].as_f64()), (Some(true), Some(1.0)));
    let text = fixture.run(&["trace", "diff", &a, &b]).success().stdout;
    assert!(text.contains("only in") && text.contains("3.0 MiB"), "{text}");
    assert_eq!(diff["files"], Value::Null, "no image, no names");
    let image = fixture.reference();
    let files = fixture.json(&["trace", "diff", &a, &b, "--image", &image])["files"].clone();
    let path = |place: usize| files[place]["path"].as_str().unwrap();
    // The first piece of the third file is also the whole of another, whose name comes first.
    assert_eq!([path(0), path(1), path(2)], ["/data/prose", "/sizes/262144", "/sizes/262145"], "{files}");
    assert_eq!(files.as_array().unwrap().len(), 3);
    let right = |place: usize| files[place]["only_right_blocks"].as_u64();
    assert_eq!((files[0]["only_left_blocks"].as_u64(), right(1), right(2)), (Some(768), Some(64), Some(1)));
    let text = fixture.run(&["trace", "diff", &a, &b, "--image", &image, "--files", "1"]).success().stdout;
    assert!(text.contains("/data/prose") && text.contains("and 2 more files"), "{text}");

    let merged = fixture.path("merged");
    let summary = fixture.json(&["trace", "merge", &a, &b, "-o", &merged]);
    assert_eq!((summary["runs"].as_u64(), summary["blocks_in_all"].as_u64()), (Some(2), Some(18)));
    let again = fixture.path("again");
    fixture.run(&["trace", "merge", &a, &b, "-o", &again]).success();
    assert_eq!(std::fs::read(&merged).unwrap(), std::fs::read(&again).unwrap(), "the same input, the same bytes");
    let outcome = fixture.run(&["trace", "merge", &a, &other, "-o", &fixture.path("no")]);
    outcome.refused(2, &["app", "worker", "--force"]);
    assert!(!PathBuf::from(fixture.path("no")).exists());
    fixture.run(&["trace", "merge", "--force", &a, &other, "-o", &fixture.path("forced")]).success();
}

#[test]
fn pictures_are_made_of_traces_and_of_starts() {
    let fixture = Fixture::new();
    let trace = fixture.trace("a", &["app"], &FILES);
    let events = fixture.path("events");
    let lines = [
        r#"{"mark":"attach","at_us":5}"#,
        r#"{"fetch":"trace","start_us":10,"end_us":90000,"bytes":1048576}"#,
        r#"{"fetch":"demand","start_us":20000,"end_us":60000,"bytes":90000}"#,
        r#"{"read":"hit","at_us":95000,"blocks":1}"#,
        r#"{"read":"miss","at_us":20000,"blocks":32,"stall_us":40000}"#,
        r#"{"mark":"ready","at_us":99000}"#,
    ];
    std::fs::write(&events, lines.join("\n")).unwrap();
    let picture = fixture.path("picture.svg");
    let draw = |arguments: &[&str]| {
        fixture.run(&[&["trace", "plot"], arguments, &["-o", &picture]].concat()).success();
        let text = std::fs::read_to_string(&picture).unwrap();
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"), "{text}");
        text
    };
    let plain = draw(&[&trace]);
    assert!(plain.contains("read before, MiB") && plain.contains("in the layers, MiB"), "{plain}");
    let named = draw(&[&trace, "--image", &fixture.reference()]);
    assert!(named.contains("layer 1") && named.contains("First reads of app"), "{named}");
    let waterfall = draw(&[&events]);
    assert!(["hit: 1", "miss: 1", "ready", "by trace"].iter().all(|text| waterfall.contains(text)), "{waterfall}");
    fixture.run(&["trace", "plot", &fixture.path("a.list"), "-o", &picture]).refused(2, &["a.list", "not a trace"]);
}

#[test]
fn a_pushed_trace_is_pulled_again() {
    let fixture = Fixture::new();
    let image = fixture.reference();
    let (index, chosen) = (fixture.registry.manifest("sample", "v1").unwrap(), fixture.chosen());
    let trace = fixture.trace("a", &["app", "--serve"], &FILES);
    let other = fixture.trace("b", &["worker"], &FILES[..1]);
    let back = fixture.path("back");
    fixture.run(&["trace", "pull", &image, "-o", &back]).refused(3, &["no profile"]);
    let pushed = fixture.json(&["trace", "push", &trace, &image, "--name", "web"]);
    assert_eq!(pushed["image"], chosen);
    fixture.run(&["trace", "pull", &image, "-o", &back]).success();
    assert_eq!(std::fs::read(&trace).unwrap(), std::fs::read(&back).unwrap());
    fixture.run(&["trace", "push", &other, &image]).success();
    let pulled = fixture.json(&["trace", "pull", &image, "-o", &back, "--command", "worker", ";"]);
    assert_eq!((pulled["found_in"].as_str(), pulled["command"][0].as_str()), (Some("referrer"), Some("worker")));
    assert_eq!(std::fs::read(&other).unwrap(), std::fs::read(&back).unwrap());
    let pulled = fixture.json(&["trace", "pull", &image, "--name", "web", "-o", &back]);
    assert_eq!(pulled["profile"], pushed["profile"]);
    fixture.run(&["trace", "pull", &image, "-o", &back]).refused(3, &["--name", "--command"]);
    fixture.run(&["trace", "pull", &image, "--name", "none-such", "-o", &back]).refused(3, &["none-such"]);
    assert_eq!(fixture.registry.manifest("sample", "v1").unwrap(), index, "a referrer changes no tag");
}

#[test]
fn optimize_reads_what_it_needs_and_uploads_no_layer() {
    let fixture = Fixture::new();
    let image = fixture.reference();
    let chosen = fixture.chosen();
    let trace = fixture.trace("a", &["app", "--serve"], &FILES);
    fixture.registry.reset_stats();
    let report = fixture.json(&["optimize", &image, "--trace", &trace, "--name", "web", "--default"]);
    let stats = fixture.registry.stats();
    assert_eq!(stats.duplicate_bytes, 0, "each chunk is read once");
    let inspected = fixture.json(&["inspect", &image]);
    let layers: Vec<&str> =
        inspected["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap()).collect();
    let of_layers = stats.blobs.iter().filter(|(digest, _)| layers.contains(&digest.as_str()));
    let read: u64 = of_layers.map(|(_, blob)| blob.bytes_sent).sum();
    let hot = &report["hot"];
    assert_eq!(Some(read), hot["chunk_bytes_read"].as_u64());
    // These files fill their chunks, and frames are cut elsewhere: about as many bytes, where most images have far fewer.
    assert!(hot["stored_bytes"].as_u64().unwrap() <= read + read / 20, "{report}");
    assert_eq!((report["blocks"].as_u64(), report["is_default"].as_bool()), (hot["blocks"].as_u64(), Some(true)));
    // Three blobs: trace, hot blob, table. An upload is asked for, then sent.
    assert_eq!(stats.requests_of("upload"), 6, "{:?}", stats.requests);
    assert_eq!(fixture.chosen(), chosen, "hosts choose the same image");
    let index = fixture.registry.manifest("sample", "v1").unwrap().unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["manifests"][1]["digest"], report["profile"]);
    assert_eq!(index["manifests"][1]["platform"]["os"], "unknown");
    assert_eq!(inspected["profiles"][0]["name"], "web");

    fixture.registry.reset_stats();
    let again = fixture.json(&["optimize", &image, "--trace", &trace, "--name", "web", "--default"]);
    assert_eq!((again["existed"].as_bool(), &again["index"]), (Some(true), &report["index"]));
    assert_eq!(fixture.registry.stats().requests_of("upload"), 0);
    let printed = fixture.run(&["optimize", &image, "--trace", &trace, "--name", "web", "--default"]).success();
    assert_eq!(printed.stdout, format!("{image}@{}\n", report["index"].as_str().unwrap()));

    let back = fixture.path("back");
    let pulled = fixture.json(&["trace", "pull", &image, "-o", &back]);
    assert_eq!((pulled["found_in"].as_str(), &pulled["profile"]), (Some("index"), &report["profile"]));
    let order = fixture.json(&["optimize", &image, "--trace", &trace, "--order-only"]);
    assert_eq!(order["hot"], Value::Null);
}

#[test]
fn bad_input_has_the_documented_exit_codes() {
    let fixture = Fixture::new();
    let image = fixture.reference();
    let trace = fixture.trace("a", &["app"], &FILES[..1]);
    let list = fixture.path("a.list");
    let optimize = |image: &str, trace: &str| fixture.run(&["optimize", image, "--trace", trace]);
    optimize(&image, &list).refused(2, &["a.list", "not a trace"]);
    optimize(&image, &fixture.path("missing")).refused(3, &["missing"]);
    optimize(&fixture.registry.reference("sample", "v9"), &trace).refused(3, &["v9"]);
    let digest = fixture.chosen();
    let pinned = format!("{}@{}", image, digest.as_str().unwrap());
    optimize(&pinned, &trace).refused(2, &["tag"]);
    let outcome = fixture.run(&["trace", "plot", &trace, "-o", &fixture.path("no/such/dir.svg")]);
    outcome.refused(3, &["no/such/dir.svg"]);
    // A trace of another image.
    let registry = &fixture.registry;
    registry.load_layout(&fixture.root.join("source"), Some("v1"), "plain", "v1").unwrap();
    optimize(&registry.reference("plain", "v1"), &trace).refused(5, &["convert"]);
}
