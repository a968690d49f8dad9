//! What a conversion tells of its result.

use ublkimg_registry::Digest;
use ublkimg_registry::descriptor::Platform;

use crate::converted_layer::ConvertedLayer;

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Digest of the image index, which the tag points at.
    pub digest: Digest,
    /// The converted images in it: one, unless all platforms were asked for.
    pub images: Vec<ImageSummary>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// Digest of its manifest.
    pub manifest: Digest,
    /// What the image is for.
    pub platform: Platform,
    /// The layers, base first.
    pub layers: Vec<LayerSummary>,
    /// The metadata blob, in bytes as stored.
    pub metadata_bytes: u64,
    /// The metadata image, in bytes.
    pub metadata_raw_bytes: u64,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSummary {
    /// Digest of the source layer as the source states it; `None` for a directory and in an archive of `docker save`.
    pub source: Option<Digest>,
    /// Bytes of the source layer as it is stored; of the files for a directory.
    pub source_bytes: u64,
    /// Digest of the layer blob.
    pub digest: Digest,
    /// Bytes of the layer blob.
    pub size_bytes: u64,
    /// Bytes of the layer blob decompressed.
    pub raw_bytes: u64,
    /// Number of chunks.
    pub chunks: u32,
    /// The destination had the blob already.
    pub existed: bool,
    /// It was converted before: the source layer was not read.
    pub reused: bool,
}

impl LayerSummary {
    pub(super) fn new(
        source: Option<Digest>,
        source_bytes: u64,
        layer: &ConvertedLayer,
        existed: bool,
        reused: bool,
    ) -> Self {
        Self {
            source,
            source_bytes,
            digest: layer.reference.digest,
            size_bytes: layer.reference.size_bytes,
            raw_bytes: layer.index.raw_len_bytes(),
            chunks: layer.index.len(),
            existed,
            reused,
        }
    }
}
