//! An image pulled whole and unpacked, as container engines do before a start: what a lazy start is compared with.
//!
//! Three layers are downloaded at a time, into files without a name, and unpacked one on another into one directory as
//! soon as their turn comes. Digests are checked as engines check them: of a layer as it is stored and uncompressed.

mod tree;

use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::path::Path;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::{ClientOptions, Location};

use crate::background;
use crate::compression::Decompressor;
use crate::error::{Error, ErrorKind, Result};
use crate::hashing::HashingReader;
use crate::source::{self, LayerInput, Platforms, Source, SourceLayer};
use tree::UnpackedTree;

/// What docker and containerd download at a time by default.
const DOWNLOADS_MAX: usize = 3;

/// What was pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// Number of layers.
    pub layers: usize,
    /// Their bytes as they are stored.
    pub stored_bytes: u64,
    /// The image's config (OCI image-spec, config.md), as it is stored.
    pub config: Vec<u8>,
}

/// Pulls the image and unpacks it into `directory`, which is there and empty. Needs root, as owners and devices are made.
///
/// # Errors
/// `Usage` for a converted image that is listed without its original; `VerificationFailed`, `BadSource`; those of the
/// registry and of the directory. What was unpacked so far stays.
pub async fn unpack(
    location: &Location,
    client: &ClientOptions,
    platform: &Platform,
    directory: &Path,
    tmpdir: &Path,
) -> Result<Unpacked> {
    let source = Source::Location(location.clone());
    let image = source::open(&source, client, &Platforms::One(platform.clone())).await?.into_iter().next();
    let image = image.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no image at {location}")))?;
    let slots = Arc::new(Semaphore::new(DOWNLOADS_MAX));
    // Those that still run end with this value.
    let mut downloads = JoinSet::new();
    let mut arriving = Vec::new();
    for layer in &image.layers {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (layer, slots, tmpdir) = (layer.clone(), Arc::clone(&slots), tmpdir.to_owned());
        downloads.spawn(async move {
            let _slot = slots.acquire_owned().await;
            // Who waited has failed if nobody listens.
            drop(sender.send(download(&layer, &tmpdir).await));
        });
        arriving.push(receiver);
    }
    let mut tree = UnpackedTree::open(directory)?;
    for (layer, arrived) in image.layers.iter().zip(arriving) {
        let stopped = |_| Error::new(ErrorKind::Io, "the program is shutting down");
        let file = arrived.await.map_err(stopped)??;
        let layer = layer.clone();
        tree = background::run(move || {
            let name = layer.name();
            unpack_layer(&file, &layer, tree).map_err(|error| error.within(name))
        })
        .await??;
    }
    background::run(move || tree.finish()).await??;
    let stored_bytes = image.layers.iter().filter_map(|layer| layer.size_bytes).sum();
    let config = image.original.map(|original| original.config_bytes).unwrap_or_default();
    Ok(Unpacked { layers: image.layers.len(), stored_bytes, config })
}

/// A layer in a file; the repository checks its digest.
async fn download(layer: &SourceLayer, tmpdir: &Path) -> Result<File> {
    let failed = |error| Error::io(format!("writing to temporary directory {}", tmpdir.display()), error);
    let mut file = tempfile::tempfile_in(tmpdir).map_err(failed)?;
    let LayerInput::Stream(mut stream) = layer.open().await? else {
        return Err(Error::unsupported("a directory has no layers to pull"));
    };
    let name = layer.name();
    background::run(move || {
        io::copy(&mut stream, &mut file).map_err(|error| Error::io(format!("downloading {name}"), error))?;
        file.rewind().map_err(|error| Error::io(format!("reading {name} back"), error))?;
        Ok(file)
    })
    .await?
}

fn unpack_layer(mut file: &File, layer: &SourceLayer, mut tree: UnpackedTree) -> Result<UnpackedTree> {
    let mut unpacked = HashingReader::new(Decompressor::new(&mut file)?);
    tree.add_layer(unpacked.by_ref())?;
    match layer.diff_id {
        Some(expected) if expected != unpacked.digest() => {
            let found = unpacked.digest();
            let message = format!("uncompressed it has the digest {found}, but the config says {expected}");
            Err(Error::new(ErrorKind::VerificationFailed, message))
        }
        _ => Ok(tree),
    }
}
