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
//! instead of waiting for ever, and its name is free again. One that another process serves is left alone.
//!
//! A FUSE device dies with its server: its record is removed. All other devices are left alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use ublkimg_registry::Digest;

use super::attached::Attached;
use super::server::{Server, blocking, options_of, starting};
use super::server_process::process_lives;
use super::state::DeviceRecord;
use super::takeover::Known;
use crate::attach::{KnownImage, LoadedImage};
use crate::device::ublk::{self, DeviceState};
use crate::device::{Prepared, Transport};
use crate::error::{Error, ErrorKind, Result};

/// A killed process may take this long to let go of its devices.
const DYING_TIMEOUT: Duration = Duration::from_secs(20);

/// Takes back every device that can be; the others are given up. Both are logged. All at once: readers of each wait.
/// `known` are images that were checked before.
///
/// # Errors
/// Only if the records cannot be listed.
pub(super) async fn recover(server: &Arc<Server>, mut known: Known) -> Result<()> {
    let mut tasks = JoinSet::new();
    for record in server.records.read_all()? {
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
    let (name, id) = (record.name.clone(), record.ublk_id);
    let started = Instant::now();
    match recover_one(&server, record, known).await {
        Ok(true) => tracing::warn!(device = name, after = ?started.elapsed(), "taken back"),
        Ok(false) => {
            tracing::warn!(device = name, "gone: its record is removed");
            forget(&server, &name);
        }
        Err(error) if error.kind() == ErrorKind::Busy => {
            tracing::error!(device = name, "cannot be taken back now: {}", error.chain());
        }
        Err(error) => {
            tracing::error!(device = name, "cannot be taken back, its readers get EIO: {}", error.chain());
            // Beside the others, since it waits for whoever holds the device; under its name's lock.
            let lock = server.locks.lock(&name).await;
            tokio::spawn(async move {
                give_up(&server, &name, id).await;
                drop(lock);
            });
        }
    }
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

async fn give_up(server: &Arc<Server>, name: &str, id: Option<u32>) {
    let deleted = blocking(move || id.map_or(Ok(()), ublk::delete)).await;
    match deleted {
        // Somebody still holds it: it goes when they let go.
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::TimedOut) => {
            tracing::error!(device = name, "cannot be deleted: {}", error.chain());
        }
        _ => forget(server, name),
    }
}

/// A record that cannot be removed says the same to the next server.
fn forget(server: &Arc<Server>, name: &str) {
    if let Err(error) = server.records.remove(name) {
        tracing::error!(device = name, "{}", error.chain());
    }
}

async fn recover_one(server: &Arc<Server>, record: DeviceRecord, known: Option<KnownImage>) -> Result<bool> {
    let (Transport::Ublk, Some(id)) = (record.transport, record.ublk_id) else { return Ok(false) };
    if record.boot_id != server.boot_id {
        return Ok(false);
    }
    // Readers wait: what can be done while the kernel takes the other server apart is done meanwhile.
    let (is_there, loaded) = tokio::join!(blocking(move || wait_for_its_server(id)), load(server, &record, known));
    if !is_there? {
        return Ok(false);
    }
    let loaded = loaded?;
    // It has begun before: nothing is recorded any more.
    let mut start = starting(&loaded, &record);
    let image = loaded.image;
    let served = Arc::clone(&image);
    let device = blocking(move || Prepared::recover(served, id)?.start()).await?;
    start.give_window(&record.name, device.path());
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
        None => KnownImage::open(&server.store, &location, manifest, &options).await?,
    };
    known.attach(&server.store, &server.engine, record.profile.as_ref(), &options).await
}

/// Waits until the device has no server; false if there is nothing to take over.
fn wait_for_its_server(id: u32) -> Result<bool> {
    let Some(device) = ublk::without_server(id, DYING_TIMEOUT)? else { return Ok(false) };
    if device.creator_pid.is_none() {
        return Ok(false);
    }
    if device.state == DeviceState::Dead {
        ublk::delete(id)?;
        return Ok(false);
    }
    Ok(true)
}
