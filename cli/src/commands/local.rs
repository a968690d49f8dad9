//! Images that were converted on this host for `add --convert`: below the store's root, each in a layout directory of its own
//! that is named after the reference.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ublkimg_convert::{Options, Platforms, Source, StoredImage, convert};
use ublkimg_driver::daemon::Directories;
use ublkimg_driver::daemon::state::Records;
use ublkimg_driver::error::Error;
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{Digest, Location, Repository};

use crate::args::RegistryOptions;
use crate::progress;

/// Images that stay although no device uses them, so that adding one again does not pull it again.
const UNUSED_MAX: usize = 4;

/// The tag of the one image of a layout.
const TAG: &str = "image";

/// Where the image of a reference is, or will be.
pub(super) fn location(directories: &Directories, reference: &Location) -> Location {
    let name = Digest::of(reference.to_string().as_bytes()).hex();
    let dir = directories.root.join("converted").join(&name[..32]);
    Location::Layout { dir, tag: Some(TAG.to_owned()) }
}

/// Pulls the image and converts it, unless a device serves it already. Returns where it is.
pub(super) fn convert_here(
    directories: &Directories,
    reference: &Location,
    registry: &RegistryOptions,
    verity: bool,
) -> anyhow::Result<Location> {
    let target = location(directories, reference);
    let records = Records::new(directories.devices()).read_all()?;
    let in_use: Vec<String> = records.into_iter().map(|record| record.reference).collect();
    if in_use.contains(&target.to_string()) {
        return Ok(target);
    }
    let Location::Layout { dir, .. } = &target else { return Ok(target) };
    let failed = |path: &Path, error| Error::io(format!("cannot create {}", path.display()), error);
    std::fs::create_dir_all(dir).map_err(|error| failed(dir, error))?;
    let options = Options {
        client: super::client_options(registry),
        platforms: Platforms::One(Platform::host()),
        tmpdir: dir.clone(),
        verity,
        ..Options::default()
    };
    let source = Source::Location(reference.clone());
    let converted = super::runtime()?.block_on(async {
        let layout = Repository::open(&target, &options.client).await?;
        let before = layout.resolve().await.ok();
        let converted = convert(&source, &target, &options, progress::for_stderr()).await?;
        if before.is_some_and(|before| before.digest != converted.digest) {
            remove_old_blobs(dir, &StoredImage::read(&layout, &Platform::host()).await?);
        }
        anyhow::Ok(())
    });
    if converted.is_err() && !dir.join("index.json").exists() {
        // Nothing was there before, so nothing is worth keeping.
        let _ = std::fs::remove_dir_all(dir);
    }
    converted?;
    remove_unused(dir, &in_use);
    Ok(target)
}

/// Removes what an earlier image left in a layout that is this image's alone. It has no profiles: they go with their image.
fn remove_old_blobs(dir: &Path, image: &StoredImage) {
    let manifest = &image.manifest;
    let parts = [image.resolved.digest, image.digest, manifest.config.digest, manifest.metadata.digest];
    let kept: HashSet<String> =
        manifest.devices().map(|blob| blob.digest).chain(parts).map(|digest| digest.hex()).collect();
    for blob in std::fs::read_dir(dir.join("blobs/sha256")).into_iter().flatten().flatten() {
        if !blob.file_name().to_str().is_some_and(|name| kept.contains(name)) {
            remove(&blob.path(), std::fs::remove_file);
        }
    }
}

/// Removes all but the newest images that no device uses. Whatever stands in the way is tried again next time.
fn remove_unused(newest: &Path, in_use: &[String]) {
    let Some(all) = newest.parent() else { return };
    let is_unused = |path: &PathBuf| path != newest && !in_use.contains(&format!("oci:{}:{TAG}", path.display()));
    let mut unused: Vec<(SystemTime, PathBuf)> = std::fs::read_dir(all)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(is_unused)
        .filter_map(|path| Some((path.join("index.json").metadata().ok()?.modified().ok()?, path)))
        .collect();
    unused.sort();
    let excess = unused.len().saturating_sub(UNUSED_MAX);
    for (_, path) in &unused[..excess] {
        remove(path, std::fs::remove_dir_all);
    }
}

fn remove<'a>(path: &'a Path, how: fn(&'a Path) -> std::io::Result<()>) {
    if let Err(error) = how(path) {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}
