//! Where an image can come from: its config, and its layers as streams.

mod archive;
mod docker_archive;
mod manifest;
mod oci_archive;
mod repository;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use tokio_util::io::SyncIoBridge;
use ublkimg_image::Sha256;
use ublkimg_registry::descriptor::Platform;
use ublkimg_registry::erofs_manifest::LayerRef;
use ublkimg_registry::{ClientOptions, Digest, Location, Repository};

use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use archive::FileRange;

/// An image to convert.
#[derive(Clone, Debug)]
pub enum Source {
    /// In a registry or an OCI layout directory.
    Location(Location),
    /// A tar archive of an OCI layout, from `skopeo copy` or `podman save --format oci-archive`.
    OciArchive(PathBuf),
    /// A tar archive from `docker save`.
    DockerArchive(PathBuf),
    /// A directory; becomes an image of one layer without settings.
    Directory(PathBuf),
}

impl FromStr for Source {
    type Err = Error;

    /// Reads `oci-archive:FILE`, `docker-archive:FILE`, `dir:PATH`, or what [`Location`] reads.
    fn from_str(text: &str) -> Result<Self> {
        let path = |path: &str| match path {
            "" => Err(Error::new(ErrorKind::Usage, format!("{text:?}: no path"))),
            path => Ok(PathBuf::from(path)),
        };
        match text.split_once(':') {
            Some(("oci-archive", file)) => path(file).map(Self::OciArchive),
            Some(("docker-archive", file)) => path(file).map(Self::DockerArchive),
            Some(("dir", directory)) => path(directory).map(Self::Directory),
            _ => Ok(Self::Location(text.parse()?)),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Location(location) => location.fmt(formatter),
            Self::OciArchive(file) => write!(formatter, "oci-archive:{}", file.display()),
            Self::DockerArchive(file) => write!(formatter, "docker-archive:{}", file.display()),
            Self::Directory(path) => write!(formatter, "dir:{}", path.display()),
        }
    }
}

/// An image whose config is known and whose layers can be read.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) config: Config,
    pub(crate) platform: Platform,
    /// Base first.
    pub(crate) layers: Vec<SourceLayer>,
}

/// A layer to read.
#[derive(Clone, Debug)]
pub(crate) struct SourceLayer {
    /// Digest of its bytes, when the source says it.
    pub(crate) digest: Option<Digest>,
    /// Digest of its bytes uncompressed, when the source says it.
    pub(crate) diff_id: Option<Sha256>,
    /// Its length as stored, when known.
    pub(crate) size_bytes: Option<u64>,
    pub(crate) content: LayerContent,
}

/// Where a layer's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum LayerContent {
    /// A blob of a repository, which verifies it.
    Blob(Repository),
    /// Part of an archive.
    Member(Arc<File>, Range<u64>),
    /// Files on this machine, not an archive.
    Directory(PathBuf),
}

/// A layer's bytes.
pub(crate) enum LayerInput {
    /// A stream, to be sniffed and unpacked.
    Stream(Box<dyn Read + Send>),
    /// A directory to walk.
    Directory(PathBuf),
}

impl SourceLayer {
    /// The layer in a message.
    pub(crate) fn name(&self) -> String {
        match (&self.digest, &self.diff_id, &self.content) {
            (Some(digest), _, _) => format!("layer {digest}"),
            (None, _, LayerContent::Directory(path)) => path.display().to_string(),
            (None, Some(diff_id), _) => format!("layer with diff_id {diff_id}"),
            (None, None, _) => "layer".to_owned(),
        }
    }

    /// Whether the blob was made of this layer, with these settings. The digest of the uncompressed layer decides where the
    /// source states it, as it does for container engines; else that of the layer as stored.
    pub(crate) fn became(&self, made: &LayerRef, settings: &str) -> bool {
        let Some(origin) = &made.origin else { return false };
        let same = match (self.diff_id, self.digest) {
            (Some(diff_id), _) => origin.diff_id.0 == diff_id.0,
            (None, digest) => digest.is_some() && origin.source_layer == digest,
        };
        same && origin.settings == settings
    }

    /// Starts reading.
    pub(crate) async fn open(&self) -> Result<LayerInput> {
        match &self.content {
            LayerContent::Blob(repository) => {
                let (Some(digest), Some(size_bytes)) = (self.digest, self.size_bytes) else {
                    return Err(Error::bad_source("a blob without digest and size"));
                };
                let reader = repository.blob(&digest, size_bytes).await?;
                Ok(LayerInput::Stream(Box::new(SyncIoBridge::new(reader))))
            }
            LayerContent::Member(file, range) => {
                Ok(LayerInput::Stream(Box::new(FileRange::new(Arc::clone(file), range.clone()))))
            }
            LayerContent::Directory(path) => Ok(LayerInput::Directory(path.clone())),
        }
    }
}

/// Opens an image and reads its manifest and config; layers are not read yet.
///
/// # Errors
/// `NotFound`, `Unsupported`, `BadSource`, `VerificationFailed`, those of the registry, and `Io`.
pub(crate) async fn open(source: &Source, options: &ClientOptions, platform: &Platform) -> Result<Image> {
    let platform = platform.clone();
    match source {
        Source::Location(location) => repository::open(location, options, &platform).await,
        Source::OciArchive(file) => in_background(file, move |file| oci_archive::open(file, &platform)).await,
        Source::DockerArchive(file) => in_background(file, move |file| docker_archive::open(file, &platform)).await,
        Source::Directory(path) => Ok(Image {
            config: Config::empty(&platform),
            platform,
            layers: vec![SourceLayer {
                digest: None,
                diff_id: None,
                size_bytes: None,
                content: LayerContent::Directory(path.clone()),
            }],
        }),
    }
}

async fn in_background(file: &Path, open: impl FnOnce(&Path) -> Result<Image> + Send + 'static) -> Result<Image> {
    let file = file.to_owned();
    let opened = tokio::task::spawn_blocking(move || open(&file).map_err(|error| error.within(file.display())));
    opened.await.map_err(|error| Error::new(ErrorKind::Io, "reading the archive").with_source(error))?
}
