//! Fuzz targets: decoders of bytes that may come from a hostile registry, and operations on what they decode. One program
//! has all of them.
//!
//! - `UBLKIMG_FUZZ_TARGET=NAME` chooses the target; the arguments are libFuzzer's.
//! - With `UBLKIMG_FUZZ_SEEDS=DIR` the program writes the target's seed corpus there and exits.
//!
//! A target fails by a panic. Beyond that it asserts what its decoder promises: the result is within its bounds, takes no
//! more memory than a small multiple of the input, and is encoded to the same bytes.
#![no_main]
#![forbid(unsafe_code)]

mod blobs;
mod layers;
mod manifests;
mod metadata;
mod plan;
mod sample;
mod traces;

use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

/// Something to feed with bytes.
struct Target {
    name: &'static str,
    check: fn(&[u8]),
    seeds: fn() -> Vec<Vec<u8>>,
}

const TARGETS: [Target; 16] = [
    Target { name: "tar", check: ublkimg_convert::fuzzing::archive, seeds: ublkimg_convert::fuzzing::archive_seeds },
    Target { name: "decompress", check: ublkimg_convert::fuzzing::decompress, seeds: layers::decompress_seeds },
    Target { name: "layers", check: layers::layers, seeds: layers::layers_seeds },
    Target { name: "config", check: ublkimg_convert::fuzzing::config, seeds: ublkimg_convert::fuzzing::config_seeds },
    Target { name: "http", check: ublkimg_registry::fuzzing::http, seeds: ublkimg_registry::fuzzing::http_seeds },
    Target { name: "manifest", check: manifests::manifest, seeds: manifests::manifest_seeds },
    Target { name: "trace", check: traces::trace, seeds: traces::trace_seeds },
    Target { name: "trace_log", check: traces::trace_log, seeds: traces::trace_log_seeds },
    Target { name: "hot_table", check: traces::hot_table, seeds: traces::hot_table_seeds },
    Target { name: "trace_operations", check: traces::operations, seeds: traces::operation_seeds },
    Target { name: "plan", check: plan::plan, seeds: plan::plan_seeds },
    Target { name: "path_list", check: metadata::path_list, seeds: metadata::path_list_seeds },
    Target { name: "erofs", check: metadata::erofs, seeds: metadata::erofs_seeds },
    Target { name: "chunk_index", check: blobs::chunk_index, seeds: blobs::chunk_index_seeds },
    Target { name: "bundle", check: blobs::bundle, seeds: blobs::bundle_seeds },
    Target { name: "merge_record", check: blobs::merge_record, seeds: blobs::merge_record_seeds },
];

static TARGET: OnceLock<&'static Target> = OnceLock::new();

/// Takes the target from the environment, before the first input.
fn choose() {
    let name = std::env::var("UBLKIMG_FUZZ_TARGET").unwrap_or_default();
    let names = TARGETS.map(|target| target.name).join(" ");
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.unwrap_or_else(|| panic!("UBLKIMG_FUZZ_TARGET={name}: one of {names}"));
    if let Some(directory) = std::env::var_os("UBLKIMG_FUZZ_SEEDS") {
        write_seeds(target, Path::new(&directory));
        std::process::exit(0);
    }
    TARGET.get_or_init(|| target);
}

fn write_seeds(target: &Target, directory: &Path) {
    std::fs::create_dir_all(directory).expect("directory for seeds");
    for (number, seed) in (target.seeds)().iter().enumerate() {
        (target.check)(seed);
        std::fs::write(directory.join(format!("seed-{number:02}")), seed).expect("seed");
    }
}

fuzz_target!(init: choose(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        (target.check)(data);
    }
});
