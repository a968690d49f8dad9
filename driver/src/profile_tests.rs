//! Starts with a profile, with a registry on loopback that can misbehave.

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use ublkimg_image::BLOCK_SIZE;
use ublkimg_registry::profile::ProfileChoice;
use ublkimg_registry::{BlobSource, ClientOptions, Digest, Location, NewProfile, Repository};
use ublkimg_scheduler::FillMode;
use ublkimg_tests::fault_row::FaultRow;
use ublkimg_tests::registry::{Config, Fault, LinkConfig, Stats, TestRegistry, Toxic};

use crate::fixture::{Image, LayerContent, read};
use crate::image::UnitKey;
use crate::profile_fixture::Start;
use crate::{AttachOptions, Engine, ErrorKind, LoadedImage, ProfileSource, Result, Store, attach, reopen, trace_file};

struct Rig {
    registry: TestRegistry,
    root: TempDir,
    store: Arc<Store>,
    engine: Engine,
    options: AttachOptions,
}

impl Rig {
    fn new() -> Self {
        Self::over(LinkConfig::default())
    }

    fn over(link: LinkConfig) -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(root.path()).unwrap());
        Self {
            registry: TestRegistry::start(Config { link, ..Config::default() }).unwrap(),
            engine: Engine::start(&store).unwrap(),
            store,
            root,
            options: AttachOptions::default(),
        }
    }

    fn attach(&self, location: &Location) -> Result<LoadedImage> {
        self.engine.runtime().block_on(attach(&self.store, &self.engine, location, &self.options))
    }

    /// Starts without a profile of its own, with that of a file.
    fn with_file(&mut self, start: &Start) {
        let path = self.root.path().join("trace");
        std::fs::write(&path, trace_file::to_stored(&start.trace).unwrap()).unwrap();
        self.options.profile = ProfileSource::File(path);
    }

    /// Bytes that were asked of the layers and of the hot blob.
    fn asked(&self, image: &Image, start: &Start) -> (u64, u64) {
        let stats = self.registry.stats();
        let layers = image.manifest.layers.iter().map(|layer| asked_of(&stats, layer.digest)).sum();
        (layers, asked_of(&stats, Digest::of(&start.hot)))
    }
}

fn asked_of(stats: &Stats, blob: Digest) -> u64 {
    let ranges = stats.blobs.get(&blob.to_string()).map_or(&[][..], |blob| &blob.ranges);
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Two layers with chunks of different lengths, 150 and 200 blocks.
fn image() -> Image {
    Image::new(&[LayerContent::new(1, &[64, 5, 64, 17]), LayerContent::new(2, &[8; 25])])
}

/// Reads all over the image, in an order of their own: 148 blocks.
///
/// They lie in chunks 0, 2 and 3 of the first layer, and in 0, 12 to 15, 23 and 24 of the second.
const READS: [(u16, u32, u16); 9] =
    [(1, 100, 20), (0, 70, 1), (0, 0, 40), (1, 0, 4), (1, 120, 8), (0, 71, 1), (0, 149, 1), (1, 190, 9), (0, 72, 64)];

const CHUNKS_READ: u64 = 10;

/// The device blocks of a read of the trace.
fn device_blocks(image: &Image, (layer, block, blocks): (u16, u32, u16)) -> Range<u32> {
    let start = image.layer_starts[usize::from(layer)] + block;
    start..start + u32::from(blocks)
}

fn assert_reads(loaded: &LoadedImage, image: &Image, blocks: Range<u32>) {
    let expected = &image.device[blocks.start as usize * BLOCK_SIZE..blocks.end as usize * BLOCK_SIZE];
    assert!(read(&loaded.image, blocks.start, blocks.end - blocks.start).unwrap() == expected, "blocks {blocks:?}");
}

fn assert_whole(loaded: &LoadedImage, image: &Image) {
    assert_reads(loaded, image, 0..loaded.image.total_blocks());
}

/// Waits until `done`; a prefetch takes its own time.
fn wait_for(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not in 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn all_packed(loaded: &LoadedImage, start: &Start) -> bool {
    loaded.image.prefetch().hot_blocks_present == start.table.blocks()
}

#[test]
fn the_hot_blob_answers_reads_without_a_chunk() {
    let rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 64);
    let loaded = rig.attach(&image.serve(&rig.registry, "v1", Some(&start))).unwrap();
    let profile = loaded.profile.as_ref().unwrap();
    assert!(profile.has_hot_blob && profile.kept.is_published);
    assert_eq!(profile.kept.source, "run");
    wait_for("the hot blob", || all_packed(&loaded, &start));
    for entry in READS {
        assert_reads(&loaded, &image, device_blocks(&image, entry));
    }
    assert_eq!(rig.asked(&image, &start), (0, start.hot.len() as u64));
    let statistics = loaded.image.statistics();
    assert_eq!((statistics.misses, statistics.late_hits, statistics.errors), (0, 0, 0));
    let stats = rig.registry.stats();
    assert_eq!(stats.requests_of("manifest_get"), 2, "the profile's manifest travels inside the index");
    assert_eq!(stats.duplicate_bytes, 0);
    assert_whole(&loaded, &image);
    assert_eq!(rig.engine.counters().duplicates, 0);
}

#[test]
fn a_request_that_needs_hot_blocks_and_others_gets_both() {
    let rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 30, 7);
    let loaded = rig.attach(&image.serve(&rig.registry, "v1", Some(&start))).unwrap();
    assert_whole(&loaded, &image);
    assert_eq!(rig.registry.stats().duplicate_bytes, 0);
}

#[test]
fn a_bad_frame_is_withdrawn_and_the_chunk_takes_its_place() {
    let rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 16);
    let location = image.serve(&rig.registry, "v1", Some(&start));
    let offset_bytes = start.table.layout().stored(2).start + 20;
    let path = format!("*/blobs/{}", Digest::of(&start.hot));
    rig.registry.set_fault("flip", Fault::new(&path, Toxic::BitFlip { offset_bytes }));
    let loaded = rig.attach(&location).unwrap();
    let fault = FaultRow::begins("a bad hot frame");
    for entry in READS {
        assert_reads(&loaded, &image, device_blocks(&image, entry));
    }
    fault.ends("withdrawn, its chunks take its place: data");
    wait_for("the frame", || loaded.image.prefetch().hot_frames_withdrawn == 1);
    assert!(rig.registry.fault_hits("flip") > 0);
    let statistics = loaded.image.statistics();
    assert_eq!((statistics.verification_failures, statistics.errors), (1, 0));
    let (layers, hot) = rig.asked(&image, &start);
    assert!(layers > 0);
    assert_eq!(hot, start.hot.len() as u64, "it is not asked for again");
    assert_whole(&loaded, &image);
}

#[test]
fn without_its_hot_blob_an_image_reads_from_chunks() {
    let rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 16);
    let location = image.serve(&rig.registry, "v1", Some(&start));
    rig.registry.delete(ublkimg_image::Sha256::of(&start.hot)).unwrap();
    let loaded = rig.attach(&location).unwrap();
    let fault = FaultRow::begins("a hot blob that is gone");
    assert_whole(&loaded, &image);
    fault.ends("chunks take its place: data");
    wait_for("the frames", || {
        let report = loaded.image.prefetch();
        report.hot_frames_withdrawn == report.hot_frames
    });
    assert_eq!(loaded.image.statistics().errors, 0);
}

#[test]
fn a_trace_alone_orders_the_fetches() {
    let rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 0, 1);
    let loaded = rig.attach(&image.serve(&rig.registry, "v1", Some(&start))).unwrap();
    assert!(!loaded.profile.as_ref().unwrap().has_hot_blob);
    wait_for("the chunks of the trace", || loaded.image.statistics().fetched_chunks >= CHUNKS_READ);
    for entry in READS {
        assert_reads(&loaded, &image, device_blocks(&image, entry));
    }
    let statistics = loaded.image.statistics();
    assert_eq!((statistics.fetched_chunks, statistics.misses, statistics.late_hits), (CHUNKS_READ, 0, 0));
    assert_eq!(rig.registry.stats().duplicate_bytes, 0);
}

#[test]
fn a_file_gives_its_order_and_no_byte() {
    let mut rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 64);
    rig.with_file(&start);
    let loaded = rig.attach(&image.serve(&rig.registry, "v1", None)).unwrap();
    let profile = loaded.profile.as_ref().unwrap();
    assert!(!profile.has_hot_blob && !profile.kept.is_published);
    wait_for("the chunks of the trace", || loaded.image.statistics().fetched_chunks >= CHUNKS_READ);
    assert_eq!(rig.asked(&image, &start).1, 0);
    assert_whole(&loaded, &image);
}

#[test]
fn a_referrer_gives_its_order_when_it_is_named_and_no_byte() {
    let mut rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 64);
    let location = image.serve(&rig.registry, "v1", None);
    let new = NewProfile {
        manifest: start.manifest(&image),
        trace: trace_file::to_stored(&start.trace).unwrap().into(),
        hot: Some(BlobSource::Bytes(start.hot.clone().into())),
    };
    rig.engine.runtime().block_on(async {
        let repository = Repository::open(&location, &ClientOptions::default()).await.unwrap();
        repository.push_profile_referrer(&new).await.unwrap();
    });
    assert!(rig.attach(&location).unwrap().profile.is_none(), "nobody asked for it");
    rig.options.profile = ProfileSource::Published(ProfileChoice::Name("run".to_owned()));
    let loaded = rig.attach(&location).unwrap();
    let profile = loaded.profile.as_ref().unwrap();
    assert!(!profile.has_hot_blob && profile.kept.manifest.is_none());
    wait_for("the chunks of the trace", || loaded.image.statistics().fetched_chunks >= CHUNKS_READ);
    assert_eq!(rig.asked(&image, &start).1, 0);
    assert_eq!(loaded.image.prefetch().engine.plan.map(|plan| plan.steps), Some(10));
}

#[test]
fn what_this_host_recorded_is_followed_when_nothing_is_published_for_the_command() {
    let mut rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 0, 1);
    let location = image.serve(&rig.registry, "v1", None);
    let (manifest, command) = (start.trace.header.manifest, start.trace.command_digest());
    rig.store.put_host_trace(manifest, command, &trace_file::to_stored(&start.trace).unwrap()).unwrap();
    assert!(rig.attach(&location).unwrap().profile.is_none(), "it is of another command");
    rig.options.command = Some(Digest(command.0));
    let profile = rig.attach(&location).unwrap().profile.unwrap();
    assert_eq!(profile.kept.source, "recorded on this host");
    let published = image.serve(&rig.registry, "v2", Some(&start));
    assert!(rig.attach(&published).unwrap().profile.unwrap().kept.is_published);
    rig.options.command = Some(Digest::of(b"other"));
    assert!(rig.attach(&published).unwrap().profile.unwrap().kept.is_published, "the default");
    rig.options.profile = ProfileSource::Published(ProfileChoice::None);
    assert!(rig.attach(&published).unwrap().profile.is_none());
}

#[test]
fn a_profile_that_was_asked_for_must_be_there_any_other_need_not() {
    let mut rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 64);
    let location = image.serve(&rig.registry, "v1", Some(&start));
    rig.options.profile = ProfileSource::Published(ProfileChoice::Name("walk".to_owned()));
    assert_eq!(rig.attach(&location).unwrap_err().kind(), ErrorKind::NotFound);
    rig.options.profile = ProfileSource::File(PathBuf::from("/nonexistent"));
    assert_eq!(rig.attach(&location).unwrap_err().kind(), ErrorKind::Io);
    rig.registry.delete(ublkimg_image::Sha256::of(&trace_file::to_stored(&start.trace).unwrap())).unwrap();
    rig.options.profile = ProfileSource::Published(ProfileChoice::Name("run".to_owned()));
    assert_eq!(rig.attach(&location).unwrap_err().kind(), ErrorKind::NotFound);
    rig.options.profile = ProfileSource::default();
    let loaded = rig.attach(&location).unwrap();
    assert!(loaded.profile.is_none());
    assert_whole(&loaded, &image);
}

#[test]
fn a_profile_of_another_image_packs_nothing_for_this_one() {
    let rig = Rig::new();
    let image = image();
    let mut start = image.start(&READS, 148, 64);
    start.trace.header.blobs.reverse();
    for blob in &mut start.trace.header.blobs {
        blob.0[0] ^= 1;
    }
    let loaded = rig.attach(&image.serve(&rig.registry, "v1", Some(&start))).unwrap();
    let profile = loaded.profile.as_ref().unwrap();
    assert!(!profile.has_hot_blob && profile.kept.manifest.is_none());
    let fault = FaultRow::begins("a profile of another image");
    assert_whole(&loaded, &image);
    fault.ends("not used: data");
}

#[test]
fn a_forged_hot_blob_does_not_reach_an_image_with_the_same_layers() {
    let rig = Rig::new();
    let honest = image();
    let mut hostile = image();
    hostile.manifest.annotations.insert("who".to_owned(), "somebody else".to_owned());
    // Frames for the layers that both have, with other bytes: the hostile image's digest covers them, so it gets them.
    let others = Image::new(&[LayerContent::new(3, &[64, 5, 64, 17]), LayerContent::new(4, &[8; 25])]);
    let (forged, trace) = (others.start(&READS, 148, 16), hostile.start(&READS, 148, 16).trace);
    let start = Start { trace, ..forged };
    let loaded = rig.attach(&hostile.serve(&rig.registry, "hostile", Some(&start))).unwrap();
    wait_for("the hot blob", || all_packed(&loaded, &start));
    assert_reads(&loaded, &others, device_blocks(&hostile, READS[0]));
    // Hot blocks and chunks together.
    read(&loaded.image, 0, loaded.image.total_blocks()).unwrap();

    let fault = FaultRow::begins("a forged hot blob for a layer of another image");
    let victim = rig.attach(&honest.serve(&rig.registry, "honest", None)).unwrap();
    assert_eq!(honest.manifest.layers, hostile.manifest.layers);
    assert_whole(&victim, &honest);
    fault.ends("the other image reads right bytes");
    drop(loaded);
    assert_whole(&victim, &honest);
}

#[test]
fn frames_of_a_plan_that_proved_wrong_are_not_waited_for() {
    let rig = Rig::new();
    let image = Image::new(&[LayerContent::new(1, &[16; 8]), LayerContent::new(2, &[1; 40])]);
    let start = image.start(&[(0, 0, 128)], 128, 16);
    let location = image.serve(&rig.registry, "v1", Some(&start));
    // The hot blob is on its way for ever.
    rig.registry.set_fault("hang", Fault::new(&format!("*/blobs/{}", Digest::of(&start.hot)), Toxic::Hang));
    let loaded = rig.attach(&location).unwrap();
    wait_for("the hot blob is asked for", || rig.registry.fault_hits("hang") > 0);
    for block in (0..40).step_by(3) {
        assert_reads(&loaded, &image, device_blocks(&image, (1, block, 1)));
    }
    wait_for("the plan is dropped", || loaded.image.prefetch().engine.plan.is_some_and(|plan| plan.is_dropped));
    assert_reads(&loaded, &image, device_blocks(&image, (0, 20, 4)));
    let stats = rig.registry.stats();
    let layer = &image.manifest.layers[0];
    assert!(asked_of(&stats, layer.digest) > 0, "the chunk took the frame's place");
    let statistics = loaded.image.statistics();
    assert_eq!(statistics.errors, 0);
    let hot = loaded.image.prefetch();
    assert_eq!(hot.hot_blocks_present, 0, "nobody waited for the hot blob");
}

#[test]
fn what_was_in_the_store_before_is_no_part_of_what_a_start_had_to_fetch() {
    let rig = Rig::new();
    let image = image();
    let location = image.serve(&rig.registry, "v1", None);
    let loaded = rig.attach(&location).unwrap();
    let units = |loaded: &LoadedImage| {
        let mut units = Vec::new();
        loaded.image.units(0, 60..140, |unit| units.push(unit.map(|(key, _)| key)));
        units
    };
    let chunk = |chunk| UnitKey::Chunk { layer: 0, chunk };
    assert_eq!(units(&loaded), [Some(chunk(0)), Some(chunk(1)), Some(chunk(2)), Some(chunk(3))]);
    assert_reads(&loaded, &image, device_blocks(&image, (0, 64, 5)));
    assert_eq!(units(&loaded)[1], Some(chunk(1)), "it had to be fetched");
    drop(loaded);
    let start = image.start(&[(0, 0, 140)], 140, 16);
    let loaded = rig.attach(&image.serve(&rig.registry, "v2", Some(&start))).unwrap();
    let frame = |frame| Some(UnitKey::Frame(frame));
    assert_eq!(units(&loaded), [frame(3), None, frame(4), frame(5), frame(6), frame(7), frame(8), frame(8)]);
}

#[test]
fn a_removed_image_ends_its_prefetch() {
    // 600 KiB at 4 Mbit/s take 1.2 s.
    let rig = Rig::over(LinkConfig::new(4, 1));
    let image = image();
    let start = image.start(&READS, 148, 16);
    let loaded = rig.attach(&image.serve(&rig.registry, "v1", Some(&start))).unwrap();
    wait_for("a frame", || loaded.image.prefetch().hot_blocks_present > 0);
    drop(loaded);
    std::thread::sleep(Duration::from_millis(300));
    let sent = rig.registry.stats().bytes_sent;
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(rig.registry.stats().bytes_sent, sent);
    assert!(rig.asked(&image, &start).1 <= start.hot.len() as u64);
}

#[test]
fn a_restart_goes_on_with_the_profile_and_needs_no_registry() {
    let rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 16);
    let location = image.serve(&rig.registry, "v1", Some(&start));
    let loaded = rig.attach(&location).unwrap();
    wait_for("the hot blob", || all_packed(&loaded, &start));
    let (digest, kept) = (loaded.manifest_digest, loaded.profile.as_ref().unwrap().kept.clone());
    drop(loaded);
    let Rig { registry, root, store, engine, options } = rig;
    engine.stop();
    drop(store);
    registry.reset_stats();
    let store = Arc::new(Store::open(root.path()).unwrap());
    let engine = Engine::start(&store).unwrap();
    let reopened = reopen(&store, &engine, &location, digest, Some(&kept), &options);
    let loaded = engine.runtime().block_on(reopened).unwrap();
    for entry in READS {
        assert_reads(&loaded, &image, device_blocks(&image, entry));
    }
    assert_eq!(registry.stats().requests_of("blob_get") + registry.stats().requests_of("manifest_get"), 0);
    assert_eq!(loaded.image.statistics().misses, 0);
    assert!(loaded.profile.as_ref().unwrap().has_hot_blob);
    assert_whole(&loaded, &image);
}

#[test]
fn what_the_layers_have_is_not_fetched_again_as_hot() {
    let mut rig = Rig::new();
    let image = image();
    let start = image.start(&READS, 148, 16);
    let location = image.serve(&rig.registry, "v1", Some(&start));
    // The trace is in the store from now on, and so is everything else.
    rig.options.profile = ProfileSource::Published(ProfileChoice::None);
    assert_whole(&rig.attach(&location).unwrap(), &image);
    rig.with_file(&start);
    drop(rig.attach(&location).unwrap());
    rig.options.profile = ProfileSource::default();
    rig.registry.reset_stats();
    let loaded = rig.attach(&location).unwrap();
    assert_whole(&loaded, &image);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.asked(&image, &start), (0, 0));
}

#[test]
fn a_prefetch_outlives_a_bad_registry_and_asks_for_nothing_twice() {
    let rig = Rig::over(LinkConfig::new(40, 2));
    let layers = [LayerContent::new(1, &[64; 20]), LayerContent::new(2, &[64; 20])];
    let image = Image::new(&layers);
    let start = image.start(&[(0, 0, 256), (1, 0, 256), (0, 256, 256), (1, 512, 256)], 1024, 64);
    let location = image.serve(&rig.registry, "v1", Some(&start));
    let path = format!("*/blobs/{}", Digest::of(&start.hot));
    rig.registry.set_fault("slow", Fault::new(&path, Toxic::Latency { latency_ms: 100 }).times(1));
    rig.registry.set_fault("busy", Fault::new(&path, Toxic::TooManyRequests { retry_after_s: 1 }).times(2));
    rig.registry.set_fault("cut", Fault::new(&path, Toxic::ShortBody { after_bytes: 100_000 }).times(2));
    let loaded = rig.attach(&location).unwrap();
    wait_for("the hot blob", || all_packed(&loaded, &start));
    assert!(rig.registry.fault_hits("busy") > 0 && rig.registry.fault_hits("cut") > 0);
    let (layers, _) = rig.asked(&image, &start);
    assert_eq!(layers, 0);
    assert_eq!(rig.registry.stats().duplicate_bytes, 0);
    assert_eq!(rig.engine.counters().duplicates, 0);
    assert_reads(&loaded, &image, device_blocks(&image, (0, 0, 256)));
    assert_eq!(loaded.image.statistics().misses, 0);
}

#[test]
fn a_fill_brings_the_whole_image() {
    let rig = Rig::new();
    let image = image();
    let loaded = rig.attach(&image.serve(&rig.registry, "v1", None)).unwrap();
    loaded.image.set_fill(FillMode::Full);
    wait_for("the rest", || {
        let (stored, all) = loaded.image.stored_bytes();
        stored == all
    });
    wait_for("its end", || loaded.image.prefetch().engine.fill.is_some_and(|fill| fill.finished));
    assert_eq!(rig.registry.stats().duplicate_bytes, 0);
    let requests = loaded.image.statistics().registry_requests;
    assert_whole(&loaded, &image);
    assert_eq!(loaded.image.statistics().registry_requests, requests);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn whatever_is_packed_and_broken_reads_are_the_images(
        cuts in prop::collection::vec((0..2_u16, 0..140_u32, 1..20_u16), 1..12),
        packed in 0..100_usize,
        per_frame in 1..65_usize,
        flips in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        reads in prop::collection::vec((any::<u32>(), 1..60_u32), 1..12),
    ) {
        let rig = Rig::new();
        let image = image();
        let mut seen = HashSet::new();
        let is_new = |&(layer, block, blocks): &(u16, u32, u16)| {
            let blocks: Vec<_> = (block..block + u32::from(blocks)).map(|block| (layer, block)).collect();
            let is_new = blocks.iter().all(|block| !seen.contains(block));
            seen.extend(blocks);
            is_new
        };
        let cuts: Vec<_> = cuts.into_iter().filter(is_new).collect();
        let mut start = image.start(&cuts, packed, per_frame);
        let good = start.hot.clone();
        for flip in flips.iter().filter(|_| !good.is_empty()) {
            start.hot[flip.index(good.len())] ^= 0x40;
        }
        let loaded = rig.attach(&image.serve(&rig.registry, "v1", Some(&start))).unwrap();
        for (first, len) in reads {
            let first = first % (loaded.image.total_blocks() - len);
            assert_reads(&loaded, &image, first..first + len);
        }
    }
}
