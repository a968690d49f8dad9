//! The original image beside the converted one: its manifest, config and layers, byte for byte, in the destination.
//!
//! A blob that is there already, or can be linked from the source's repository, is not moved. Any other is copied through a
//! file without a name, one at a time.

use std::io;

use ublkimg_registry::BlobSource;
use ublkimg_registry::descriptor::Descriptor;

use super::context::Context;
use crate::background;
use crate::destination::Destination;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{Image, LayerInput, SourceLayer};

/// Makes the destination have the image as the source has it; `from` is the source's repository, `HOST/NAME`. Returns how
/// an index lists it.
///
/// # Errors
/// `Usage` for a source without a manifest; those of the source, the registry and `--tmpdir`.
pub(super) async fn push(context: &Context, image: &Image, from: Option<&str>) -> Result<Descriptor> {
    let destination = &context.destination;
    let original = image.original.as_ref();
    let original = original.ok_or_else(|| Error::new(ErrorKind::Usage, "the source has no manifest"))?;
    for layer in &image.layers {
        push_layer(context, destination, layer, from).await.map_err(|error| error.within(layer.name()))?;
    }
    let config = BlobSource::Bytes(original.config_bytes.clone().into());
    destination.repository.push_blob(&original.config.digest, original.config.size, config, None).await?;
    let media_type = &original.descriptor.media_type;
    destination.repository.push_manifest(media_type, original.manifest.clone(), None).await?;
    Ok(original.descriptor.clone())
}

async fn push_layer(
    context: &Context,
    destination: &Destination,
    layer: &SourceLayer,
    from: Option<&str>,
) -> Result<()> {
    let (Some(digest), Some(size_bytes)) = (layer.digest, layer.size_bytes) else {
        return Err(Error::bad_source("a layer without digest and size"));
    };
    if destination.has(&digest, from).await? {
        return Ok(());
    }
    let LayerInput::Stream(mut stream) = layer.open().await? else {
        return Err(Error::bad_source("a layer that is a directory"));
    };
    let dir = context.options.tmpdir.clone();
    let copied = background::run(move || {
        let failed = |error| Error::io(format!("temporary directory {}", dir.display()), error);
        let mut file = tempfile::tempfile_in(&dir).map_err(failed)?;
        io::copy(&mut stream, &mut file).map_err(failed)?;
        Ok::<_, Error>(file)
    });
    let file = copied.await??;
    let path = crate::blob::path_of(&file);
    destination.repository.push_blob(&digest, size_bytes, BlobSource::File(path), None).await?;
    Ok(())
}
