//! Bringing an image onto this host without a device: for machine images that are baked, and hosts that are provisioned.
//!
//! It is attaching without what comes after, so what is fetched is checked as it is for a device and lies in the same
//! store. What the name meant is kept too ([`crate::store::names`]): a later `add` needs no registry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ublkimg_image::Sha256;
use ublkimg_scheduler::FillMode;

use crate::attach::{AttachOptions, LoadedImage, attach};
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Plan, Readiness};
use crate::store::Store;
use ublkimg_registry::Location;

/// How often it is looked how far it is.
const POLL: Duration = Duration::from_millis(50);

/// So long after the read deadline what a profile still lacks is not coming: by then every fetch that waits for a registry
/// has given up.
const IDLE_MARGIN: Duration = Duration::from_secs(5);

/// How much of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pull {
    /// What its profile names: enough for a start that goes as the recorded one.
    Profile,
    /// All of it: nothing is asked of the registry afterwards.
    All,
}

/// What is on this host now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    /// Digest of the image's manifest.
    pub manifest: String,
    /// Where its profile comes from, if it has one.
    pub profile: Option<String>,
    /// Bytes of its layer blobs that are here, raw.
    pub present_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
}

/// Fetches an image, or what its profile names, into the store.
///
/// # Errors
/// As [`attach`]; `NotFound` when only the profile is wanted and there is none; `NoSpace` when the disk does not take all of it;
/// `Unavailable` when something could not be had, which the log names.
pub async fn pull(
    store: &Arc<Store>,
    engine: &Engine,
    location: &Location,
    options: &AttachOptions,
    what: Pull,
) -> Result<Pulled> {
    let overflowed = store.overflowed_chunks();
    let loaded = attach(store, engine, location, options).await?;
    let fetched = match what {
        Pull::All => whole(&loaded).await,
        Pull::Profile => followed(location, &loaded, options.read_deadline).await,
    };
    loaded.image.detach();
    // Memory has them, which is of use to a device but not to who wants them on the disk.
    let overflowed = store.overflowed_chunks().saturating_sub(overflowed);
    if overflowed > 0 {
        let text = format!(
            "the disk of the store is full: {overflowed} chunks of {location} found no room, free some and pull again"
        );
        return Err(Error::new(ErrorKind::NoSpace, text));
    }
    fetched?;
    let store = Arc::clone(store);
    let synced = tokio::task::spawn_blocking(move || store.sync()).await;
    synced.map_err(|error| Error::caused(ErrorKind::Internal, "sync the store", error))??;
    let (present_bytes, total_bytes) = loaded.image.stored_bytes();
    Ok(Pulled {
        manifest: loaded.manifest_digest.to_string(),
        profile: loaded.profile.as_ref().map(|profile| profile.kept.source.clone()),
        present_bytes,
        total_bytes,
    })
}

async fn whole(loaded: &LoadedImage) -> Result<()> {
    loaded.image.set_fill(FillMode::Full);
    loop {
        let (present, total) = loaded.image.stored_bytes();
        if present == total {
            return Ok(());
        }
        if loaded.image.prefetch().engine.fill.is_some_and(|fill| fill.finished) {
            let text = format!("{present} of {total} bytes could be fetched: see the log");
            return Err(Error::new(ErrorKind::Unavailable, text));
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn followed(location: &Location, loaded: &LoadedImage, read_deadline: Duration) -> Result<()> {
    let Some(profile) = &loaded.profile else {
        let text =
            format!("{location} has no profile: pull all of it, or make one with `ublkimg record` and `optimize`");
        return Err(Error::new(ErrorKind::NotFound, text));
    };
    let layers: Vec<Sha256> = loaded.manifest.layers.iter().map(|layer| Sha256(layer.digest.0)).collect();
    let (mut since, mut before) = (Instant::now(), 0);
    loop {
        let missing = missing_blocks(loaded, &layers, &profile.trace);
        if missing == 0 {
            return Ok(());
        }
        if missing != before {
            (since, before) = (Instant::now(), missing);
        }
        if since.elapsed() > read_deadline.saturating_add(IDLE_MARGIN) {
            let text = format!("{missing} blocks of the profile of {location} could not be fetched: see the log");
            return Err(Error::new(ErrorKind::Unavailable, text));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// How many of the trace's reads would have to wait.
fn missing_blocks(loaded: &LoadedImage, layers: &[Sha256], trace: &ublkimg_image::Trace) -> u64 {
    let place = |blob: &Sha256| layers.iter().position(|layer| layer == blob).and_then(|at| u16::try_from(at).ok());
    let places: Vec<Option<u16>> = trace.header.blobs.iter().map(place).collect();
    let mut plan = Plan::new();
    let mut missing = 0;
    for entry in &trace.entries {
        // What this image does not have is not needed.
        let Some(Some(layer)) = places.get(usize::from(entry.blob)).copied() else { continue };
        let Some(block) = loaded.image.device_block(layer, entry.block) else { continue };
        let blocks = u32::from(entry.blocks);
        if loaded.image.plan(block, blocks, &mut plan) == Readiness::Missing {
            missing += u64::from(blocks);
        }
    }
    missing
}
