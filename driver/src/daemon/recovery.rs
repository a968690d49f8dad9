//! Taking back the devices of a server that died.
//!
//! A record says what was served; the kernel says what is left. Everything else that is needed lies in the store, so this
//! works without the registry. Readers of a device wait in the kernel until this is done.
//!
//! | the kernel has | what it means | what is done |
//! |---|---|---|
//! | the device, quiesced | its server died | taken over |
//! | the device, live | its server is dying | waited for, then taken over |
//! | the device, dead | the server died before it started | deleted, the record too |
//! | no such device, or another boot, or somebody else's of that number | it is gone | the record is removed |
//! | one of ours that was never started, without a record | its server died before it wrote one | deleted |
//!
//! A device that cannot be taken over, because the store lost what it needs, is deleted with its record: readers get EIO
//! instead of waiting for ever, and its name is free again. So is one whose record this version cannot read; that file is
//! kept aside. Where somebody is in the way, a server that does not end or images that have all the memory there is for them,
//! it is tried again beside serving, for as long as the guard waits for a server. One that another process serves is left
//! alone.
//!
//! A FUSE device dies with its server: its record is removed. All other devices are left alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use ublkimg_registry::Digest;

use super::attached::Attached;
use super::server::{Server, blocking, options_of, starting};
use super::server_process::process_lives;
use super::state::{DeviceRecord, Unreadable};
use super::takeover::Known;
use crate::attach::{self, KnownImage, LoadedImage};
use crate::device::Prepared;
use crate::device::ublk::{self, Claim, DeviceState};
use crate::error::{Error, ErrorKind, Result};

/// Between attempts to take back a device that somebody is in the way of.
const AGAIN_PAUSE: Duration = Duration::from_secs(1);

/// A killed process may take this long to let go of its devices.
const DYING_TIMEOUT: Duration = Duration::from_secs(20);

/// Takes back every device that can be; the others are given up. Both are logged. All at once: readers of each wait.
/// `known` are images that were checked before.
///
/// # Errors
/// Only if the records cannot be listed.
pub(super) async fn recover(server: &Arc<Server>, mut known: Known) -> Result<()> {
    let mut tasks = JoinSet::new();
    let listed = server.records.list()?;
    for unreadable in listed.unreadable {
        // Beside the others, as what is given up.
        tokio::spawn(give_up_unreadable(Arc::clone(server), unreadable));
    }
    for record in listed.records {
        let known = known.take(&record);
        tasks.spawn(recover_or_give_up(Arc::clone(server), record, known));
    }
    while let Some(joined) = tasks.join_next().await {
        if let Err(error) = joined {
            tracing::error!("taking back a device: {error}");
        }
    }
    if let Err(error) = blocking(delete_unrecorded).await {
        tracing::debug!("no ublk devices to look at: {}", error.chain());
    }
    Ok(())
}

async fn recover_or_give_up(server: Arc<Server>, record: DeviceRecord, known: Option<KnownImage>) {
    let lock = server.locks.lock(&record.name).await;
    let began = Instant::now();
    if let Some(next) = attempt(&server, &record, known, began).await {
        // Beside the others: what holds it may take its time.
        tokio::spawn(async move {
            finish(&server, &record, next, began).await;
            drop(lock);
        });
    }
}

/// What is to be done with a device that was not taken back.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// It is tried again: whoever is in the way may go.
    TryAgain,
    /// It is deleted: readers get EIO.
    GiveUp,
    /// It is another's.
    Leave,
}

impl Next {
    /// After an error of that kind, so long after the first attempt.
    fn after(kind: ErrorKind, elapsed: Duration, limit: Duration, is_served: bool) -> Self {
        match kind {
            ErrorKind::Busy if elapsed < limit => Self::TryAgain,
            ErrorKind::Busy if is_served => Self::Leave,
            _ => Self::GiveUp,
        }
    }
}

/// Tries to take a device back. Nothing is left to do if it has come back, or is gone.
async fn attempt(
    server: &Arc<Server>,
    record: &DeviceRecord,
    known: Option<KnownImage>,
    began: Instant,
) -> Option<Next> {
    let name = record.name.as_str();
    let error = match recover_one(server, record.clone(), known).await {
        Ok(true) => {
            tracing::warn!(device = name, after = ?began.elapsed(), "taken back");
            return None;
        }
        Ok(false) => {
            tracing::warn!(device = name, "gone: its record is removed");
            forget(server, name);
            return None;
        }
        Err(error) => error,
    };
    let claim = record.claim(&server.boot_id);
    let is_served = blocking(move || claim.map_or(Ok(false), is_served)).await.unwrap_or(false);
    let next = Next::after(error.kind(), began.elapsed(), server.recovery_timeout, is_served);
    let consequence = match next {
        Next::TryAgain => "cannot be taken back now, is tried again",
        Next::GiveUp => "cannot be taken back, its readers get EIO",
        Next::Leave => "is served by another process, and left to it",
    };
    tracing::error!(device = name, "{consequence}: {}", error.chain());
    Some(next)
}

/// Tries again until there is an end.
async fn finish(server: &Arc<Server>, record: &DeviceRecord, mut next: Next, began: Instant) {
    while next == Next::TryAgain {
        tokio::time::sleep(AGAIN_PAUSE).await;
        let Some(then) = attempt(server, record, None, began).await else {
            return server.device_came.notify_waiters();
        };
        next = then;
    }
    if next == Next::GiveUp && delete(&record.name, record.claim(&server.boot_id)).await {
        forget(server, &record.name);
    }
}

/// Whether a process that lives serves the device.
fn is_served(claim: Claim) -> Result<bool> {
    let has_server = |device: ublk::KernelDevice| {
        let waits = matches!(device.state, DeviceState::Quiesced | DeviceState::Dead);
        !waits && u32::try_from(device.server_pid).is_ok_and(process_lives)
    };
    Ok(ublk::devices()?.into_iter().find(|device| device.is(claim)).is_some_and(has_server))
}

/// Deletes what a server that was killed between adding a device and writing its record left. A living creator is about
/// to write it: servers of other roots are at work at the same time.
fn delete_unrecorded() -> Result<()> {
    for device in ublk::devices()? {
        let left = device.state == DeviceState::Dead && device.creator_pid.is_some_and(|pid| !process_lives(pid));
        if !left {
            continue;
        }
        match ublk::delete(device.id) {
            Ok(()) => tracing::warn!(id = device.id, "deleted a device that was never started"),
            Err(error) => tracing::warn!(id = device.id, "cannot delete a device: {}", error.chain()),
        }
    }
    Ok(())
}

/// Whether a device is gone, or will be when those who still hold it let go.
async fn delete(name: &str, claim: Option<Claim>) -> bool {
    let Some(claim) = claim else { return true };
    match blocking(move || ublk::delete_claimed(claim)).await {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::TimedOut) => {
            tracing::error!(device = name, "cannot be deleted: {}", error.chain());
            false
        }
        _ => true,
    }
}

/// What the device is to serve is not known: its readers get EIO.
async fn give_up_unreadable(server: Arc<Server>, unreadable: Unreadable) {
    let name = unreadable.name.as_str();
    let _name_lock = server.locks.lock(name).await;
    if let Some(claim) = unreadable.claim(&server.boot_id) {
        match blocking(move || wait_for_its_server(claim)).await {
            Ok(false) => {}
            Ok(true) => {
                tracing::error!(device = name, "cannot be taken back without its record: its readers get EIO");
                if !delete(name, Some(claim)).await {
                    return;
                }
            }
            Err(error) => return tracing::error!(device = name, "left alone: {}", error.chain()),
        }
    }
    match server.records.set_aside(&unreadable) {
        Ok(aside) => tracing::error!(device = name, path = %aside.display(), "what is no record is kept here"),
        Err(error) => tracing::error!(device = name, "{}", error.chain()),
    }
}

/// A record that cannot be removed says the same to the next server.
fn forget(server: &Arc<Server>, name: &str) {
    if let Err(error) = server.records.remove(name) {
        tracing::error!(device = name, "{}", error.chain());
    }
}

async fn recover_one(server: &Arc<Server>, record: DeviceRecord, known: Option<KnownImage>) -> Result<bool> {
    let Some(claim) = record.claim(&server.boot_id) else { return Ok(false) };
    // Readers wait: what can be done while the kernel takes the other server apart is done meanwhile.
    let (is_there, loaded) = tokio::join!(blocking(move || wait_for_its_server(claim)), load(server, &record, known));
    if !is_there? {
        return Ok(false);
    }
    let loaded = loaded?;
    // It has begun before: nothing is recorded any more.
    let mut start = starting(&loaded, &record);
    let image = loaded.image;
    let served = Arc::clone(&image);
    let device = blocking(move || Prepared::recover(served, claim.id)?.start()).await?;
    start.come_back(&record.name, device.path());
    let verity = loaded.verity;
    server.attached.lock().insert(record.name.clone(), Attached { record, device, image, start, verity });
    Ok(true)
}

async fn load(server: &Arc<Server>, record: &DeviceRecord, known: Option<KnownImage>) -> Result<LoadedImage> {
    let (location, options) = options_of(record)?;
    let bad_record = |error| Error::caused(ErrorKind::Corrupt, format!("record of {}", record.name), error);
    let manifest: Digest = record.manifest.parse().map_err(bad_record)?;
    let known = match known {
        Some(known) => known,
        // What is stored needs no registry, so no configuration of one either.
        None => {
            let repository = attach::open_later(&location, &options);
            KnownImage::open(&server.store, &location, repository, manifest).await?
        }
    };
    known.attach(&server.store, &server.engine, record.profile.as_ref(), &options).await
}

/// Waits until the device has no server; false if there is nothing to take over.
fn wait_for_its_server(claim: Claim) -> Result<bool> {
    let Some(device) = ublk::without_server(claim, DYING_TIMEOUT)? else { return Ok(false) };
    if device.state == DeviceState::Dead {
        ublk::delete_claimed(claim)?;
        return Ok(false);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_somebody_is_in_the_way_of_is_tried_again_until_the_limit_and_then_given_up() {
        let (limit, soon) = (Duration::from_secs(60), Duration::from_secs(20));
        for is_served in [false, true] {
            assert_eq!(Next::after(ErrorKind::Busy, soon, limit, is_served), Next::TryAgain);
        }
        assert_eq!(Next::after(ErrorKind::Busy, limit, limit, false), Next::GiveUp);
        assert_eq!(Next::after(ErrorKind::Busy, limit, limit, true), Next::Leave);
        assert_eq!(Next::after(ErrorKind::NotFound, soon, limit, false), Next::GiveUp, "the store has lost it");
    }
}
