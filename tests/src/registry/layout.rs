//! Loading an OCI layout directory (OCI image spec, image-layout.md). Blobs are read where they lie.

use std::path::Path;

use anyhow::{Context, bail};
use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex};
use ublkimg_image::Sha256;

use super::storage::{Blob, Storage};

/// Indexes inside indexes: more than this is a loop.
const MAX_DEPTH: u32 = 4;

/// The annotation that names an entry of a layout's index.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Loads the image that `layout_tag` names (or the only one) from `layout` as `repository:tag`.
pub(crate) fn load(
    storage: &Storage,
    layout: &Path,
    layout_tag: Option<&str>,
    repository: &str,
    tag: &str,
) -> anyhow::Result<Sha256> {
    let index = ImageIndex::from_file(layout.join("index.json"))
        .with_context(|| format!("no OCI layout in {}", layout.display()))?;
    let is_wanted = |descriptor: &&Descriptor| {
        let name = descriptor.annotations().as_ref().and_then(|annotations| annotations.get(REF_NAME));
        layout_tag.is_none_or(|tag| name.is_some_and(|name| name == tag))
    };
    let mut wanted = index.manifests().iter().filter(is_wanted);
    let (Some(descriptor), None) = (wanted.next(), wanted.next()) else {
        bail!("{} has not exactly one image {}", layout.display(), layout_tag.unwrap_or("(name one by its tag)"));
    };
    add(storage, layout, repository, descriptor, Some(tag), MAX_DEPTH)
}

fn add(
    storage: &Storage,
    layout: &Path,
    repository: &str,
    descriptor: &Descriptor,
    tag: Option<&str>,
    depth: u32,
) -> anyhow::Result<Sha256> {
    let bytes = Bytes::from(std::fs::read(blob_path(layout, descriptor)).context("manifest")?);
    let document: serde_json::Value = serde_json::from_slice(&bytes).context("manifest")?;
    let listed = |key: &str| -> anyhow::Result<Vec<Descriptor>> {
        Ok(document.get(key).map_or(Ok(Vec::new()), |list| serde_json::from_value(list.clone()))?)
    };
    for manifest in listed("manifests")? {
        if depth == 0 {
            bail!("indexes in {} are nested too deep", layout.display());
        }
        // Layouts may leave out the manifests of other platforms.
        if blob_path(layout, &manifest).exists() {
            add(storage, layout, repository, &manifest, None, depth - 1)?;
        }
    }
    let config: Option<Descriptor> = document.get("config").map(|it| serde_json::from_value(it.clone())).transpose()?;
    for blob in config.into_iter().chain(listed("layers")?) {
        let path = blob_path(layout, &blob);
        let size_bytes = path.metadata().with_context(|| path.display().to_string())?.len();
        storage.link_blob(repository, blob.digest().to_string().parse()?, Blob::File { path, size_bytes })?;
    }
    Ok(storage.add_manifest(repository, bytes, descriptor.media_type().as_ref(), tag)?)
}

fn blob_path(layout: &Path, descriptor: &Descriptor) -> std::path::PathBuf {
    layout.join("blobs").join(descriptor.digest().algorithm().as_ref()).join(descriptor.digest().digest())
}
