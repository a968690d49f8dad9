//! A command of an image, started in three ways by one command, as somebody who decides would do it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use serde_json::Value;
use ublkimg_convert::{ErrorKind, unpack};
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{ClientOptions, Location};
use ublkimg_tests::compare::compare_trees;
use ublkimg_tests::host::Host;
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::sample_image::SampleImage;
use ublkimg_tests::tar::{Entry, LongNames, archive};
use ublkimg_tests::temp_root::TempRoot;
use ublkimg_tests::{leaks, skip};

/// What a comparison left in the directories of the host.
fn leftovers(host: &Host) -> Vec<PathBuf> {
    let below = ["store", "run"].map(|name| host.root.join(name));
    let entries = below.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.to_string_lossy().contains("compare")).collect()
}

#[test]
fn three_kinds_of_starts_are_compared_and_leave_nothing() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let reference = host.registry.reference("shell", "v1");
    let source = format!("oci:{}:v1", host.root.join("source").display());
    let page = host.root.join("compare.html");
    let options = ["--from", &source, "--rounds", "1", "--json", "-o", page.to_str().unwrap(), "--"];
    let shell = ["/bin/sh", "-c", "cat /data > /copy"];
    let compared = host.ublkimg(&[&["compare", &reference][..], &options, &shell].concat()).success();
    let compared: Value = serde_json::from_str(&compared.stdout).unwrap();
    let [pull, lazy, followed] = &compared["starts"].as_array().unwrap()[..] else { panic!("{compared}") };
    assert_eq!([&pull["name"], &lazy["name"], &followed["name"]], ["full pull", "lazy", "with profile"]);
    assert_eq!(compared["command"].as_array().unwrap().len(), shell.len(), "{compared}");
    for start in [pull, lazy, followed] {
        let median = |name: &str| start["median"][name].as_u64().unwrap();
        assert!(median("fetched_bytes") > 1 << 20 && median("ready_us") > median("root_us"), "{start}");
    }
    assert_eq!(pull["median"]["first_reads"], Value::Null);
    let misses = |start: &Value| start["median"]["first_reads"]["misses"].as_u64().unwrap();
    assert!(misses(lazy) > misses(followed), "nothing lists a profile, so one was recorded: {compared}");
    let page = std::fs::read_to_string(page).unwrap();
    for part in ["<tr><th>full pull", "<tr><th>with profile", "A start without a profile", "<svg ", "</html>"] {
        assert!(page.contains(part), "{part}");
    }
    assert_eq!(leaks::mounts_below(host.root.path()), Vec::<PathBuf>::new());
    assert_eq!(leftovers(&host), Vec::<PathBuf>::new());
    host.end();
}

#[test]
fn the_original_is_the_one_that_is_listed_or_named() {
    let host = match Host::with_shell() {
        Ok(host) => host,
        Err(reason) => skip!("{reason}"),
    };
    let reference = host.registry.reference("shell", "v1");
    host.ublkimg(&["compare", &reference, "--", "/bin/sh", "-c", ":"]).refused(2, &["shell:v1", "--from"]);
    let both = format!("oci:{}:both", host.root.join("both").display());
    let source = format!("oci:{}:v1", host.root.join("source").display());
    host.ublkimg(&["convert", "--index", &source, &both]).success();
    let options = ["--rounds", "1", "--profile", "none", "--", "/bin/sh", "-c", ":"];
    let compared = host.ublkimg(&[&["compare", &both][..], &options].concat()).success().stdout;
    let first_words: Vec<&str> = compared.lines().filter_map(|line| line.split("  ").next()).collect();
    assert_eq!(first_words[..3], ["start", "full pull", "lazy"], "{compared}");
    let failing = ["--rounds", "1", "--profile", "none", "--", "/bin/sh", "-c", "exit 7"];
    host.ublkimg(&[&["compare", &both][..], &failing].concat()).refused(2, &["7"]);
    assert_eq!(leftovers(&host), Vec::<PathBuf>::new());
    host.end();
}

async fn unpacked(layout: &Path, into: &Path) -> ublkimg_convert::Result<ublkimg_convert::Unpacked> {
    let location = Location::Layout { dir: layout.to_owned(), tag: Some("v1".to_owned()) };
    unpack(&location, &ClientOptions::default(), &Platform::host(), into, into.parent().unwrap()).await
}

#[test]
fn an_unpacked_image_is_the_tree_that_its_layers_mean() {
    if !skip::is_root() {
        skip!("owners and devices need root");
    }
    let root = TempRoot::new().unwrap();
    SampleImage::default().write_layout(&root.join("layout"), "v1").unwrap();
    let (expected, found) = (root.dir("expected").unwrap(), root.dir("found").unwrap());
    SampleImage::default().write_expected_tree(&expected).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let pulled = runtime.block_on(unpacked(&root.join("layout"), &found)).unwrap();
    assert_eq!((pulled.layers, pulled.config.is_empty()), (3, false));
    assert_eq!(compare_trees(&expected, &found).unwrap(), Vec::<String>::new());
}

#[test]
fn no_link_of_a_layer_leads_out_of_the_unpacked_tree() {
    if !skip::is_root() {
        skip!("owners need root");
    }
    let root = TempRoot::new().unwrap();
    let outside = root.dir("outside").unwrap();
    std::fs::write(outside.join("kept"), "kept").unwrap();
    let base = [
        Entry::directory("a"),
        Entry::symlink("out", outside.to_str().unwrap()),
        Entry::symlink("a/up", "../../outside"),
    ];
    let layer = |entries: &[Entry]| Layer { tar: archive(entries, LongNames::Pax), compression: Compression::None };
    let attacks = [
        Entry::file("out/written", "x"),
        Entry::file("a/up/written", "x"),
        Entry::file("a/up/.wh.kept", ""),
        Entry::file("a/up/.wh..wh..opq", ""),
        Entry::hard_link("stolen", "a/up/kept"),
        Entry::hard_link("stolen", "../outside/kept"),
    ];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (number, attack) in attacks.into_iter().enumerate() {
        let (layout, found) = (root.join(format!("layout{number}")), root.dir(format!("found{number}")).unwrap());
        OciLayout::create(&layout).unwrap().add_image("v1", &[layer(&base), layer(&[attack])]).unwrap();
        let error = runtime.block_on(unpacked(&layout, &found)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadSource, "attack {number}: {error}");
        assert!(!found.join("stolen").exists());
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
}
