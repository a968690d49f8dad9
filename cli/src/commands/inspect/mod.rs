//! `ublkimg inspect`: what an image in a registry or layout consists of, and what it costs. Reads the manifest and the
//! metadata blob, no layer.

mod contents;

use anyhow::Context;
use serde::Serialize;
use ublkimg_convert::StoredImage;
use ublkimg_registry::Repository;
use ublkimg_registry::descriptor::{MEDIA_TYPE_DOCKER_LIST, MEDIA_TYPE_INDEX};
use ublkimg_registry::profile::profiles;

use crate::args::Inspect;
use crate::output;
use contents::{Contents, Duplicates};

/// What `inspect --json` prints.
#[derive(Serialize)]
struct Report {
    reference: String,
    index: Option<String>,
    manifest: String,
    metadata: Blob,
    layers: Vec<Blob>,
    /// Of the dm-verity tree, if there is one.
    verity_root: Option<String>,
    /// Those that the index lists.
    profiles: Vec<Profile>,
    /// Of the layers.
    raw_bytes: u64,
    /// Of the layers and the metadata.
    stored_bytes: u64,
    chunks: u64,
    duplicates: Duplicates,
    contents: Contents,
}

#[derive(Serialize)]
struct Blob {
    digest: String,
    source_layer: Option<String>,
    diff_id: Option<String>,
    settings: Option<String>,
    stored_bytes: u64,
    raw_bytes: u64,
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
    print(&report)
}

fn print(report: &Report) -> anyhow::Result<()> {
    let (contents, duplicates) = (&report.contents, &report.duplicates);
    output::line(&format!("reference   {}", report.reference))?;
    output::line(&format!("manifest    {}", report.manifest))?;
    output::line(&format!(
        "size        {} stored, {} raw, in {} chunks; {} of it in {} chunks that are there already",
        output::bytes(report.stored_bytes),
        output::bytes(report.raw_bytes),
        report.chunks,
        output::bytes(duplicates.stored_bytes),
        duplicates.chunks,
    ))?;
    output::line(&format!(
        "contents    {} files, {} directories, {} others; {} of files, {} of them stored once for several",
        contents.files,
        contents.directories,
        contents.others,
        output::bytes(contents.file_bytes),
        output::bytes(contents.shared_bytes),
    ))?;
    if let Some(root) = &report.verity_root {
        output::line(&format!("verity root {root}"))?;
    }
    let rows: Vec<[String; 5]> = std::iter::once(row("metadata", &report.metadata))
        .chain(report.layers.iter().map(|blob| row("layer", blob)))
        .collect();
    output::line("")?;
    output::table(["BLOB", "STORED", "RAW", "CHUNKS", "DIGEST"], &rows)?;
    if !contents.largest.is_empty() {
        let rows: Vec<[String; 2]> =
            contents.largest.iter().map(|file| [output::bytes(file.size_bytes), file.path.clone()]).collect();
        output::line("")?;
        output::table(["SIZE", "LARGEST FILES"], &rows)?;
    }
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
    [
        what.to_owned(),
        output::bytes(blob.stored_bytes),
        output::bytes(blob.raw_bytes),
        blob.chunks.map_or_else(|| "-".to_owned(), |count| count.to_string()),
        blob.digest.clone(),
    ]
}

async fn read(command: &Inspect) -> anyhow::Result<Report> {
    let location = super::location(&command.reference)?;
    let platform = super::platform(command.platform.as_deref())?;
    let repository = Repository::open(&location, &super::client_options(&command.registry)).await?;
    let image = StoredImage::read(&repository, &platform).await.with_context(|| location.to_string())?;
    report(location.to_string(), &image, command.largest)
}

fn report(reference: String, image: &StoredImage, largest: usize) -> anyhow::Result<Report> {
    let resolved = &image.resolved;
    let is_index = [MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_LIST].contains(&resolved.media_type.as_str());
    let listed = if is_index { profiles(&resolved.bytes, &image.digest)? } else { Vec::new() };
    let mut layers = Vec::new();
    for (layer, bundled) in image.manifest.layers.iter().zip(&image.bundle.layers) {
        let origin = layer.origin.as_ref();
        layers.push(Blob {
            digest: layer.digest.to_string(),
            source_layer: origin.and_then(|origin| origin.source_layer).map(|digest| digest.to_string()),
            diff_id: origin.map(|origin| origin.diff_id.to_string()),
            settings: origin.map(|origin| origin.settings.clone()),
            stored_bytes: layer.size_bytes,
            raw_bytes: bundled.index.raw_len_bytes(),
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
        digest: image.manifest.metadata.digest.to_string(),
        source_layer: None,
        diff_id: None,
        settings: None,
        stored_bytes: image.manifest.metadata.size_bytes,
        raw_bytes: image.metadata.len() as u64,
        chunks: None,
    };
    Ok(Report {
        reference,
        index: is_index.then(|| resolved.digest.to_string()),
        manifest: image.digest.to_string(),
        raw_bytes: layers.iter().map(|blob| blob.raw_bytes).sum(),
        stored_bytes: layers.iter().map(|blob| blob.stored_bytes).sum::<u64>() + metadata.stored_bytes,
        chunks: image.bundle.layers.iter().map(|layer| u64::from(layer.index.len())).sum(),
        duplicates: Duplicates::of(&image.bundle),
        contents: Contents::of(&image.metadata, largest)?,
        metadata,
        layers,
        verity_root: image.manifest.verity.as_ref().map(|verity| verity.root.to_string()),
        profiles: profiles.collect(),
    })
}
