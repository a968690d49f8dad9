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

use ublkimg_registry::Digest;

use super::attached::Attached;
use super::guard::process_lives;
use super::server::{Server, blocking, options, parse_location, starting};
use super::state::DeviceRecord;
use crate::attach::reopen;
use crate::device::ublk::{self, DeviceState};
use crate::device::{Prepared, Transport};
use crate::error::{Error, ErrorKind, Result};

/// A killed process may take this long to let go of its devices.
const DYING_TIMEOUT: Duration = Duration::from_secs(20);

/// Takes back every device that can be; the others are given up. Both are logged.
///
/// # Errors
/// Only if the records cannot be listed.
pub(super) async fn recover(server: &Arc<Server>) -> Result<()> {
    for record in server.records.read_all()? {
        let (name, id) = (record.name.clone(), record.ublk_id);
        let started = Instant::now();
        match recover_one(server, record).await {
            Ok(true) => tracing::warn!(device = name, after = ?started.elapsed(), "taken back"),
            Ok(false) => {
                tracing::warn!(device = name, "gone: its record is removed");
                forget(server, &name);
            }
            Err(error) if error.kind() == ErrorKind::Busy => {
                tracing::error!(device = name, "cannot be taken back now: {}", error.chain());
            }
            Err(error) => {
                tracing::error!(device = name, "cannot be taken back, its readers get EIO: {}", error.chain());
                // Beside the others, since it waits for whoever holds the device; under its name's lock.
                let (server, lock) = (Arc::clone(server), server.locks.lock(&name).await);
                tokio::spawn(async move {
                    give_up(&server, &name, id).await;
                    drop(lock);
                });
            }
        }
    }
    if let Err(error) = blocking(delete_unrecorded).await {
        tracing::debug!("no ublk devices to look at: {}", error.chain());
    }
    Ok(())
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

async fn recover_one(server: &Arc<Server>, record: DeviceRecord) -> Result<bool> {
    let (Transport::Ublk, Some(id)) = (record.transport, record.ublk_id) else { return Ok(false) };
    if record.boot_id != server.boot_id || !blocking(move || wait_for_its_server(id)).await? {
        return Ok(false);
    }
    let location = parse_location(&record.reference)?;
    let (timeout_ms, holds_reads) = (record.read_timeout_ms, record.holds_reads);
    let options = options(record.plain_http, record.auth_file.clone(), timeout_ms, holds_reads);
    let bad_record = |error| Error::caused(ErrorKind::Corrupt, format!("record of {}", record.name), error);
    let manifest: Digest = record.manifest.parse().map_err(bad_record)?;
    let profile = record.profile.as_ref();
    let loaded = reopen(&server.store, &server.engine, &location, manifest, profile, &options).await?;
    // It has begun before: nothing is recorded any more.
    let mut start = starting(&loaded, &record);
    let image = loaded.image;
    let served = Arc::clone(&image);
    let device = blocking(move || Prepared::recover(served, id)?.start()).await?;
    start.give_window(&record.name, device.path());
    server.attached.lock().insert(record.name.clone(), Attached { record, device, image, start });
    Ok(true)
}

/// Waits until the device has no server; false if there is nothing to take over.
fn wait_for_its_server(id: u32) -> Result<bool> {
    let deadline = Instant::now() + DYING_TIMEOUT;
    loop {
        let Some(device) = ublk::devices()?.into_iter().find(|device| device.id == id) else { return Ok(false) };
        match device.state {
            _ if device.creator_pid.is_none() => return Ok(false),
            DeviceState::Quiesced => return Ok(true),
            DeviceState::Dead => {
                ublk::delete(id)?;
                return Ok(false);
            }
            _ if Instant::now() > deadline => {
                let text = format!("process {} still serves /dev/ublkb{id}", device.server_pid);
                return Err(Error::new(ErrorKind::Busy, text));
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
