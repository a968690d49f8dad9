//! What commands ask of the start of a device: its recording, that it is ready, its fill, its figures.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::attached::Attached;
use super::pace::Pace;
use super::protocol::{Answer, FillMode};
use super::server::{Server, blocking, no_device};
use super::start::running_trace;
use crate::device::READ_AHEAD_MAX_KB;
use crate::error::{Error, ErrorKind, Result};
use crate::recorder::{Recorded, Recorder, Replace};

/// How often it is looked whether a start has passed the end of its profile.
const READ_AHEAD_POLL: Duration = Duration::from_millis(500);

/// A recorder that is asked for what was read just now has written it after this time, more likely than not.
const NUDGE: Duration = Duration::from_millis(20);

impl Server {
    /// Ends the recording under way, if any, and starts one of what is read from now on.
    pub(super) async fn record_start(
        self: Arc<Self>,
        name: &str,
        command: Vec<String>,
        read_ahead_kb: u32,
    ) -> Result<()> {
        if read_ahead_kb > READ_AHEAD_MAX_KB {
            let text = format!("a read-ahead window of {read_ahead_kb} KiB: at most {READ_AHEAD_MAX_KB}");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let _name_lock = self.locks.lock(name).await;
        if let Some(before) = self.with_device(name, |attached| attached.start.take_recorder())? {
            self.finish(name, before).await?;
        }
        let (image, subject) = self.with_device(name, |attached| {
            (Arc::clone(&attached.image), attached.start.subject(command, read_ahead_kb))
        })?;
        let (store, of_log) = (Arc::clone(&self.store), name.to_owned());
        let start = move || Recorder::start(&store, &image, &of_log, subject, Replace::Always);
        let recorder = blocking(start).await?;
        self.with_device(name, |attached| attached.start.recording(recorder))?;
        self.set_read_ahead(name).await
    }

    /// Ends the recording under way and says where its trace is.
    pub(super) async fn record_stop(self: Arc<Self>, name: &str) -> Result<Answer> {
        let _name_lock = self.locks.lock(name).await;
        let recorder = self.with_device(name, |attached| attached.start.take_recorder())?;
        let recorder = recorder.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{name} is not recorded: `ublkimg record start {name}` first"))
        })?;
        let recorded = self.finish(name, recorder).await?;
        self.set_read_ahead(name).await?;
        let recorded = recorded.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("nothing was read from {name} while it was recorded: no trace"))
        })?;
        Ok(Answer::Recorded {
            path: recorded.path,
            entries: recorded.trace.entries.len() as u64,
            blocks: recorded.trace.blocks(),
            lost: recorded.trace.header.lost,
        })
    }

    async fn finish(&self, name: &str, recorder: Recorder) -> Result<Option<Recorded>> {
        let recorded = blocking(move || recorder.stop()).await?;
        self.with_device(name, |attached| attached.start.recorded(recorded.clone()))?;
        Ok(recorded)
    }

    pub(super) async fn ready(self: Arc<Self>, name: &str) -> Result<()> {
        // First of all: this is the moment.
        self.with_device(name, |attached| attached.start.ready())?;
        let _name_lock = self.locks.lock(name).await;
        self.set_read_ahead(name).await?;
        // After a start more is known of the link than ever.
        let server = Arc::clone(&self);
        blocking(move || {
            server.keep_links();
            Ok(())
        })
        .await
    }

    /// Fills in another way from now on; the next server does so too.
    pub(super) async fn fill(self: Arc<Self>, name: &str, mode: FillMode) -> Result<()> {
        let _name_lock = self.locks.lock(name).await;
        let mut record = self.record_of(name)?;
        record.start.fill = mode;
        self.change_record(record).await?;
        self.with_device(name, |attached| attached.start.set_fill(mode))
    }

    /// What the device's warmer is to push next.
    pub(super) fn warm(&self, name: &str) -> Result<Answer> {
        self.with_device(name, |attached| Answer::Warm(attached.start.warm()))
    }

    /// Sends the device's warmer away.
    pub(super) fn end_warming(&self, name: &str) -> Result<()> {
        self.with_device(name, |attached| attached.start.end_warming())
    }

    pub(super) async fn figures(self: Arc<Self>, name: &str) -> Result<Answer> {
        if self.with_device(name, |attached| attached.start.nudge_recorder())? {
            tokio::time::sleep(NUDGE).await;
        }
        let is_recorded = self.with_device(name, |attached| attached.start.is_recorded())?;
        let log = self.store.recording_log(name);
        let running = if is_recorded { blocking(move || Ok(running_trace(&log))).await? } else { None };
        let look = self.with_device(name, |attached| attached.start.look())?;
        // The bound takes a while for a long trace, and the engine is asked.
        let server = Arc::clone(&self);
        let figures = move || Ok(look.figures(running.as_ref(), server.engine.counters().duplicates));
        let figures = blocking(figures).await?;
        Ok(Answer::Figures(Box::new(figures)))
    }

    pub(super) fn events(&self, name: &str) -> Result<Answer> {
        self.with_device(name, |attached| Answer::Events(attached.image.events().all()))
    }

    /// Gives the device the window that it should have now.
    async fn set_read_ahead(&self, name: &str) -> Result<()> {
        let path = self.with_device(name, |attached| {
            let window_kb = attached.start.wanted_read_ahead_kb();
            (window_kb != attached.start.read_ahead_kb()).then(|| (attached.device.path().to_path_buf(), window_kb))
        })?;
        let Some((path, window_kb)) = path else { return Ok(()) };
        blocking(move || crate::device::set_read_ahead(&path, window_kb)).await?;
        self.with_device(name, |attached| attached.start.has_read_ahead_kb(window_kb))
    }

    /// Widens the window of each device whose start has passed the end of its profile. Runs as long as the server.
    pub(super) async fn watch_read_ahead(self: Arc<Self>) {
        let mut pace = Pace::new(READ_AHEAD_POLL);
        loop {
            let pause = pace.next(self.activity());
            let _ = tokio::time::timeout(pause, self.device_came.notified()).await;
            let is_due = |(name, attached): (&String, &Attached)| {
                let start = &attached.start;
                (start.wanted_read_ahead_kb() != start.read_ahead_kb()).then(|| name.clone())
            };
            let due: Vec<String> = self.attached.lock().iter().filter_map(is_due).collect();
            for name in due {
                let _name_lock = self.locks.lock(&name).await;
                if let Err(error) = self.set_read_ahead(&name).await {
                    tracing::debug!(device = name, "{}", error.chain());
                }
            }
        }
    }

    /// Another number whenever a device was read from, something was fetched, or a device came or went.
    pub(super) fn activity(&self) -> u64 {
        let attached = self.attached.lock();
        let of_device = |attached: &Attached| {
            let counted = attached.image.statistics();
            counted.reads + counted.fetched_chunks
        };
        attached.len() as u64 + attached.values().map(of_device).sum::<u64>()
    }

    pub(super) fn with_device<T>(&self, name: &str, work: impl FnOnce(&mut Attached) -> T) -> Result<T> {
        self.attached.lock().get_mut(name).map(work).ok_or_else(|| no_device(name))
    }
}

/// Ends the recordings of all devices, at the end of the server.
pub(super) fn finish_all(attached: &mut BTreeMap<String, Attached>) {
    for (name, attached) in attached {
        if let Some(recorder) = attached.start.take_recorder()
            && let Err(error) = recorder.stop()
        {
            tracing::warn!(device = name, "{}", error.chain());
        }
    }
}
