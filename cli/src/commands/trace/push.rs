//! `ublkimg trace push`: a trace as a referrer of an image. It gives those who ask for it an order, never a byte.

use std::collections::BTreeMap;

use serde::Serialize;
use ublkimg_convert::{StoredImage, fit_trace, store_trace};
use ublkimg_registry::descriptor::{Descriptor, MEDIA_TYPE_MANIFEST, Platform};
use ublkimg_registry::profile::ProfileManifest;
use ublkimg_registry::{Digest, NewProfile, Repository};

use crate::args::trace::Push;
use crate::{commands, output};

/// What `trace push --json` prints.
#[derive(Serialize)]
struct Pushed {
    reference: String,
    image: String,
    profile: String,
    trace_bytes: usize,
    blocks: u64,
}

pub(super) fn run(command: &Push) -> anyhow::Result<()> {
    let trace = super::load(&command.file)?;
    let location = commands::location(&command.reference)?;
    let options = commands::client_options(&command.registry);
    let pushed = commands::runtime()?.block_on(async {
        let repository = Repository::open(&location, &options).await?;
        let image = StoredImage::read(&repository, &Platform::host()).await?;
        let (trace, dropped) = fit_trace(&trace, &image)?;
        super::warn_dropped(&dropped, trace.blocks());
        let stored = store_trace(&trace)?;
        let manifest = ProfileManifest {
            subject: Descriptor::new(MEDIA_TYPE_MANIFEST, image.digest, image.manifest_size_bytes),
            command: Some(Digest(trace.command_digest().0)),
            name: command.name.clone(),
            trace: ProfileManifest::describe_trace(&stored, false),
            hot: None,
            annotations: BTreeMap::new(),
        };
        let (trace_bytes, blocks) = (stored.len(), trace.blocks());
        let profile = NewProfile { manifest, trace: stored.into(), hot: None };
        let digest = repository.push_profile_referrer(&profile).await?;
        anyhow::Ok(Pushed {
            reference: location.to_string(),
            image: image.digest.to_string(),
            profile: digest.to_string(),
            trace_bytes,
            blocks,
        })
    })?;
    if command.json {
        return output::json(&pushed);
    }
    output::line(&pushed.profile)
}
