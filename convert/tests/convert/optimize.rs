//! Profiles: the hot blob holds the traced blocks in their order, and nothing else of the image is written.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncReadExt as _;
use ublkimg_convert::{
    Dropped, ErrorKind, NoProgress, OptimizeOptions, Optimized, Options, StoredImage, load_trace, optimize, store_trace,
};
use ublkimg_image::trace::{Trace, TraceEntry, TraceHeader};
use ublkimg_image::{BLOCK_SIZE, HotTable, Sha256};
use ublkimg_registry::descriptor::{Index, Platform};
use ublkimg_registry::erofs_manifest::choose;
use ublkimg_registry::profile::{ProfileManifest, profiles};

use crate::same::fixture_file;
use crate::{fixture, repository, run};

/// A converted image of two layers in a layout below `dir`: its location, and itself.
async fn converted(dir: &Path) -> (String, StoredImage) {
    let source = format!("oci:{}/source:v1", dir.display());
    let layer = |seed: u64| {
        let mut tar = Vec::new();
        for number in 0..60_u64 {
            let data = fixture::noise(seed + number, usize::try_from(number * 1_877 % 90_000).unwrap());
            tar.extend(fixture_file(&format!("dir{}/file{seed}-{number}", number % 5), &data));
        }
        tar.extend(fixture_file(&format!("large{seed}"), &fixture::noise(7 + seed, 3_000_000)));
        tar.extend([0; 1024]);
        tar
    };
    let tars = [layer(1000), layer(2000)];
    let config = fixture::config(&tars.each_ref().map(|tar| fixture::sha256(tar)));
    let layers: Vec<_> = tars.iter().map(|tar| (fixture::TAR_GZIP, fixture::gzip(tar))).collect();
    fixture::push_layers(&source, &layers, &config).await;
    let location = format!("oci:{}/image:v1", dir.display());
    run(&source, &location).await.unwrap();
    let image = StoredImage::read(&repository(&location).await, &Platform::host()).await.unwrap();
    (location, image)
}

/// A trace that jumps through both layers, with blocks of a blob that the image does not have and past an end.
fn jumping(image: &StoredImage, command: &str) -> Trace {
    let layers: Vec<_> = image.bundle.layers.iter().collect();
    let header = TraceHeader {
        manifest: Sha256(image.digest.0),
        command: vec![command.to_owned()],
        read_ahead_kb: 0,
        runs: 1,
        ready_us: Some(1_000_000),
        lost: 0,
        blobs: vec![layers[1].digest, Sha256::of(b"gone"), layers[0].digest],
    };
    let lengths = [&layers[1], &layers[0]].map(|layer| layer.index.raw_len_blocks());
    let mut entries = Vec::new();
    for step in 0..200_u32 {
        let (blob, len) = if step % 3 == 0 { (2, lengths[1]) } else { (0, lengths[0]) };
        // 397 is prime and the layers are longer: no block comes twice.
        let block = step * 397 % (len / 4) * 4;
        let blocks = u16::try_from(1 + step % 3).unwrap();
        entries.push(TraceEntry { blob, block, blocks, since_previous_us: 1000, confidence: 255 });
    }
    let places: BTreeSet<_> = entries.iter().map(|entry| (entry.blob, entry.block)).collect();
    assert_eq!(places.len(), entries.len(), "the layers are too small for this trace");
    let extra = |blob, block, blocks| TraceEntry { blob, block, blocks, since_previous_us: 5, confidence: 255 };
    entries.insert(50, extra(1, 77, 9));
    entries.push(extra(0, lengths[0] + 1, 3));
    Trace { header, entries }
}

fn options() -> OptimizeOptions {
    let Options { client, tmpdir, threads, .. } = Options::default();
    OptimizeOptions {
        client,
        platform: ublkimg_registry::descriptor::Platform::host(),
        tmpdir,
        level: 3,
        threads,
        name: None,
        is_default: false,
        order_only: false,
        force: false,
    }
}

async fn run_optimize(
    location: &str,
    traces: &[Trace],
    options: &OptimizeOptions,
) -> ublkimg_convert::Result<Optimized> {
    optimize(&location.parse().unwrap(), traces, options, Arc::new(NoProgress)).await
}

/// The names of all blobs of a layout, and what would change if one were written again.
fn blobs(dir: &Path) -> BTreeMap<String, std::time::SystemTime> {
    let entries = std::fs::read_dir(dir.join("image/blobs/sha256")).unwrap().map(Result::unwrap);
    entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.metadata().unwrap().modified().unwrap()))
        .collect()
}

/// The raw bytes of a layer blob.
async fn raw_layer(location: &str, image: &StoredImage, layer: usize) -> Vec<u8> {
    let reference = &image.manifest.layers[layer];
    let mut stored = Vec::new();
    let mut reader = repository(location).await.blob(&reference.digest, reference.size_bytes).await.unwrap();
    reader.read_to_end(&mut stored).await.unwrap();
    zstd::decode_all(stored.as_slice()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_blob_holds_the_traced_blocks_in_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let (location, image) = converted(dir.path()).await;
    let before = blobs(dir.path());
    let optimized = run_optimize(&location, &[jumping(&image, "app")], &options()).await.unwrap();
    assert_eq!(optimized.dropped, Dropped { other_blobs: 9, past_end: 3 });
    assert!(!optimized.existed);

    let repository = repository(&location).await;
    let index = repository.resolve().await.unwrap();
    assert_eq!(index.digest, optimized.index);
    assert_eq!(choose(&index.bytes, &Platform::host()).unwrap().digest, image.digest, "the image is still chosen");
    let listed = profiles(&index.bytes, &image.digest).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].descriptor.digest, optimized.profile);
    assert!(!listed[0].is_default && listed[0].name.is_none());

    let profile = ProfileManifest::parse(&repository.manifest(&optimized.profile).await.unwrap()).unwrap();
    let hot = profile.hot.unwrap();
    let table = HotTable::decode(&hot.table).unwrap();
    let stored = repository.blob_range(&hot.blob.digest, 0..hot.blob.size).await.unwrap();
    let trace = repository.blob_range(&profile.trace.digest, 0..profile.trace.size).await.unwrap();
    let trace = load_trace(&trace).unwrap();
    let raw = [raw_layer(&location, &image, 1).await, raw_layer(&location, &image, 0).await];
    let mut expected = Vec::new();
    for block in trace.traced_blocks() {
        let at = block.block as usize * BLOCK_SIZE;
        expected.extend_from_slice(&raw[usize::from(block.blob)][at..at + BLOCK_SIZE]);
    }
    let mut at = 0;
    let mut packed = Vec::new();
    for frame in &table.frames {
        let bytes = &stored[at..at + frame.stored_len_bytes as usize];
        assert_eq!(Sha256::of(bytes), frame.digest);
        let raw = zstd::decode_all(bytes).unwrap();
        assert_eq!(raw.len(), usize::from(frame.blocks) * BLOCK_SIZE);
        packed.extend(raw);
        at += bytes.len();
    }
    assert_eq!(at, stored.len());
    assert_eq!(packed.len(), expected.len());
    assert!(packed == expected, "other blocks than the trace names");
    assert_eq!(optimized.hot.unwrap().blocks, trace.blocks());

    // Trace, hot blob, table, profile, index: nothing else is new, nothing is written again.
    let after = blobs(dir.path());
    assert_eq!(after.len(), before.len() + 5);
    assert!(before.iter().all(|(name, written)| after.get(name) == Some(written)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_traces_give_the_same_profile() {
    let dir = tempfile::tempdir().unwrap();
    let (location, image) = converted(dir.path()).await;
    let trace = jumping(&image, "app");
    let first = run_optimize(&location, std::slice::from_ref(&trace), &options()).await.unwrap();
    let other = OptimizeOptions { threads: NonZeroUsize::new(5).unwrap(), ..options() };
    let again = run_optimize(&location, std::slice::from_ref(&trace), &other).await.unwrap();
    assert_eq!(again, Optimized { existed: true, ..first.clone() });

    // Two runs that are the same are one trace of two runs: the same blocks.
    let merged = run_optimize(&location, &[trace.clone(), trace.clone()], &options()).await.unwrap();
    assert_eq!((merged.runs, merged.blocks), (2, first.blocks));
    assert_eq!(merged.hot.map(|hot| hot.digest), first.hot.map(|hot| hot.digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_have_profiles_of_their_own_and_one_is_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let (location, image) = converted(dir.path()).await;
    let named = OptimizeOptions { name: Some("web".to_owned()), is_default: true, ..options() };
    run_optimize(&location, &[jumping(&image, "web")], &named).await.unwrap();
    let order = OptimizeOptions { order_only: true, is_default: true, ..options() };
    let optimized = run_optimize(&location, &[jumping(&image, "worker")], &order).await.unwrap();
    assert_eq!(optimized.hot, None);
    let index = repository(&location).await.resolve().await.unwrap();
    let listed = profiles(&index.bytes, &image.digest).unwrap();
    let all: Vec<_> = listed.iter().map(|profile| (profile.name.as_deref(), profile.is_default)).collect();
    assert_eq!(all, [(Some("web"), false), (None, true)]);
    assert_eq!(Index::parse(&index.bytes).unwrap().manifests.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_profile_is_refused_and_the_tag_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (location, image) = converted(dir.path()).await;
    let before = repository(&location).await.resolve().await.unwrap();
    let usage = |result: ublkimg_convert::Result<Optimized>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        error.to_string()
    };
    let (web, worker) = (jumping(&image, "web"), jumping(&image, "worker"));
    let text = usage(run_optimize(&location, &[web.clone(), worker.clone()], &options()).await);
    assert!(text.contains("web") && text.contains("worker"), "{text}");
    let mut elsewhere = web.clone();
    elsewhere.header.blobs = [b"a", b"b", b"c"].map(|name| Sha256::of(name)).to_vec();
    usage(run_optimize(&location, &[elsewhere], &options()).await);
    usage(run_optimize(&location, &[], &options()).await);
    let odd = OptimizeOptions { name: Some("no name".to_owned()), ..options() };
    usage(run_optimize(&location, std::slice::from_ref(&web), &odd).await);
    let no_tag = location.rsplit_once(':').unwrap().0;
    usage(run_optimize(no_tag, std::slice::from_ref(&web), &options()).await);
    let pinned = format!("127.0.0.1:1/image:v1@{}", image.digest);
    usage(run_optimize(&pinned, std::slice::from_ref(&web), &options()).await);
    assert_eq!(repository(&location).await.resolve().await.unwrap(), before);

    let forced = OptimizeOptions { force: true, ..options() };
    run_optimize(&location, &[web, worker], &forced).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_layer_makes_no_profile() {
    let dir = tempfile::tempdir().unwrap();
    let (location, image) = converted(dir.path()).await;
    let path = dir.path().join("image/blobs/sha256").join(image.manifest.layers[1].digest.hex());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 400_000].fill(0);
    std::fs::write(&path, bytes).unwrap();
    let error = run_optimize(&location, &[jumping(&image, "app")], &options()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::VerificationFailed);
    assert!(error.to_string().contains(&image.manifest.layers[1].digest.to_string()), "{error}");
    let index = repository(&location).await.resolve().await.unwrap();
    assert_eq!(profiles(&index.bytes, &image.digest).unwrap(), []);
}

#[test]
fn stored_traces_are_read_back_and_other_files_refused() {
    let header = TraceHeader {
        manifest: Sha256::of(b"m"),
        command: Vec::new(),
        read_ahead_kb: 0,
        runs: 1,
        ready_us: None,
        lost: 0,
        blobs: Vec::new(),
    };
    let trace = Trace { header, entries: Vec::new() };
    let stored = store_trace(&trace).unwrap();
    assert_eq!(load_trace(&stored).unwrap(), trace);
    for bytes in [&stored[..stored.len() - 1], b"{}", b"", &zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap()] {
        assert_eq!(load_trace(bytes).unwrap_err().kind(), ErrorKind::Usage);
    }
}
