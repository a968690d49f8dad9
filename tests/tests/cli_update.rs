//! A host that has an image fetches of its next version what changed: whole layers stay, and of a changed layer the
//! chunks that others have stay too.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use serde_json::Value;
use ublkimg_tests::host::{self, Host};
use ublkimg_tests::oci_layout::{Compression, Layer, OciLayout};
use ublkimg_tests::registry::{Auth, Stats};
use ublkimg_tests::sample_image::noise;
use ublkimg_tests::skip;
use ublkimg_tests::tar::{Entry, LongNames, archive};

/// A pack of small files and a piece of a large one, and the frame around it.
const CHUNK_BYTES_MAX: u64 = (256 << 10) + 4096;

/// Metadata of a layer of a few hundred files, and of the image.
const METADATA_BYTES_MAX: u64 = 64 << 10;

/// Index, manifest and config.
const DOCUMENT_BYTES_MAX: u64 = 128 << 10;

const SMALL_FILES: u64 = 600;

fn len_bytes(number: u64) -> usize {
    usize::try_from(1000 + number * 7919 % 15_000).unwrap()
}

/// Small files of different lengths and a large one: 8 MB that do not compress. `changed` of the small ones is another,
/// and so is a piece of the large one if it says so.
fn big_layer(changed: Option<u64>, large_changed: bool) -> Vec<Entry> {
    let small = |number: u64| {
        let seed = if changed == Some(number) { 1000 + number } else { number };
        Entry::file(&format!("small/{number:03}"), noise(seed, len_bytes(number)))
    };
    let mut large = noise(7, 4 << 20);
    large[3 << 20] ^= u8::from(large_changed);
    (1..=SMALL_FILES).map(small).chain([Entry::file("large", large)]).collect()
}

fn host_with(versions: &[(&str, Vec<Vec<Entry>>)]) -> Host {
    let host = Host::new(Auth::Anonymous);
    for (version, layers) in versions {
        let layer =
            |entries: &Vec<Entry>| Layer { tar: archive(entries, LongNames::Pax), compression: Compression::None };
        let layers: Vec<Layer> = layers.iter().map(layer).collect();
        OciLayout::create(&host.root.join(version)).unwrap().add_image("v1", &layers).unwrap();
        host.convert(version, version);
    }
    host
}

/// Pulls a version whole; what that cost.
fn pull(host: &Host, version: &str) -> Stats {
    host.registry.reset_stats();
    let pulled = host.ublkimg(&["pull", &host.registry.reference(version, "v1"), "--json"]).success();
    let pulled: Value = serde_json::from_str(&pulled.stdout).unwrap();
    assert_eq!(pulled["present_bytes"], pulled["total_bytes"], "{pulled}");
    let stats = host.registry.stats();
    assert_eq!(stats.duplicate_bytes, 0);
    stats
}

fn layers_of(host: &Host, version: &str) -> Vec<String> {
    let json = |reference: &str| -> Value {
        serde_json::from_slice(&host.registry.manifest(version, reference).unwrap().unwrap()).unwrap()
    };
    let manifest = json(json("v1")["manifests"][0]["digest"].as_str().unwrap());
    manifest["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn of_a_changed_top_layer_of_many_that_layer_is_fetched() {
    let mut layers: Vec<Vec<Entry>> =
        (1..=20).map(|number| vec![Entry::file(&format!("layer-{number}"), noise(number, 300_000))]).collect();
    let first = layers.clone();
    layers[19] = vec![Entry::file("layer-20", noise(999, 300_000))];
    let host = host_with(&[("one", first), ("two", layers)]);
    pull(&host, "one");
    let stats = pull(&host, "two");
    let (one, two) = (layers_of(&host, "one"), layers_of(&host, "two"));
    assert_eq!(one[..19], two[..19]);
    assert!(two[..19].iter().all(|digest| !stats.blobs.contains_key(digest)), "{:?}", stats.blobs);
    assert!(stats.bytes_sent < 300_000 + METADATA_BYTES_MAX + DOCUMENT_BYTES_MAX, "{}", stats.bytes_sent);
    host.end();
}

#[test]
fn of_a_changed_file_in_a_big_layer_its_packs_are_fetched() {
    let host = host_with(&[
        ("one", vec![big_layer(None, false)]),
        ("two", vec![big_layer(Some(77), false)]),
        ("three", vec![big_layer(Some(77), true)]),
    ]);
    let first = pull(&host, "one");
    assert!(first.bytes_sent > 7 << 20, "{}", first.bytes_sent);
    let second = pull(&host, "two");
    let metadata = METADATA_BYTES_MAX + DOCUMENT_BYTES_MAX;
    // A changed file can be the last of its pack, and move the end of it.
    assert!(second.bytes_sent < 2 * CHUNK_BYTES_MAX + metadata, "{} bytes for a small file", second.bytes_sent);
    let third = pull(&host, "three");
    assert!(third.bytes_sent < CHUNK_BYTES_MAX + metadata, "{} bytes for a piece of a large file", third.bytes_sent);
    host.end();
}

/// The same in one daemon, with what is read.
#[test]
fn a_mounted_update_reads_what_the_host_has() {
    if let Some(reason) = host::lacking() {
        skip!("{reason}");
    }
    let contents = big_layer(Some(3), true);
    let host = host_with(&[("one", vec![big_layer(None, false)]), ("two", vec![contents.clone()])]);
    let read = |mount: &Path| {
        for entry in &contents {
            let path = mount.join(std::str::from_utf8(&entry.path).unwrap());
            assert!(std::fs::read(&path).unwrap().len() >= 1000, "{}", path.display());
        }
    };
    read(&host.mounted("one"));
    host.registry.reset_stats();
    let mount = host.mounted("two");
    read(&mount);
    assert!(std::fs::read(mount.join("small/003")).unwrap() == noise(1003, len_bytes(3)));
    let mut large = noise(7, 4 << 20);
    large[3 << 20] ^= 1;
    assert!(std::fs::read(mount.join("large")).unwrap() == large);
    let stats = host.registry.stats();
    let bound = 3 * CHUNK_BYTES_MAX + METADATA_BYTES_MAX + DOCUMENT_BYTES_MAX;
    assert!(stats.bytes_sent < bound, "{} bytes", stats.bytes_sent);
    let status = host.ublkimg(&["status", "--json", mount.to_str().unwrap()]).success();
    let status: Value = serde_json::from_str(&status.stdout).unwrap();
    assert!(status["counters"]["copied_bytes"].as_u64().unwrap() > 6 << 20, "{status}");
    host.end();
}
