//! A layer that is in the destination, with what merging and the manifest need of it.

use ublkimg_image::ChunkIndex;
use ublkimg_registry::erofs_manifest::LayerRef;

use crate::chunk_size::ChunkSize;

/// The format of layer blobs as this converter writes them. Raised when the same layer and level become other bytes, so
/// that nothing made before is taken for what would be made now.
const CONVERTER: &str = "ublkimg-2";

/// See the module. It does not hold the blob.
#[derive(Clone, Debug)]
pub(crate) struct ConvertedLayer {
    /// What the manifest says of the blob.
    pub(crate) reference: LayerRef,
    pub(crate) index: ChunkIndex,
    /// The start of the decompressed blob: its EROFS metadata.
    pub(crate) metadata: Vec<u8>,
    /// The merge record, encoded.
    pub(crate) record: Vec<u8>,
}

/// All that decides the bytes of a layer blob beside its source layer, as a text to be compared.
pub(crate) fn settings(level: i32, chunk_size: ChunkSize) -> String {
    format!("{CONVERTER} zstd-{} level-{level} chunk-{chunk_size}", zstd::zstd_safe::version_string())
}
