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
//! | no such device, or another boot | it is gone | the record is removed |
//!
//! A FUSE device dies with its server: its record is removed. Devices without a record are somebody else's and are left
//! alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ublkimg_registry::Digest;

use super::attached::Attached;
use super::server::{Server, blocking, options, parse_location};
use super::state::DeviceRecord;
use crate::attach::reopen;
use crate::device::ublk::{self, DeviceState};
use crate::device::{Prepared, Transport};
use crate::error::{Error, ErrorKind, Result};

/// A killed process may take this long to let go of its devices.
const DYING_TIMEOUT: Duration = Duration::from_secs(20);

/// Takes back every device that can be. One that cannot is logged and left as it is, so that it can be looked at; the
/// others are served.
///
/// # Errors
/// Only if the records cannot be listed.
pub(super) async fn recover(server: &Arc<Server>) -> Result<()> {
    for record in server.records.read_all()? {
        let name = record.name.clone();
        let started = Instant::now();
        match recover_one(server, record).await {
            Ok(true) => tracing::warn!(device = name, after = ?started.elapsed(), "taken back"),
            Ok(false) => {
                tracing::warn!(device = name, "gone: its record is removed");
                server.records.remove(&name)?;
            }
            Err(error) => tracing::error!(device = name, "cannot be taken back: {}", error.chain()),
        }
    }
    Ok(())
}

async fn recover_one(server: &Arc<Server>, record: DeviceRecord) -> Result<bool> {
    let (Transport::Ublk, Some(id)) = (record.transport, record.ublk_id) else { return Ok(false) };
    if record.boot_id != server.boot_id || !blocking(move || wait_for_its_server(id)).await? {
        return Ok(false);
    }
    let location = parse_location(&record.reference)?;
    let options = options(record.plain_http, record.auth_file.clone(), record.read_timeout_ms);
    let bad_record = |error| Error::caused(ErrorKind::Corrupt, format!("record of {}", record.name), error);
    let manifest: Digest = record.manifest.parse().map_err(bad_record)?;
    let image = reopen(&server.store, &server.engine, &location, manifest, &options).await?.image;
    let served = Arc::clone(&image);
    let device = blocking(move || Prepared::recover(served, id)?.start()).await?;
    server.attached.lock().insert(record.name.clone(), Attached { record, device, image });
    Ok(true)
}

/// Waits until the device has no server; false if there is nothing to take over.
fn wait_for_its_server(id: u32) -> Result<bool> {
    let deadline = Instant::now() + DYING_TIMEOUT;
    loop {
        let Some(device) = ublk::devices()?.into_iter().find(|device| device.id == id) else { return Ok(false) };
        match device.state {
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
