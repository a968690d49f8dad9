//! The start of one device: its recording, its read-ahead window, and when its program was ready.
//!
//! The window is the trace's own while a profile is followed: a request that mixes blocks of the trace with others waits
//! for both. It is the default once the profile is used up or the program is ready, and what the user says while a
//! recording that was asked for runs.

use std::path::Path;
use std::sync::Arc;

use ublkimg_image::Sha256;
use ublkimg_image::trace::{Trace, TraceEntry, TraceLog};

use super::protocol::{FillMode, StartOptions};
use crate::attach::LoadedProfile;
use crate::device::{READ_AHEAD_DEFAULT_KB, set_read_ahead};
use crate::error::Result;
use crate::figures::{self, FillFigures, ProfileFigures, ReadyAt, RecordingFigures, StartFigures};
use crate::image::ServedImage;
use crate::recorder::{Recorded, Recorder, Replace, Subject};
use crate::start_events::Mark;
use crate::store::Store;
use crate::warm::{END_ENTRIES, Feed, Run, State};

/// See the module.
#[derive(Debug)]
pub(super) struct Starting {
    image: Arc<ServedImage>,
    manifest: Sha256,
    layers: Arc<[Sha256]>,
    options: StartOptions,
    followed: Option<LoadedProfile>,
    /// First blocks of its last entries, on the device.
    end_blocks: Vec<u32>,
    recorder: Option<Recorder>,
    recorded: Option<Recorded>,
    /// The window while a recording that was asked for runs.
    recording_read_ahead_kb: Option<u32>,
    read_ahead_kb: u32,
    ready: Option<ReadyAt>,
    fill: FillMode,
    warming: Warming,
}

/// What a warmer has to do.
#[derive(Debug)]
enum Warming {
    /// Nobody has asked yet.
    NotBegun,
    /// This is left.
    Goes(Feed),
    /// Nothing, for good.
    Over,
}

impl Starting {
    pub(super) fn new(
        image: Arc<ServedImage>,
        manifest: Sha256,
        layers: Arc<[Sha256]>,
        options: StartOptions,
        followed: Option<LoadedProfile>,
    ) -> Self {
        let end_blocks = followed.as_ref().map_or_else(Vec::new, |it| end_blocks(&image, &layers, &it.trace));
        let fill = options.fill;
        Self {
            image,
            manifest,
            layers,
            options,
            followed,
            end_blocks,
            recorder: None,
            recorded: None,
            recording_read_ahead_kb: None,
            read_ahead_kb: READ_AHEAD_DEFAULT_KB,
            ready: None,
            fill,
            warming: Warming::NotBegun,
        }
    }

    /// The window that the device should have now.
    pub(super) fn wanted_read_ahead_kb(&self) -> u32 {
        let default_kb = self.options.read_ahead_kb.unwrap_or(READ_AHEAD_DEFAULT_KB);
        let followed = self.followed.as_ref().filter(|_| self.ready.is_none() && !self.is_used_up());
        let followed_kb = followed.map(|followed| followed.trace.header.read_ahead_kb);
        self.recording_read_ahead_kb.or(followed_kb).unwrap_or(default_kb)
    }

    /// The window that the device has.
    pub(super) fn read_ahead_kb(&self) -> u32 {
        self.read_ahead_kb
    }

    /// The device has that window now.
    pub(super) fn has_read_ahead_kb(&mut self, window_kb: u32) {
        self.read_ahead_kb = window_kb;
    }

    /// Whether the first run is to be recorded.
    fn records_by_default(&self) -> bool {
        self.options.record && self.followed.as_ref().is_none_or(|followed| !followed.kept.is_published)
    }

    /// What a recording of `command` is of; an empty one is that of `add`.
    pub(super) fn subject(&self, command: Vec<String>, read_ahead_kb: u32) -> Subject {
        let command = if command.is_empty() { self.options.command.clone() } else { command };
        Subject { manifest: self.manifest, command, read_ahead_kb, layers: Arc::clone(&self.layers) }
    }

    /// What a start has from its device on: the read-ahead window and the recording. Neither is worth failing for.
    pub(super) fn begin(&mut self, store: &Arc<Store>, name: &str, device: &Path) {
        self.image.events().mark(Mark::Device);
        self.give_window(name, device);
        self.image.set_fill(of_scheduler(self.fill));
        if self.records_by_default()
            && let Err(error) = self.record_by_default(store, name)
        {
            tracing::warn!(device = name, "not recorded: {}", error.chain());
        }
    }

    /// The same for a device that another server had before.
    pub(super) fn come_back(&mut self, name: &str, device: &Path) {
        self.give_window(name, device);
        self.image.set_fill(of_scheduler(self.fill));
    }

    /// Gives a device its read-ahead window.
    fn give_window(&mut self, name: &str, device: &Path) {
        let window_kb = self.wanted_read_ahead_kb();
        match set_read_ahead(device, window_kb) {
            Ok(()) => self.read_ahead_kb = window_kb,
            Err(error) => tracing::warn!(device = name, "{}", error.chain()),
        }
    }

    fn record_by_default(&mut self, store: &Arc<Store>, name: &str) -> Result<()> {
        let subject = self.subject(Vec::new(), self.read_ahead_kb);
        self.recorder = Some(Recorder::start(store, &self.image, name, subject, Replace::IfNotShorter)?);
        Ok(())
    }

    /// The recording that was asked for has begun.
    pub(super) fn recording(&mut self, recorder: Recorder) {
        self.end_warming();
        self.recording_read_ahead_kb = Some(recorder.subject().read_ahead_kb);
        self.recorder = Some(recorder);
    }

    /// Takes the recording, to be stopped.
    pub(super) fn take_recorder(&mut self) -> Option<Recorder> {
        self.recording_read_ahead_kb = None;
        self.recorder.take()
    }

    /// What the recording has become.
    pub(super) fn recorded(&mut self, recorded: Option<Recorded>) {
        self.recorded = recorded.or(self.recorded.take());
    }

    /// The program is ready; the first to say so counts.
    pub(super) fn ready(&mut self) {
        if self.ready.is_some() {
            return;
        }
        let reads = self.image.first_reads();
        let ready = ReadyAt { elapsed_us: reads.elapsed_us(), clock_us: reads.start_clock_us() };
        self.ready = Some(ready);
        self.image.events().mark(Mark::Ready);
        if let Some(recorder) = &self.recorder {
            recorder.ready(ready.clock_us);
        }
    }

    /// Whether there is something for a warmer to do.
    pub(super) fn warms(&self) -> bool {
        self.options.warm && self.followed.is_some() && !self.is_recorded() && !matches!(self.warming, Warming::Over)
    }

    /// A warmer is to leave the mount alone from now on.
    pub(super) fn end_warming(&mut self) {
        self.warming = Warming::Over;
    }

    /// What a warmer is to push now; `None` when it is over.
    pub(super) fn warm(&mut self) -> Option<Vec<Run>> {
        if !self.warms() || self.ready.is_some() {
            self.end_warming();
        }
        if let (Warming::NotBegun, Some(followed)) = (&self.warming, &self.followed) {
            let (image, layers, trace) = (&self.image, &self.layers, &followed.trace);
            let runs = trace.entries.iter().filter_map(|entry| {
                let start = device_block(image, layers, trace, entry)?;
                Some(start..start.checked_add(u32::from(entry.blocks))?)
            });
            self.warming = Warming::Goes(Feed::new(runs));
        }
        let Warming::Goes(feed) = &mut self.warming else { return None };
        let image = &self.image;
        let runs = feed.turn(|run| {
            if run.clone().all(|block| image.first_reads().has_seen(block)) {
                State::Read
            } else if image.holds(run.clone()) {
                State::Here
            } else {
                State::Absent
            }
        });
        image.give(&runs);
        if runs.is_empty() && feed.is_over() {
            self.end_warming();
            return None;
        }
        Some(runs)
    }

    pub(super) fn set_fill(&mut self, mode: FillMode) {
        self.fill = mode;
        self.image.set_fill(of_scheduler(mode));
    }

    fn is_used_up(&self) -> bool {
        let read = self.end_blocks.iter().filter(|block| self.image.first_reads().has_seen(**block)).count();
        !self.end_blocks.is_empty() && 2 * read >= self.end_blocks.len()
    }

    /// Has the recording catch up with the reads; false without one.
    pub(super) fn nudge_recorder(&self) -> bool {
        self.recorder.as_ref().inspect(|recorder| recorder.nudge()).is_some()
    }

    /// Whether a recording is under way.
    pub(super) fn is_recorded(&self) -> bool {
        self.recorder.as_ref().is_some_and(Recorder::is_running)
    }

    /// What the figures are made of, to be computed without holding up anybody.
    pub(super) fn look(&self) -> Look {
        let recorded = self.recorded.as_ref();
        Look {
            image: Arc::clone(&self.image),
            layers: Arc::clone(&self.layers),
            followed: self.followed.clone(),
            is_used_up: self.is_used_up(),
            recorded: self.recorded.clone(),
            recording: RecordingFigures {
                is_running: self.is_recorded(),
                entries: match (&self.recorder, recorded) {
                    (Some(recorder), _) => recorder.entries(),
                    (None, Some(recorded)) => recorded.trace.entries.len() as u64,
                    (None, None) => 0,
                },
                trace: recorded.map(|recorded| recorded.path.clone()),
            },
            read_ahead_kb: self.read_ahead_kb,
            ready: self.ready,
            fill: self.fill,
        }
    }
}

/// A start at one moment.
#[derive(Debug)]
pub(super) struct Look {
    image: Arc<ServedImage>,
    layers: Arc<[Sha256]>,
    followed: Option<LoadedProfile>,
    is_used_up: bool,
    recorded: Option<Recorded>,
    recording: RecordingFigures,
    read_ahead_kb: u32,
    ready: Option<ReadyAt>,
    fill: FillMode,
}

impl Look {
    /// The figures; `running` is the trace of a recording under way. Asks the engine.
    pub(super) fn figures(self, running: Option<&Trace>, duplicates: u64) -> StartFigures {
        let of_this_start = running.or(self.recorded.as_ref().map(|recorded| &*recorded.trace));
        let trace = of_this_start.or(self.followed.as_ref().map(|followed| &*followed.trace));
        let report = self.image.prefetch().engine;
        let link = report.link;
        let bound = trace
            .zip(link)
            .and_then(|(trace, link)| figures::bound(&self.image, &self.layers, trace, self.ready, link));
        let (present_bytes, total_bytes) = self.image.stored_bytes();
        let profile = self.followed.as_ref().map(|followed| ProfileFigures {
            source: followed.kept.source.clone(),
            blocks: followed.trace.blocks(),
            has_hot_blob: followed.has_hot_blob,
            is_used_up: self.is_used_up,
        });
        let is_finished = present_bytes == total_bytes || report.fill.is_some_and(|fill| fill.finished);
        let fetched = report.prefetched;
        StartFigures {
            ready_us: self.ready.map(|ready| ready.elapsed_us),
            first_reads: self.image.statistics().first_reads,
            demand_requests: fetched.demand_requests,
            demand_bytes: fetched.demand_bytes,
            prefetch_requests: fetched.prefetch_requests,
            prefetch_bytes: fetched.prefetch_bytes,
            waste_bytes: fetched.prefetch_bytes.saturating_sub(fetched.used_bytes),
            duplicates,
            profile,
            read_ahead_kb: self.read_ahead_kb,
            fill: FillFigures { mode: self.fill, present_bytes, total_bytes, is_finished },
            recording: self.recording,
            bound,
        }
    }
}

fn of_scheduler(mode: FillMode) -> ublkimg_scheduler::FillMode {
    match mode {
        FillMode::Off => ublkimg_scheduler::FillMode::Off,
        FillMode::Idle => ublkimg_scheduler::FillMode::Idle,
        FillMode::Full => ublkimg_scheduler::FillMode::Full,
    }
}

/// The log of a recording under way, as far as it is written.
pub(super) fn running_trace(log: &Path) -> Option<Trace> {
    let bytes = std::fs::read(log).ok()?;
    let trace = TraceLog::decode(&bytes).and_then(TraceLog::into_trace).ok()?;
    (!trace.entries.is_empty()).then_some(trace)
}

fn end_blocks(image: &ServedImage, layers: &[Sha256], trace: &Trace) -> Vec<u32> {
    let entries = trace.entries.iter().rev().take(END_ENTRIES);
    entries.filter_map(|entry| device_block(image, layers, trace, entry)).collect()
}

/// Where an entry of a trace begins on the device.
fn device_block(image: &ServedImage, layers: &[Sha256], trace: &Trace, entry: &TraceEntry) -> Option<u32> {
    let blob = trace.header.blobs.get(usize::from(entry.blob))?;
    let layer = u16::try_from(layers.iter().position(|layer| layer == blob)?).ok()?;
    image.device_block(layer, entry.block)
}
