//! `ublkimg check`: is the converted image whole, and is it the right one?

use serde::Serialize;
use ublkimg_convert::{CheckOptions, CheckedImage, check};

use crate::args::Check;
use crate::{output, progress};

/// What `check --json` prints.
#[derive(Serialize)]
struct Report {
    reference: String,
    source: Option<String>,
    images: Vec<Image>,
}

#[derive(Serialize)]
struct Image {
    manifest: String,
    layers: usize,
    chunks: u64,
    stored_bytes: u64,
    raw_bytes: u64,
    objects: u64,
    profiles: usize,
    compared: Option<u64>,
}

pub(super) fn run(command: &Check) -> anyhow::Result<()> {
    let location = super::location(&command.reference)?;
    let options = CheckOptions {
        client: super::client_options(&command.registry),
        source: command.source.as_deref().map(str::parse).transpose()?,
        tmpdir: command.tmpdir.clone(),
    };
    let images = super::runtime()?.block_on(check(&location, &options, progress::for_stderr()))?;
    if command.json {
        let images = images.into_iter().map(image).collect();
        return output::json(&Report { reference: location.to_string(), source: command.source.clone(), images });
    }
    images.iter().try_for_each(|checked| output::line(&text(checked)))
}

fn image(checked: CheckedImage) -> Image {
    let CheckedImage { manifest, layers, chunks, stored_bytes, raw_bytes, objects, profiles, compared } = checked;
    Image { manifest, layers, chunks, stored_bytes, raw_bytes, objects, profiles, compared }
}

fn text(checked: &CheckedImage) -> String {
    let compared = match checked.compared {
        Some(count) => format!(", {count} names compared with the source"),
        None => String::new(),
    };
    format!(
        "{} ok: {} layers, {} chunks, {} stored, {} raw, {} names, {} profiles{compared}",
        checked.manifest,
        checked.layers,
        checked.chunks,
        output::bytes(checked.stored_bytes),
        output::bytes(checked.raw_bytes),
        checked.objects,
        checked.profiles,
    )
}
