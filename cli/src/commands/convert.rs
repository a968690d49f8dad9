//! `ublkimg convert`: an ublkimg image of a container image or a directory.

use std::path::PathBuf;

use serde::Serialize;
use ublkimg_convert::{ImageSummary, Options, Platforms, Source, Summary, convert};
use ublkimg_registry::Location;

use crate::args::Convert;
use crate::{output, progress};

/// What `convert --json` prints.
#[derive(Serialize)]
struct Converted {
    reference: String,
    index: String,
    images: Vec<Image>,
}

#[derive(Serialize)]
struct Image {
    manifest: String,
    platform: String,
    metadata_bytes: u64,
    metadata_raw_bytes: u64,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    source: Option<String>,
    source_bytes: u64,
    digest: String,
    stored_bytes: u64,
    raw_bytes: u64,
    chunks: u32,
    existed: bool,
    reused: bool,
}

pub(super) fn run(command: &Convert) -> anyhow::Result<()> {
    let source: Source = command.source.parse()?;
    let destination: Location = command.destination.parse()?;
    let defaults = Options::default();
    let options = Options {
        client: super::client_options(&command.registry),
        platforms: platforms(command)?.unwrap_or(defaults.platforms),
        keep_original: command.index,
        tmpdir: command.tmpdir.clone(),
        level: command.level,
        chunk_size: command.chunk_size,
        threads: command.threads.unwrap_or(defaults.threads),
        cache: cache(command),
        verity: command.verity,
        reuse: command.reuse.iter().map(|text| super::location(text)).collect::<anyhow::Result<_>>()?,
    };
    let conversion = convert(&source, &destination, &options, progress::for_stderr());
    let summary = super::runtime()?.block_on(conversion)?;
    if command.json {
        return output::json(&converted(&destination, &summary));
    }
    output::line(&format!("{destination}@{}", summary.digest))
}

/// The directory of the conversion cache: as given, else where the user keeps caches; none for a user without a home.
fn cache(command: &Convert) -> Option<PathBuf> {
    if command.no_cache {
        return None;
    }
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    command.cache.clone().or_else(|| Some(caches()?.join("ublkimg/convert")))
}

fn platforms(command: &Convert) -> anyhow::Result<Option<Platforms>> {
    if command.all_platforms {
        return Ok(Some(Platforms::All));
    }
    Ok(command.platform.as_deref().map(str::parse).transpose()?.map(Platforms::One))
}

fn converted(destination: &Location, summary: &Summary) -> Converted {
    Converted {
        reference: destination.to_string(),
        index: summary.digest.to_string(),
        images: summary.images.iter().map(image).collect(),
    }
}

fn image(summary: &ImageSummary) -> Image {
    let layers = summary.layers.iter().map(|layer| Layer {
        source: layer.source.as_ref().map(ToString::to_string),
        source_bytes: layer.source_bytes,
        digest: layer.digest.to_string(),
        stored_bytes: layer.size_bytes,
        raw_bytes: layer.raw_bytes,
        chunks: layer.chunks,
        existed: layer.existed,
        reused: layer.reused,
    });
    Image {
        manifest: summary.manifest.to_string(),
        platform: summary.platform.to_string(),
        metadata_bytes: summary.metadata_bytes,
        metadata_raw_bytes: summary.metadata_raw_bytes,
        layers: layers.collect(),
    }
}
