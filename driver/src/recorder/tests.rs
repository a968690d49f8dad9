//! Recordings of an image in an OCI layout directory.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use ublkimg_image::Sha256;
use ublkimg_image::trace::{ENTRY_BLOCKS_MAX, Trace, TraceEntry, TraceLog};

use super::{Recorder, Replace, Subject, recover_logs};
use crate::fixture::{Image, LayerContent, read};
use crate::{AttachOptions, Engine, ErrorKind, LoadedImage, Store, attach};

/// Two layers, of 600 and of 200 blocks.
fn image() -> Image {
    Image::new(&[LayerContent::new(1, &[60; 10]), LayerContent::new(2, &[50; 4])])
}

struct Rig {
    _registry: TempDir,
    _root: TempDir,
    store: Arc<Store>,
    _engine: Engine,
    image: Image,
    loaded: LoadedImage,
}

impl Rig {
    fn new() -> Self {
        let (registry, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Arc::new(Store::open(root.path()).unwrap());
        let engine = Engine::start(&store).unwrap();
        let image = image();
        let location = engine.runtime().block_on(image.push(registry.path(), "v1"));
        let loaded = engine.runtime().block_on(attach(&store, &engine, &location, &AttachOptions::default())).unwrap();
        Self { _registry: registry, _root: root, store, _engine: engine, image, loaded }
    }

    fn layers(&self) -> Arc<[Sha256]> {
        self.image.manifest.layers.iter().map(|layer| Sha256(layer.digest.0)).collect()
    }

    fn manifest(&self) -> Sha256 {
        Sha256(self.loaded.manifest_digest.0)
    }

    fn record(&self, replace: Replace) -> crate::Result<Recorder> {
        let command = vec!["serve".to_owned()];
        let subject = Subject { manifest: self.manifest(), command, read_ahead_kb: 16, layers: self.layers() };
        Recorder::start(&self.store, &self.loaded.image, "device", subject, replace)
    }

    /// Reads blocks of a layer as a device does.
    fn read(&self, layer: usize, block: u32, blocks: u32) {
        read(&self.loaded.image, self.image.layer_starts[layer] + block, blocks).unwrap();
    }

    fn kept(&self) -> Option<Trace> {
        let command = ublkimg_image::trace::command_digest(&["serve".to_owned()]);
        let stored = self.store.host_trace(self.manifest(), command).unwrap()?;
        Some(crate::trace_file::from_stored(&stored).unwrap())
    }

    fn log(&self) -> std::path::PathBuf {
        self.store.recording_log("device")
    }
}

/// Blob, first block and number of blocks of each entry.
fn places(trace: &Trace) -> Vec<(u16, u32, u16)> {
    trace.entries.iter().map(|TraceEntry { blob, block, blocks, .. }| (*blob, *block, *blocks)).collect()
}

#[test]
fn reads_become_entries_of_one_blob_and_of_a_bounded_length() {
    let rig = Rig::new();
    // Before it begins.
    rig.read(0, 0, 2);
    let recorder = rig.record(Replace::Always).unwrap();
    rig.read(1, 10, 3);
    std::thread::sleep(Duration::from_millis(20));
    rig.read(0, 590, 20);
    rig.read(0, 0, 280);
    recorder.ready(1 << 39);
    recorder.ready(0);
    let recorded = recorder.stop().unwrap().unwrap();
    let trace = &recorded.trace;
    let rest = 278 - ENTRY_BLOCKS_MAX;
    assert_eq!(places(trace), [(1, 10, 3), (0, 590, 10), (1, 0, 10), (0, 2, ENTRY_BLOCKS_MAX), (0, 258, rest)]);
    let since: Vec<u64> = trace.entries.iter().map(|entry| entry.since_previous_us).collect();
    assert_eq!((since[0], since[2], since[4]), (0, 0, 0), "the clock starts with it, and one read is one moment");
    assert!(since[1] >= 20_000, "{since:?}");
    assert_eq!(trace.header.blobs, *rig.layers());
    assert!(trace.header.ready_us.unwrap() > 1 << 38, "the first to say so counts");
    assert_eq!((trace.header.command[0].as_str(), trace.header.read_ahead_kb, trace.header.lost), ("serve", 16, 0));
    assert_eq!(rig.kept().as_ref(), Some(&**trace));
    assert!(!rig.log().exists());
}

#[test]
fn a_second_recorder_is_refused_and_leaves_the_first_alone() {
    let rig = Rig::new();
    let first = rig.record(Replace::Always).unwrap();
    rig.read(0, 5, 1);
    assert_eq!(rig.record(Replace::Always).unwrap_err().kind(), ErrorKind::Busy);
    rig.read(0, 7, 1);
    assert_eq!(places(&first.stop().unwrap().unwrap().trace), [(0, 5, 1), (0, 7, 1)]);
    let again = rig.record(Replace::Always).unwrap();
    assert!(again.is_running());
    assert_eq!(again.stop().unwrap(), None, "nothing was read: no trace, and the one before stays");
    assert_eq!(rig.kept().unwrap().blocks(), 2);
}

#[test]
fn a_recording_that_cannot_be_written_down_is_not_begun() {
    let rig = Rig::new();
    fs::create_dir(rig.log()).unwrap();
    assert_eq!(rig.record(Replace::Always).unwrap_err().kind(), ErrorKind::Io);
    fs::remove_dir(rig.log()).unwrap();
    assert_eq!(rig.record(Replace::Always).unwrap().stop().unwrap(), None);
}

#[test]
fn a_run_that_ended_early_does_not_spoil_the_trace_that_is_there() {
    let rig = Rig::new();
    for (blocks, kept_blocks) in [(8_u32, 8_u64), (3, 8), (9, 9)] {
        let recorder = rig.record(Replace::IfNotShorter).unwrap();
        rig.read(0, blocks * 20, blocks);
        assert_eq!(recorder.stop().unwrap().unwrap().trace.blocks(), u64::from(blocks));
        assert_eq!(rig.kept().unwrap().blocks(), kept_blocks);
    }
    let recorder = rig.record(Replace::Always).unwrap();
    rig.read(0, 500, 1);
    recorder.stop().unwrap();
    assert_eq!(rig.kept().unwrap().blocks(), 1, "it was asked for");
}

#[test]
fn what_a_crash_leaves_of_a_log_is_a_shorter_recording() {
    let rig = Rig::new();
    let recorder = rig.record(Replace::Always).unwrap();
    for block in [40, 30, 20] {
        rig.read(0, block, 2);
        let entries = recorder.entries();
        while recorder.entries() == entries {
            recorder.nudge();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let log = fs::read(rig.log()).unwrap();
    drop(recorder.stop().unwrap());
    let whole = usize::try_from(TraceLog::decode(&log).unwrap().whole_len_bytes).unwrap();
    assert_eq!(whole, log.len(), "it is whole between two records");

    // The last record is cut in its middle.
    let command = ublkimg_image::trace::command_digest(&["serve".to_owned()]);
    fs::remove_file(rig.store.host_trace_path(rig.manifest(), command)).unwrap();
    fs::write(rig.log(), &log[..log.len() - 2]).unwrap();
    // One that is none, and one without an entry.
    fs::write(rig.store.recording_log("other"), b"no log").unwrap();
    recover_logs(&rig.store).unwrap();
    assert_eq!(places(&rig.kept().unwrap()), [(0, 40, 2), (0, 30, 2)]);
    assert!(rig.store.recording_logs().unwrap().is_empty());
}
