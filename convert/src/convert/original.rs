//! The original image beside the converted one: its manifest, config and layers, byte for byte, in the destination.
//!
//! A blob that is there already, or can be linked from the source's repository, is not moved. Of a layer that is converted,
//! the bytes that are read for that are kept in a file without a name ([`struct@Copy`]), so that the source is read once; one whose
//! conversion was found is fetched for this alone.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::PathBuf;

use ublkimg_registry::descriptor::Descriptor;
use ublkimg_registry::{BlobSource, Digest};

use super::context::Context;
use crate::background;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{LayerInput, Original, SourceLayer};
use crate::unnamed_file::{path_of, unnamed_file};

/// A layer as the source has it, on its way to the destination.
pub(super) struct Copy {
    digest: Digest,
    size_bytes: u64,
    file: File,
    tmpdir: PathBuf,
}

impl Copy {
    /// `None` when the original is not wanted there, or the layer is there.
    ///
    /// # Errors
    /// Those of the registry and `--tmpdir`.
    pub(super) async fn begin(context: &Context, layer: &SourceLayer) -> Result<Option<Self>> {
        if !context.options.keep_original {
            return Ok(None);
        }
        let (Some(digest), Some(size_bytes)) = (layer.digest, layer.size_bytes) else {
            return Err(Error::bad_source("a layer without digest and size"));
        };
        if context.destination.has(&digest, context.source_repository.as_deref()).await? {
            return Ok(None);
        }
        let tmpdir = context.options.tmpdir.clone();
        let file = unnamed_file(&tmpdir).map_err(|error| failed(&tmpdir, error))?;
        Ok(Some(Self { digest, size_bytes, file, tmpdir }))
    }

    /// The layer's bytes, of which each that is read is kept.
    ///
    /// # Errors
    /// `BadSource` for a directory; `Io` without file descriptors.
    pub(super) fn of_input(&self, input: LayerInput) -> Result<LayerInput> {
        let LayerInput::Stream(inner) = input else {
            return Err(Error::bad_source("a layer that is a directory"));
        };
        let file = self.file.try_clone().map_err(|error| failed(&self.tmpdir, error))?;
        Ok(LayerInput::Stream(Box::new(Kept { inner, file, tmpdir: self.tmpdir.clone() })))
    }

    /// Reads all of the layer, for nothing else.
    ///
    /// # Errors
    /// Those of the source and `--tmpdir`.
    pub(super) async fn fetch(&self, layer: &SourceLayer) -> Result<()> {
        let LayerInput::Stream(mut stream) = self.of_input(layer.open().await?)? else { return Ok(()) };
        let copied = background::run(move || io::copy(&mut stream, &mut io::sink())).await?;
        copied.map(drop).map_err(|error| Error::io("reading the layer", error))
    }

    /// Sends what was kept, once the layer was read to its end.
    ///
    /// # Errors
    /// Those of the registry.
    pub(super) async fn push(&self, context: &Context) -> Result<()> {
        let source = BlobSource::File(path_of(&self.file));
        context.destination.repository.push_blob(&self.digest, self.size_bytes, source, None).await?;
        Ok(())
    }
}

/// A stream whose bytes go into a file too.
struct Kept {
    inner: Box<dyn Read + Send>,
    file: File,
    tmpdir: PathBuf,
}

impl Read for Kept {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.file.write_all(&buffer[..count]).map_err(|error| io::Error::from(failed(&self.tmpdir, error)))?;
        Ok(count)
    }
}

fn failed(tmpdir: &std::path::Path, error: io::Error) -> Error {
    Error::io(format!("temporary directory {}", tmpdir.display()), error)
}

/// Pushes the original's config and manifest, whose layers are there. Returns how an index lists it.
///
/// # Errors
/// `Usage` for a source without a manifest; those of the registry.
pub(super) async fn push(context: &Context, original: Option<&Original>) -> Result<Descriptor> {
    let repository = &context.destination.repository;
    let original = original.ok_or_else(|| Error::new(ErrorKind::Usage, "the source has no manifest"))?;
    let config = BlobSource::Bytes(original.config_bytes.clone().into());
    repository.push_blob(&original.config.digest, original.config.size, config, None).await?;
    repository.push_manifest(&original.descriptor.media_type, original.manifest.clone(), None).await?;
    Ok(original.descriptor.clone())
}
