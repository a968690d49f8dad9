//! Records the first reads of a device into a trace.
//!
//! ```text
//! queue thread ─(bounded queue)─► recorder thread ─► append-only log ─► trace, under traces/ of the store
//! ```
//! The queue thread never waits for the recorder: what there is no room for is counted as lost. The recorder looks at the
//! queue every [`POLL`], so a first read costs its thread no system call. What a crash leaves of a log is a shorter
//! recording: [`recover_logs`] makes traces of those when the next server starts.
//!
//! A recording ends when it is stopped, when its device goes, and at the limits below, which count from the first read
//! that is recorded: a device may wait for its container for days.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ublkimg_image::trace::{
    ENTRY_BLOCKS_MAX, GAP_US_MAX, LogEnd, TRACE_ENTRIES_MAX, Trace, TraceEntry, TraceHeader, TraceLog,
};
use ublkimg_image::{Sha256, Target};

use crate::error::{Error, ErrorKind, Result};
use crate::first_reads::FirstRead;
use crate::image::ServedImage;
use crate::store::Store;
use crate::trace_file;

/// A start that takes longer is no start.
const DURATION_MAX: Duration = Duration::from_secs(600);

/// A program that reads nothing new for so long has started.
const QUIET_MAX: Duration = Duration::from_secs(30);

/// Entries of a recording.
const ENTRIES_MAX: usize = 1_000_000;

/// How often the queue of first reads is emptied while there are some, and while there were none yet.
const POLL: Duration = Duration::from_millis(50);
const IDLE_POLL: Duration = Duration::from_millis(250);

/// The confidence of what one run read.
const IN_EVERY_RUN: u8 = 255;

/// No such moment.
const NEVER_US: u64 = u64::MAX;

/// What a recording is of.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    /// Digest of the image's manifest.
    pub(crate) manifest: Sha256,
    /// What is run, if known.
    pub(crate) command: Vec<String>,
    /// That of the device while it is recorded.
    pub(crate) read_ahead_kb: u32,
    /// The digests of the layer blobs, in the order of the device table.
    pub(crate) layers: Arc<[Sha256]>,
}

/// A finished recording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    /// The trace in the store.
    pub(crate) path: PathBuf,
    /// The trace.
    pub(crate) trace: Arc<Trace>,
}

/// When a finished recording takes the place of the trace that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replace {
    /// Always: it was asked for.
    Always,
    /// When it has at least as many blocks: a run that ended early does not spoil the next one.
    IfNotShorter,
}

#[derive(Debug)]
struct Shared {
    is_stopping: AtomicBool,
    ready_at_us: AtomicU64,
    entries: AtomicU64,
    has_ended: AtomicBool,
}

/// A recording under way, or one that ended at a limit.
#[derive(Debug)]
pub(crate) struct Recorder {
    shared: Arc<Shared>,
    subject: Subject,
    thread: JoinHandle<Result<Option<Recorded>>>,
}

impl Recorder {
    /// Starts recording into the log of the device `name`.
    ///
    /// # Errors
    /// `Busy` when the image is recorded already; `Io` and `NoSpace`.
    pub(crate) fn start(
        store: &Arc<Store>,
        image: &Arc<ServedImage>,
        name: &str,
        subject: Subject,
        replace: Replace,
    ) -> Result<Self> {
        // Before its log is touched, which may be that of the other recording.
        if !image.first_reads().start_recording() {
            return Err(Error::new(ErrorKind::Busy, format!("{name} is recorded already")));
        }
        let log = Log::create(store.recording_log(name), &subject);
        let log = log.inspect_err(|_| image.first_reads().stop_recording())?;
        let shared = Arc::new(Shared {
            is_stopping: AtomicBool::new(false),
            ready_at_us: AtomicU64::new(NEVER_US),
            entries: AtomicU64::new(0),
            has_ended: AtomicBool::new(false),
        });
        let (of_thread, store, image) = (Arc::clone(&shared), Arc::clone(store), Arc::clone(image));
        let layers = Arc::clone(&subject.layers);
        let run = move || {
            let recorded =
                Recording::new(&image, &of_thread, log, &layers).run().and_then(|log| keep(&store, &log, replace));
            if let Err(error) = &recorded {
                tracing::warn!("a recording is lost: {}", error.chain());
            }
            of_thread.has_ended.store(true, Ordering::Release);
            recorded
        };
        let thread = std::thread::Builder::new().name("recorder".to_owned()).spawn(run);
        let thread = thread.map_err(|error| Error::io("start a recorder", error))?;
        Ok(Self { shared, subject, thread })
    }

    /// What it records.
    pub(crate) fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The program is ready: noted in the trace, once.
    pub(crate) fn ready(&self, at_us: u64) {
        let never = (NEVER_US, at_us);
        let _ = self.shared.ready_at_us.compare_exchange(never.0, never.1, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether it still takes first reads.
    pub(crate) fn is_running(&self) -> bool {
        !self.shared.has_ended.load(Ordering::Acquire)
    }

    /// Has it look at the queue now and not only when it next would.
    pub(crate) fn nudge(&self) {
        self.thread.thread().unpark();
    }

    /// Entries so far.
    pub(crate) fn entries(&self) -> u64 {
        self.shared.entries.load(Ordering::Acquire)
    }

    /// Ends it, and gives the trace; none if nothing was read. Waits for the disk.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn stop(self) -> Result<Option<Recorded>> {
        self.shared.is_stopping.store(true, Ordering::Release);
        self.thread.thread().unpark();
        self.thread.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "a recorder panicked")))
    }
}

/// The file that entries are appended to.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    header: TraceHeader,
}

impl Log {
    fn create(path: PathBuf, subject: &Subject) -> Result<Self> {
        let mut blobs: Vec<Sha256> = Vec::new();
        for layer in &*subject.layers {
            if !blobs.contains(layer) {
                blobs.push(*layer);
            }
        }
        let header = TraceHeader {
            manifest: subject.manifest,
            command: subject.command.clone(),
            read_ahead_kb: subject.read_ahead_kb,
            runs: 1,
            ready_us: None,
            lost: 0,
            blobs,
        };
        let begin = TraceLog::begin(&header).map_err(|error| Error::caused(ErrorKind::Invalid, "record", error))?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&path);
        let mut log = Self { file: file.map_err(|error| Error::path("create", &path, error))?, path, header };
        log.write(&begin)?;
        Ok(log)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::path("write", &self.path, error))
    }

    fn append(&mut self, entries: &[TraceEntry]) -> Result<()> {
        let bytes = TraceLog::append(&self.header, entries);
        self.write(&bytes.map_err(|error| Error::caused(ErrorKind::Internal, "record", error))?)
    }
}

/// The thread's side.
struct Recording<'a> {
    image: &'a ServedImage,
    shared: &'a Shared,
    log: Log,
    /// Place in the header's blobs of each layer.
    blobs: Vec<u16>,
    batch: Vec<TraceEntry>,
    entries: usize,
    first_at_us: Option<u64>,
    previous_at_us: u64,
    began: Option<Instant>,
    last: Instant,
}

impl<'a> Recording<'a> {
    fn new(image: &'a ServedImage, shared: &'a Shared, log: Log, layers: &[Sha256]) -> Self {
        let place = |layer: &Sha256| log.header.blobs.iter().position(|blob| blob == layer);
        let place = |layer: &Sha256| place(layer).and_then(|place| u16::try_from(place).ok()).unwrap_or(u16::MAX);
        let blobs = layers.iter().map(place).collect();
        let (batch, last) = (Vec::new(), Instant::now());
        Self { image, shared, log, blobs, batch, entries: 0, first_at_us: None, previous_at_us: 0, began: None, last }
    }

    fn run(mut self) -> Result<PathBuf> {
        let mut outcome = Ok(());
        while outcome.is_ok() && !self.shared.is_stopping.load(Ordering::Acquire) && !self.is_over() {
            std::thread::park_timeout(if self.entries == 0 { IDLE_POLL } else { POLL });
            outcome = self.drain();
        }
        self.image.first_reads().stop_recording();
        outcome.and_then(|()| self.drain())?;
        let at_us = self.shared.ready_at_us.load(Ordering::Acquire);
        let ready_us = self.first_at_us.filter(|_| at_us != NEVER_US).map(|first| at_us.saturating_sub(first));
        let end = TraceLog::finish(LogEnd { ready_us, lost: self.image.first_reads().lost() });
        self.log.write(&end.map_err(|error| Error::caused(ErrorKind::Internal, "record", error))?)?;
        Ok(self.log.path)
    }

    fn is_over(&self) -> bool {
        let past = |since: Instant, limit: Duration| since.elapsed() >= limit;
        self.entries >= ENTRIES_MAX
            || self.began.is_some_and(|began| past(began, DURATION_MAX) || past(self.last, QUIET_MAX))
    }

    /// Takes what there is and appends it to the log.
    fn drain(&mut self) -> Result<()> {
        while self.entries < ENTRIES_MAX
            && let Some(read) = self.image.first_reads().pop()
        {
            self.take(read);
        }
        if self.batch.is_empty() {
            return Ok(());
        }
        self.last = Instant::now();
        self.began.get_or_insert(self.last);
        let appended = self.log.append(&self.batch);
        self.batch.clear();
        // Who sees them finds them in the log.
        self.shared.entries.store(self.entries as u64, Ordering::Release);
        appended
    }

    /// A first read as entries: of one blob each, and no longer than an entry may be.
    fn take(&mut self, read: FirstRead) {
        let since = if self.first_at_us.is_some() { read.at_us.saturating_sub(self.previous_at_us) } else { 0 };
        let mut since_previous_us = since.min(GAP_US_MAX);
        self.first_at_us.get_or_insert(read.at_us);
        self.previous_at_us = self.previous_at_us.max(read.at_us);
        for segment in self.image.segments(read.start_block, read.len_blocks) {
            let Target::Blob { index, mut block } = segment.target else { continue };
            let Some(&blob) = self.blobs.get(usize::from(index)) else { continue };
            let mut left = segment.len_blocks;
            while left > 0 {
                let blocks = u16::try_from(left).unwrap_or(u16::MAX).min(ENTRY_BLOCKS_MAX);
                self.batch.push(TraceEntry { blob, block, blocks, since_previous_us, confidence: IN_EVERY_RUN });
                self.entries += 1;
                since_previous_us = 0;
                block += u32::from(blocks);
                left -= u32::from(blocks);
            }
        }
    }
}

const _: () = assert!(ENTRIES_MAX + READ_ENTRIES_MAX <= TRACE_ENTRIES_MAX, "a log can hold a recording");

/// Entries that the last read of a recording may add: the longest read has 256 blocks, each of which may be of another blob.
const READ_ENTRIES_MAX: usize = 256;

/// Makes a trace of a log, keeps it in the store and removes the log. None if it has no entries.
fn keep(store: &Store, log: &Path, replace: Replace) -> Result<Option<Recorded>> {
    let bytes = std::fs::read(log).map_err(|error| Error::path("read", log, error))?;
    let trace = TraceLog::decode(&bytes).and_then(TraceLog::into_trace);
    let trace = trace.map_err(|error| Error::caused(ErrorKind::Corrupt, log.display().to_string(), error))?;
    let (manifest, command) = (trace.header.manifest, trace.command_digest());
    let path = store.host_trace_path(manifest, command);
    let kept_blocks = || -> Option<u64> {
        let stored = store.host_trace(manifest, command).ok().flatten()?;
        Some(trace_file::from_stored(&stored).ok()?.blocks())
    };
    let is_wanted = replace == Replace::Always || kept_blocks().is_none_or(|kept| kept <= trace.blocks());
    if !trace.entries.is_empty() && is_wanted {
        store.put_host_trace(manifest, command, &trace_file::to_stored(&trace)?)?;
    }
    std::fs::remove_file(log).map_err(|error| Error::path("remove", log, error))?;
    Ok((!trace.entries.is_empty()).then(|| Recorded { path, trace: Arc::new(trace) }))
}

/// Makes traces of the logs that a server which died left. For the start of a server: nothing is recorded yet.
pub(crate) fn recover_logs(store: &Store) -> Result<()> {
    for log in store.recording_logs()? {
        match keep(store, &log, Replace::IfNotShorter) {
            Ok(Some(recorded)) => {
                let entries = recorded.trace.entries.len();
                tracing::warn!(log = %log.display(), entries, "a recording was cut short: what there is of it is kept");
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!("a recording is lost: {}", error.chain());
                let _ = std::fs::remove_file(&log);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
