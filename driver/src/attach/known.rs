//! A host that has attached a name before can attach it again while the registry is away.

use std::sync::Arc;
use std::time::Duration;

use ublkimg_registry::{Digest, Location};

use super::{AttachOptions, LoadedImage, reopen};
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;
use crate::store::names::KnownName;

/// How long a registry may take to say what a name means, where it is known what it meant.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What the location meant last; none if it names a digest, which needs no registry to be known.
pub(super) async fn known(store: &Arc<Store>, location: &Location) -> Option<KnownName> {
    if matches!(location, Location::Registry(reference) if reference.digest().is_some()) {
        return None;
    }
    let (store, name) = (Arc::clone(store), location.to_string());
    let known = tokio::task::spawn_blocking(move || store.name(&name)).await;
    known.ok()?.unwrap_or_else(|error| {
        tracing::warn!("{}", error.chain());
        None
    })
}

/// Keeps what the location means now. Not being able to is no reason to attach nothing.
/// What is kept already is not written again.
pub(super) async fn keep(store: &Arc<Store>, location: &Location, before: Option<&KnownName>, loaded: &LoadedImage) {
    if matches!(location, Location::Registry(reference) if reference.digest().is_some()) {
        return;
    }
    let known = KnownName {
        reference: location.to_string(),
        manifest: loaded.manifest_digest.to_string(),
        profile: loaded.profile.as_ref().map(|profile| profile.kept.clone()),
    };
    if before == Some(&known) {
        return;
    }
    let store = Arc::clone(store);
    let kept = tokio::task::spawn_blocking(move || store.put_name(&known)).await;
    if let Ok(Err(error)) = kept {
        tracing::warn!("what {location} means is not kept: {}", error.chain());
    }
}

/// Attaches what the location meant last, because the registry is away; `why` is what it answered.
pub(super) async fn attach_known(
    store: &Arc<Store>,
    engine: &Engine,
    location: &Location,
    known: &KnownName,
    options: &AttachOptions,
    why: Error,
) -> Result<LoadedImage> {
    let manifest: Result<Digest, _> = known.manifest.parse();
    let Ok(manifest) = manifest else { return Err(why) };
    match reopen(store, engine, location, manifest, known.profile.as_ref(), options).await {
        Ok(loaded) => {
            tracing::warn!("{location} is attached as it was last, {manifest}: {}", why.chain());
            Ok(loaded)
        }
        // What it lacks is what the registry would have given.
        Err(error) if error.kind() == ErrorKind::NotFound => Err(why),
        Err(error) => Err(error),
    }
}
