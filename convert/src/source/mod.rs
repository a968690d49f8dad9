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

use bytes::Bytes;
use tokio_util::io::SyncIoBridge;
use ublkimg_image::Sha256;
use ublkimg_registry::descriptor::{Descriptor, Platform};
use ublkimg_registry::erofs_manifest::LayerRef;
use ublkimg_registry::{ClientOptions, Digest, Location, Repository};

use crate::background;
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

impl Source {
    /// The place of an image that is neither an archive nor a directory.
    pub(crate) fn location(&self) -> Option<&Location> {
        match self {
            Self::Location(location) => Some(location),
            _ => None,
        }
    }
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
    /// The image as the source has it; none for what has no manifest.
    pub(crate) original: Option<Original>,
}

/// Which images of a source are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Platforms {
    /// The one for this platform.
    One(Platform),
    /// All for Linux.
    All,
}

/// Most images of one source that are converted together: more than there are platforms.
const IMAGES_MAX: usize = 32;

/// An image's manifest and config, byte for byte.
#[derive(Debug)]
pub(crate) struct Original {
    /// The manifest as an index lists it, with a platform.
    pub(crate) descriptor: Descriptor,
    pub(crate) manifest: Bytes,
    pub(crate) config: Descriptor,
    pub(crate) config_bytes: Vec<u8>,
}

impl Image {
    fn of_manifest(
        mut descriptor: Descriptor,
        manifest: Bytes,
        (config, config_bytes): (Descriptor, Vec<u8>),
        parsed: Config,
        platforms: &Platforms,
        layers: Vec<SourceLayer>,
    ) -> Self {
        let default = match platforms {
            Platforms::One(platform) => platform.clone(),
            Platforms::All => Platform::host(),
        };
        // The index knows the variant too.
        let platform = descriptor.platform.get_or_insert_with(|| parsed.platform(&default)).clone();
        let original = Some(Original { descriptor, manifest, config, config_bytes });
        Self { config: parsed, platform, layers, original }
    }
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

/// Opens the images of a source and reads their manifests and configs; layers are not read yet. There is one, unless all
/// platforms were asked for; archives of `docker save` and directories never have more.
///
/// # Errors
/// `NotFound`, `Unsupported`, `BadSource`, `VerificationFailed`, those of the registry, and `Io`.
pub(crate) async fn open(source: &Source, options: &ClientOptions, platforms: &Platforms) -> Result<Vec<Image>> {
    let default = match platforms {
        Platforms::One(platform) => platform.clone(),
        Platforms::All => Platform::host(),
    };
    match source {
        Source::Location(location) => repository::open(location, options, platforms).await,
        Source::OciArchive(file) => {
            let platforms = platforms.clone();
            in_background(file, move |file| oci_archive::open(file, &platforms)).await
        }
        Source::DockerArchive(file) => {
            in_background(file, move |file| Ok(vec![docker_archive::open(file, &default)?])).await
        }
        Source::Directory(path) => Ok(vec![Image {
            config: Config::empty(&default),
            platform: default,
            layers: vec![SourceLayer {
                digest: None,
                diff_id: None,
                size_bytes: None,
                content: LayerContent::Directory(path.clone()),
            }],
            original: None,
        }]),
    }
}

async fn in_background<W>(file: &Path, open: W) -> Result<Vec<Image>>
where
    W: FnOnce(&Path) -> Result<Vec<Image>> + Send + 'static,
{
    let file = file.to_owned();
    background::run(move || open(&file).map_err(|error| error.within(file.display()))).await?
}
