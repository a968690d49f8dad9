//! What an operator asks of the store, and the room that is kept in it while devices are served.
//!
//! Which images a store is for follows from the device records and the pins; what an image needs follows from its
//! manifest. So all of this works with a server and without one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ublkimg_image::Sha256;
use ublkimg_registry::erofs_manifest::ErofsManifest;
use ublkimg_registry::profile::ProfileManifest;

use super::pace::Pace;
use super::protocol::{BlobLine, CacheAnswer, CacheRequest, CacheStatus, PinLine};
use super::server::{Server, blocking, options_of};
use super::state::{DeviceRecord, Records};
use crate::attach::mend;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Checked, Holding, Limits, Store};

/// How often it is looked whether there is room: at 1 GB/s the store outgrows its limit by so many gigabytes.
const ROOM_PERIOD: Duration = Duration::from_secs(1);

/// Evicted together: what a fast link fetches in a tenth of a second, so that it need not be done for every chunk.
const EVICTION_BYTES_MIN: u64 = 64 << 20;

/// Does what is asked.
///
/// # Errors
/// `NotFound` for a pin of an image that no device has; those of the store.
pub fn serve(store: &Store, records: &Records, limits: &Limits, request: CacheRequest) -> Result<CacheAnswer> {
    match request {
        CacheRequest::Status => status(store, records, limits).map(CacheAnswer::Status),
        CacheRequest::Verify => {
            let mut checked = store.check()?;
            mend::check_metadata(store, &mut checked)?;
            Ok(CacheAnswer::Checked(checked))
        }
        CacheRequest::Collect { cache_bytes_max, free_bytes_min, unused } => {
            let given = Limits { cache_bytes_max, free_bytes_min };
            let limits = if given == Limits::default() { *limits } else { given };
            collect(store, records, &limits, unused).map(|freed_bytes| CacheAnswer::Freed { freed_bytes })
        }
        CacheRequest::Pin { name } => {
            let record = records.read_all()?.into_iter().find(|record| record.name == name);
            let record = record.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no device {name}")))?;
            store.pin(&holding(store, &record)?)?;
            Ok(CacheAnswer::Done)
        }
        CacheRequest::Unpin { target } => {
            let of_device = records.read_all()?.into_iter().find(|record| record.name == target);
            let manifest = of_device.map(|record| record.manifest).unwrap_or_else(|| target.clone());
            let is_meant = |pin: &&Holding| pin.reference == target || pin.manifest.to_string() == manifest;
            let pins = store.pins()?;
            let meant: Vec<&Holding> = pins.iter().filter(is_meant).collect();
            if meant.is_empty() {
                let text = format!("{target} is not pinned: `ublkimg cache ls` lists the pins");
                return Err(Error::new(ErrorKind::NotFound, text));
            }
            meant.iter().try_for_each(|pin| store.unpin(pin.manifest))?;
            Ok(CacheAnswer::Done)
        }
    }
}

fn status(store: &Store, records: &Records, limits: &Limits) -> Result<CacheStatus> {
    let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for record in records.read_all()? {
        for blob in holding(store, &record)?.blobs {
            users.entry(blob.to_string()).or_default().push(record.name.clone());
        }
    }
    let pins = store.pins()?;
    let line = |usage: crate::store::Usage| BlobLine {
        devices: users.remove(&usage.index).unwrap_or_default(),
        is_pinned: pins.iter().any(|pin| pin.blobs.iter().any(|blob| blob.to_string() == usage.index)),
        usage,
    };
    let blobs = store.usage()?.into_iter().map(line).collect();
    let pin = |pin: &Holding| PinLine { reference: pin.reference.clone(), manifest: pin.manifest.to_string() };
    Ok(CacheStatus { room: store.room()?, limits: *limits, blobs, pins: pins.iter().map(pin).collect() })
}

/// Evicts what is beyond the limits; `unused`: and all that no device has and nobody has pinned.
fn collect(store: &Store, records: &Records, limits: &Limits, unused: bool) -> Result<u64> {
    let needed = needed(store, records)?;
    let mut freed_bytes = 0;
    if unused {
        let kept: BTreeSet<Sha256> = needed.used.union(&needed.pinned).copied().collect();
        freed_bytes += store.make_room(u64::MAX, &kept, &needed.objects)?;
    }
    let excess_bytes = store.room()?.excess_bytes(limits);
    if excess_bytes > 0 {
        freed_bytes += store.make_room(excess_bytes, &needed.pinned, &needed.objects)?;
    }
    Ok(freed_bytes)
}

/// What must not go.
struct Needed {
    /// Blob files of devices: their blocks may go, and are fetched again.
    used: BTreeSet<Sha256>,
    pinned: BTreeSet<Sha256>,
    objects: BTreeSet<Sha256>,
}

fn needed(store: &Store, records: &Records) -> Result<Needed> {
    let mut needed = Needed { used: BTreeSet::new(), pinned: BTreeSet::new(), objects: BTreeSet::new() };
    for record in records.read_all()? {
        let holding = holding(store, &record)?;
        needed.used.extend(holding.blobs);
        needed.objects.extend(holding.objects);
    }
    for pin in store.pins()? {
        needed.pinned.extend(pin.blobs);
        needed.objects.extend(pin.objects);
    }
    Ok(needed)
}

/// What a device needs of the store, as far as the store has what says so.
fn holding(store: &Store, record: &DeviceRecord) -> Result<Holding> {
    let bad = |error| Error::caused(ErrorKind::Corrupt, format!("record of {}", record.name), error);
    let digest = |text: &str| text.parse::<Sha256>().map_err(bad);
    let manifest = digest(&record.manifest)?;
    let (mut objects, mut blobs) = (BTreeSet::from([manifest]), BTreeSet::new());
    if let Some(Ok(of_image)) = store.object(manifest)?.map(|bytes| ErofsManifest::parse(&bytes)) {
        objects.insert(Sha256(of_image.metadata.digest.0));
        blobs.extend(of_image.devices().map(|blob| Sha256(blob.index_digest.0)));
    }
    if let Some(profile) = &record.profile {
        objects.insert(digest(&profile.trace)?);
        if let Some(published) = profile.manifest.as_deref().map(digest).transpose()? {
            objects.insert(published);
            let of_profile = store.object(published)?.map(|bytes| ProfileManifest::parse(&bytes));
            let hot = of_profile.and_then(std::result::Result::ok).and_then(|of_profile| of_profile.hot);
            blobs.extend(hot.map(|hot| Sha256::of(&hot.table)));
        }
    }
    Ok(Holding { reference: record.reference.clone(), manifest, objects, blobs })
}

/// Does what is asked of a server, which can fetch what is lost.
pub(super) async fn serve_here(server: Arc<Server>, request: CacheRequest) -> Result<CacheAnswer> {
    let of_task = Arc::clone(&server);
    let answer = blocking(move || serve(&of_task.store, &of_task.records, &of_task.limits, request)).await?;
    let CacheAnswer::Checked(checked) = answer else { return Ok(answer) };
    let mut was_lost = false;
    for record in server.records.read_all()? {
        match refetch(&server.store, &record).await {
            Ok(fetched) => was_lost |= fetched,
            Err(error) => {
                let name = record.name;
                tracing::error!(device = name, "the next server could not take it back: {}", error.chain());
            }
        }
    }
    if !was_lost {
        return Ok(answer);
    }
    // What could not be compared without.
    let mended = blocking(move || {
        let mut mended = Checked::default();
        mend::check_metadata(&server.store, &mut mended).map(|()| mended)
    });
    let damaged_objects = checked.damaged_objects + mended.await?.damaged_objects;
    Ok(CacheAnswer::Checked(Checked { damaged_objects, ..checked }))
}

/// Fetches what a device could not be taken back without, if it is not in the store; whether it was lost.
async fn refetch(store: &Arc<Store>, record: &DeviceRecord) -> Result<bool> {
    let (location, options) = options_of(record)?;
    let bad = |error| Error::caused(ErrorKind::Corrupt, format!("record of {}", record.name), error);
    mend::refetch(store, &location, record.manifest.parse().map_err(bad)?, &options).await
}

/// Keeps the store within its limits, as long as the server runs.
pub(super) async fn keep_room(server: Arc<Server>) {
    let mut pace = Pace::new(ROOM_PERIOD);
    loop {
        let pause = pace.next(server.activity());
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = server.store.written() => {}
        }
        let of_task = Arc::clone(&server);
        let outcome = blocking(move || {
            of_task.store.tick();
            let excess_bytes = of_task.store.room()?.excess_bytes(&of_task.limits);
            if excess_bytes == 0 {
                return Ok(());
            }
            let needed = needed(&of_task.store, &of_task.records)?;
            let wanted_bytes = excess_bytes.max(EVICTION_BYTES_MIN);
            let freed_bytes = of_task.store.make_room(wanted_bytes, &needed.pinned, &needed.objects)?;
            tracing::info!(excess_bytes, freed_bytes, "evicted");
            Ok(())
        });
        if let Err(error) = outcome.await {
            tracing::warn!("the store is not kept within its limits: {}", error.chain());
        }
    }
}
