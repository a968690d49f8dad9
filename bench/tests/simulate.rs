//! The simulator from trace files to rows, on recorded starts that were never recorded: this test makes them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::path::Path;

use ublkimg_bench::simulation::{Layout, Row, rows, wrong_rows};
use ublkimg_bench::traces::{Workload, read_directory};

/// Numbers that look random and are the same everywhere.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// A start that reads `files` places of an image of 64 MiB, a few blocks at each, thinking up to `think_us` in between.
fn write_workload(directory: &Path, name: &str, mut seed: u64, files: u64, think_us: u64) {
    let (mut exact, mut read_ahead) = (String::from("t_us,block,blocks\n"), String::from("t_us,block,blocks\n"));
    let (mut t_us, mut blocks) = (-5000_i64, 0_u64);
    let mut packed = std::collections::BTreeSet::new();
    let mut chunks = std::collections::BTreeSet::new();
    for file in 0..files {
        let (block, len) = (draw(&mut seed) % 16_000, 1 + draw(&mut seed) % 24);
        writeln!(read_ahead, "{t_us},{block},{len}").unwrap();
        chunks.extend([block / 64, (block + len - 1) / 64]);
        for block in block..block + len {
            if packed.insert(block) {
                writeln!(exact, "{t_us},{block},1").unwrap();
                blocks += 1;
            }
        }
        let think_us = 1 + draw(&mut seed) % think_us;
        t_us += if file == 0 { 6000 } else { i64::try_from(think_us).unwrap() };
    }
    let mut sizes = String::from("chunk,raw_bytes,zstd3_bytes\n");
    for chunk in chunks {
        writeln!(sizes, "{chunk},262144,{}", 20_000 + draw(&mut seed) % 120_000).unwrap();
    }
    let mut frames = String::from("frame,first_rank,pages,zstd3_bytes\n");
    for (frame, rank) in (0..blocks).step_by(64).enumerate() {
        let pages = (blocks - rank).min(64);
        writeln!(frames, "{frame},{rank},{pages},{}", pages * (400 + draw(&mut seed) % 1600)).unwrap();
    }
    let warm_seconds = t_us as f64 / 1e6 + 0.01;
    let json = serde_json::json!({ "workload": name, "image_bytes": 64 << 20, "warm_seconds": warm_seconds });
    std::fs::write(directory.join(format!("{name}.json")), json.to_string()).unwrap();
    for (what, text) in [
        ("ra0.run-a", &exact),
        ("ra0.run-b", &exact),
        ("ra128.run-a", &read_ahead),
        ("ra128.run-b", &read_ahead),
        ("chunks-256k", &sizes),
        ("packed-frames", &frames),
    ] {
        let stored = zstd::bulk::compress(text.as_bytes(), 3).unwrap();
        std::fs::write(directory.join(format!("{name}.{what}.csv.zst")), stored).unwrap();
    }
}

fn workloads() -> Vec<Workload> {
    let directory = tempfile::tempdir().unwrap();
    write_workload(directory.path(), "quick", 1, 120, 50);
    write_workload(directory.path(), "thoughtful", 2, 150, 8000);
    read_directory(directory.path()).unwrap()
}

fn all_rows() -> Vec<Row> {
    let workloads = workloads();
    let runs = workloads.iter().flat_map(|workload| workload.runs.iter().map(move |run| (workload, run)));
    runs.flat_map(|(workload, run)| Layout::ALL.map(|layout| rows(workload, run, layout).unwrap())).flatten().collect()
}

#[test]
fn starts_are_as_near_to_their_bound_as_promised_and_the_same_every_time() {
    let rows = all_rows();
    assert_eq!(rows.len(), 2 * 2 * 2 * 3 * 4, "workloads, runs, layouts, links, policies");
    for row in &rows {
        assert!(row.ratio() > 1.0 - 1e-6, "faster than is possible: {row:?}");
        assert_eq!(row.outcome.duplicate_bytes, 0, "{row:?}");
        assert!(row.policy != "ublkimg" || row.keeps_promise(), "{row:?}");
    }
    assert_eq!(rows, all_rows());
}

#[test]
fn a_row_has_the_fields_that_others_read() {
    let rows = all_rows();
    let json = rows[2].json();
    let fields: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = [
        "workload",
        "run",
        "link",
        "layout",
        "policy",
        "estimator",
        "ready_seconds",
        "bound_seconds",
        "ratio",
        "requests",
        "bytes",
        "duplicate_bytes",
        "misses",
    ];
    expected.sort_unstable();
    let mut fields = fields;
    fields.sort_unstable();
    assert_eq!(fields, expected);
    assert_eq!((json["policy"].as_str(), json["layout"].as_str()), (Some("ublkimg"), Some("chunks-256k")));
}

#[test]
fn wrong_traces_are_replayed_within_their_cap() {
    let workloads = workloads();
    for layout in Layout::ALL {
        let rows = wrong_rows(&workloads[0], &workloads[1], &workloads[0].runs[0], layout).unwrap();
        assert_eq!(rows.len(), 3 * 2 * 4, "links, estimators, traces");
        for row in rows {
            assert!(row.keeps_promise(), "{row:?}");
            assert_eq!(row.row.outcome.duplicate_bytes, 0, "{row:?}");
        }
    }
}

#[test]
fn a_directory_without_starts_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let error = read_directory(directory.path()).unwrap_err().to_string();
    assert!(error.contains("no NAME.json"), "{error}");
    std::fs::write(directory.path().join("x.json"), r#"{"image_bytes": 1, "warm_seconds": 0.1}"#).unwrap();
    let error = format!("{:#}", read_directory(directory.path()).unwrap_err());
    assert!(error.contains("x.chunks-256k.csv.zst"), "{error}");
}
