//! A new program takes the devices over from the one that serves, without an error and almost without a pause.
//!
//! ```text
//! ublkimg daemon --takeover    guard (old program)         server (old)            server (new)
//! request, SIGUSR1 ───────────► starts ─────────────────────────────────────────► probes the kernel, reads the records,
//!                                                          serves                  opens and checks all images
//!                                                          ◄───────── hand over ── and only then asks
//!                                                          syncs, answers, ends
//!                               sees that it ended                                 takes lock and devices: readers waited
//!                               sees that the new one serves                       until here
//!                               becomes the new program
//! ◄──────────────── outcome ──── guard (new program)
//! ```
//! Devices are handed over as after a crash: the old server ends, the kernel keeps what is asked meanwhile and gives what
//! was under way to the next server. So there is one way of taking devices, tested by every kill, and a pause as short as
//! the part of it that cannot be done before (`UBLK_F_QUIESCE` would only replace the end of the old process).
//!
//! Invariant: until the old server has answered, nothing has changed; from then on its guard, whose program is the old
//! one, starts a server of its own program unless the new one comes to serve. So a new program that is broken costs a
//! pause at most.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ublkimg_registry::Digest;

use super::protocol::{Fault, Request};
use super::server::options_of;
use super::state::{DeviceRecord, Records};
use super::{Directories, client, guard};
use crate::attach::{self, KnownImage};
use crate::device::{Transport, ublk};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;

/// How long the whole may take: checking 64 images takes seconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// How often it is looked for the outcome.
const OUTCOME_POLL: Duration = Duration::from_millis(10);

/// How long the old server may be busy with other commands.
const BUSY_TIMEOUT: Duration = Duration::from_secs(20);

/// A try every so often while it is.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// The old server's answer, before which it syncs.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the old server may take to end once it has answered.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// Between looks whether it has: readers wait.
const LOCK_POLL: Duration = Duration::from_millis(1);

/// The exit code of a server that has handed over: its guard is to see to it that another one serves.
pub(super) const HANDED_OVER_EXIT_CODE: i32 = 75;

/// What became of a takeover.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Outcome {
    Done,
    Failed(Fault),
}

fn request_path(directories: &Directories) -> PathBuf {
    directories.run.join("takeover.request")
}

fn outcome_path(directories: &Directories) -> PathBuf {
    directories.run.join("takeover.outcome")
}

/// Has `program` take over from the daemon that runs, and waits until it has.
///
/// # Errors
/// [`ErrorKind::NotFound`] without a daemon; [`ErrorKind::Busy`] during another takeover; what kept the new program from it:
/// then the old one serves on.
pub fn request(directories: &Directories, program: &Path) -> Result<()> {
    let no_daemon = || Error::new(ErrorKind::NotFound, "no daemon runs: start one with `ublkimg daemon`");
    let guard = guard::running(directories).ok_or_else(no_daemon)?;
    let lock_path = directories.run.join("takeover.lock");
    let lock = std::fs::File::create(&lock_path).map_err(|error| Error::path("create", &lock_path, error))?;
    if lock.try_lock().is_err() {
        return Err(Error::new(ErrorKind::Busy, "another takeover is under way"));
    }
    let _ = std::fs::remove_file(outcome_path(directories));
    replace(&request_path(directories), program.as_os_str().as_bytes())?;
    rustix::process::kill_process(guard, rustix::process::Signal::USR1)
        .map_err(|error| Error::io("cannot reach the daemon's guard", error.into()))?;
    let deadline = Instant::now() + REQUEST_TIMEOUT;
    while Instant::now() < deadline {
        if let Ok(bytes) = std::fs::read(outcome_path(directories)) {
            return match serde_json::from_slice(&bytes) {
                Ok(Outcome::Done) => Ok(()),
                Ok(Outcome::Failed(fault)) => Err(Error::new(fault.kind, fault.message)),
                Err(error) => Err(Error::caused(ErrorKind::Internal, "the outcome of the takeover", error)),
            };
        }
        std::thread::sleep(OUTCOME_POLL);
    }
    let seconds = REQUEST_TIMEOUT.as_secs();
    Err(Error::new(ErrorKind::TimedOut, format!("the takeover is not done after {seconds} s; see the daemon's log")))
}

/// The program that is to take over, if somebody asked for it. For the guard.
pub(super) fn requested(directories: &Directories) -> Option<PathBuf> {
    let bytes = std::fs::read(request_path(directories)).ok()?;
    let _ = std::fs::remove_file(request_path(directories));
    Some(PathBuf::from(OsStr::from_bytes(&bytes)))
}

/// Tells whoever asked.
pub(super) fn report(directories: &Directories, outcome: &Outcome) {
    let written = serde_json::to_vec(outcome)
        .map_err(|error| Error::caused(ErrorKind::Internal, "an outcome", error))
        .and_then(|bytes| replace(&outcome_path(directories), &bytes));
    if let Err(error) = written {
        tracing::error!("the outcome of a takeover is not told: {}", error.chain());
    }
}

/// Readers see the old file or all of the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    let written = std::fs::write(&new, bytes).and_then(|()| std::fs::rename(&new, path));
    written.map_err(|error| Error::path("write", path, error))
}

/// Images that were checked beforehand, by the names of their devices.
#[derive(Default)]
pub(super) struct Known(BTreeMap<String, KnownImage>);

impl Known {
    /// The image of a record, if it was checked.
    pub(super) fn take(&mut self, record: &DeviceRecord) -> Option<KnownImage> {
        let is_of = |known: &KnownImage| known.manifest_digest().to_string() == record.manifest;
        self.0.remove(&record.name).filter(is_of)
    }
}

/// All that can be done while the other server still serves. Whatever this program cannot take over it must find here.
pub(super) async fn prepare(directories: &Directories, store: &Arc<Store>) -> Result<Known> {
    let mut known = BTreeMap::new();
    let listed = Records::new(directories.devices()).list()?;
    if let Some(unreadable) = listed.unreadable.first() {
        let path = unreadable.path.display();
        let text = format!("{path} is no record that this version can read ({}): move it away first", unreadable.why);
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    for record in listed.records {
        if record.transport != Transport::Ublk {
            let text = format!("{} is served over FUSE, which cannot be taken over: remove it first", record.name);
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        ublk::features()?;
        let bad_record = |error| Error::caused(ErrorKind::Corrupt, format!("record of {}", record.name), error);
        let manifest: Digest = record.manifest.parse().map_err(bad_record)?;
        let (location, options) = options_of(&record)?;
        let repository = attach::open(&location, &options).await?;
        let image = KnownImage::open(store, &location, repository, manifest).await?;
        known.insert(record.name, image);
    }
    Ok(Known(known))
}

/// Asks the other server to let go, and takes its store. If there is none any more, that is as good; one that is just
/// starting is waited for.
pub(super) fn take(directories: &Directories, store: &Store) -> Result<()> {
    let busy_until = Instant::now() + BUSY_TIMEOUT;
    loop {
        let outcome = match client::ask(directories, &Request::HandOver, HAND_OVER_TIMEOUT) {
            Ok(Some(_)) => return own(store, LOCK_TIMEOUT),
            Ok(None) => own(store, BUSY_PAUSE),
            Err(error) => Err(error),
        };
        match outcome {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < busy_until => {
                std::thread::sleep(BUSY_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn own(store: &Store, timeout: Duration) -> Result<()> {
    let began = Instant::now();
    loop {
        match store.own() {
            Err(error) if error.kind() == ErrorKind::Busy && began.elapsed() < timeout => std::thread::sleep(LOCK_POLL),
            owned => return owned,
        }
    }
}
