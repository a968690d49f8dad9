//! `ublkimg inspect`: what an image in a registry or layout consists of. Reads the manifest and the bundle of chunk
//! indexes, no layer.

use anyhow::Context;
use serde::Serialize;
use ublkimg_image::zstd_frame::skippable_payload;
use ublkimg_image::{Bundle, SkippableKind};
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX, Platform};
use ublkimg_registry::erofs_manifest::{ErofsManifest, choose};
use ublkimg_registry::profile::{ListedProfile, profiles};
use ublkimg_registry::{Digest, Repository};

use crate::args::Inspect;
use crate::output;

/// What `inspect --json` prints.
#[derive(Serialize)]
struct Report {
    reference: String,
    index: Option<String>,
    manifest: String,
    metadata: Blob,
    layers: Vec<Blob>,
    /// Those that the index lists.
    profiles: Vec<Profile>,
    raw_bytes: u64,
    stored_bytes: u64,
}

#[derive(Serialize)]
struct Blob {
    digest: String,
    source_layer: Option<String>,
    stored_bytes: u64,
    raw_bytes: Option<u64>,
    chunks: Option<u32>,
}

#[derive(Serialize)]
struct Profile {
    digest: String,
    name: Option<String>,
    command_digest: Option<String>,
    is_default: bool,
}

pub(super) fn run(command: &Inspect) -> anyhow::Result<()> {
    let report = super::runtime()?.block_on(read(command))?;
    if command.json {
        return output::json(&report);
    }
    output::line(&format!("reference  {}", report.reference))?;
    output::line(&format!("manifest   {}", report.manifest))?;
    output::line(&format!(
        "size       {} stored, {} raw",
        output::bytes(report.stored_bytes),
        output::bytes(report.raw_bytes)
    ))?;
    let rows: Vec<[String; 5]> = std::iter::once(row("metadata", &report.metadata))
        .chain(report.layers.iter().map(|blob| row("layer", blob)))
        .collect();
    output::table(["BLOB", "STORED", "RAW", "CHUNKS", "DIGEST"], &rows)?;
    if report.profiles.is_empty() {
        return Ok(());
    }
    output::line("")?;
    let rows: Vec<[String; 3]> = report
        .profiles
        .iter()
        .map(|profile| {
            let name = profile.name.clone().unwrap_or_else(|| "-".to_owned());
            [name, if profile.is_default { "yes" } else { "-" }.to_owned(), profile.digest.clone()]
        })
        .collect();
    output::table(["PROFILE", "DEFAULT", "DIGEST"], &rows)
}

fn row(what: &str, blob: &Blob) -> [String; 5] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        what.to_owned(),
        output::bytes(blob.stored_bytes),
        or_dash(blob.raw_bytes.map(output::bytes)),
        or_dash(blob.chunks.map(|count| count.to_string())),
        blob.digest.clone(),
    ]
}

async fn read(command: &Inspect) -> anyhow::Result<Report> {
    let location = super::location(&command.reference)?;
    let repository = Repository::open(&location, &super::client_options(&command.registry)).await?;
    let resolved = repository.resolve().await?;
    let (index, digest, bytes, listed) =
        if [MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST].contains(&resolved.media_type.as_str()) {
            let chosen = choose(&resolved.bytes, &Platform::host()).context(location.to_string())?;
            let digest: Digest = chosen.digest.to_string().parse()?;
            let bytes = repository.manifest(&digest).await?;
            (Some(resolved.digest), digest, bytes, profiles(&resolved.bytes, &digest)?)
        } else {
            (None, resolved.digest, resolved.bytes, Vec::new())
        };
    let manifest = ErofsManifest::parse(&bytes).context(location.to_string())?;
    let bundle_frame = repository.blob_range(&manifest.metadata.digest, manifest.metadata.bundle_range.clone()).await?;
    let bundle = Bundle::decode(skippable_payload(SkippableKind::Ublkimg, &bundle_frame)?)?;
    report(location.to_string(), index, &digest, &listed, &manifest, &bundle)
}

fn report(
    reference: String,
    index: Option<Digest>,
    digest: &Digest,
    listed: &[ListedProfile],
    manifest: &ErofsManifest,
    bundle: &Bundle,
) -> anyhow::Result<Report> {
    let mut layers = Vec::new();
    for (layer, bundled) in manifest.layers.iter().zip(&bundle.layers) {
        layers.push(Blob {
            digest: layer.digest.to_string(),
            source_layer: layer.origin.as_ref().and_then(|origin| origin.source_layer).map(|digest| digest.to_string()),
            stored_bytes: layer.size_bytes,
            raw_bytes: Some(bundled.index.raw_len_bytes()),
            chunks: Some(bundled.index.len()),
        });
    }
    let profiles = listed.iter().map(|profile| Profile {
        digest: profile.descriptor.digest.to_string(),
        name: profile.name.clone(),
        command_digest: profile.command.map(|command| command.to_string()),
        is_default: profile.is_default,
    });
    let metadata = Blob {
        digest: manifest.metadata.digest.to_string(),
        source_layer: None,
        stored_bytes: manifest.metadata.size_bytes,
        raw_bytes: None,
        chunks: None,
    };
    Ok(Report {
        reference,
        index: index.map(|index| index.to_string()),
        manifest: digest.to_string(),
        raw_bytes: layers.iter().filter_map(|blob| blob.raw_bytes).sum(),
        stored_bytes: layers.iter().map(|blob| blob.stored_bytes).sum::<u64>() + metadata.stored_bytes,
        metadata,
        layers,
        profiles: profiles.collect(),
    })
}
