//! The bundle: copies of the chunk indexes of all layer blobs, in one trailing skippable frame of the metadata blob.
//!
//! The metadata blob is fetched whole before a device exists; with the bundle in it, attaching an image needs no
//! request per layer. The copies are trusted as far as the metadata blob is, whose digest the manifest names.

use crate::cursor::Cursor;
use crate::zstd_frame::SKIPPABLE_HEADER_BYTES;
use crate::{ChunkIndex, Error, MAX_DEVICES, Result, Sha256};

const PART: &str = "bundle";
const MAGIC: [u8; 4] = *b"UBCI";
const VERSION: u16 = 1;

/// The chunk indexes of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bundle {
    /// One for each layer blob, in the order of the device table. At most [`MAX_DEVICES`].
    pub layers: Vec<BundledLayer>,
}

/// A layer blob and its chunk index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundledLayer {
    /// Digest of the blob.
    pub digest: Sha256,
    /// Length of the blob. Its chunk index is the last thing in it.
    pub blob_len_bytes: u64,
    /// The chunk index, as it is in the blob.
    pub index: ChunkIndex,
}

impl Bundle {
    /// The payload of the bundle, without a frame around it.
    ///
    /// # Errors
    /// `TooLarge` with more than [`MAX_DEVICES`] layers or an index of 4 GiB; `Invalid` if a blob does not end where
    /// its index does.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let count = u32::try_from(self.layers.len()).ok().filter(|_| self.layers.len() <= MAX_DEVICES);
        let count = count.ok_or_else(|| Error::too_large(PART, format!("{} layers", self.layers.len())))?;
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&count.to_le_bytes());
        for layer in &self.layers {
            let index = layer.index.encode();
            let len = u32::try_from(index.len())
                .map_err(|_| Error::too_large(PART, format!("chunk index of {} bytes", index.len())))?;
            if !layer.ends_with_index(len) {
                return Err(Error::invalid(PART, format!("{}: the blob does not end with its index", layer.digest)));
            }
            out.extend_from_slice(&layer.digest.0);
            out.extend_from_slice(&layer.blob_len_bytes.to_le_bytes());
            out.extend_from_slice(&layer.index.section_offset_bytes().to_le_bytes());
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(&index);
        }
        Ok(out)
    }

    /// Reads the payload of a bundle.
    ///
    /// # Errors
    /// `Corrupt` if `payload` is not exactly one bundle with good indexes, `Unsupported` if it or an index is of
    /// another version or kind.
    pub fn decode(payload: &[u8]) -> Result<Self> {
        let mut cursor = Cursor::new(PART, payload);
        if cursor.array()? != MAGIC {
            return Err(Error::corrupt(PART, "wrong magic number"));
        }
        let version = cursor.u16()?;
        if version != VERSION {
            return Err(Error::unsupported(PART, format!("version {version}")));
        }
        cursor.zeros(2)?;
        let count = cursor.u32()?;
        if count as usize > MAX_DEVICES {
            return Err(Error::corrupt(PART, format!("{count} layers, at most {MAX_DEVICES}")));
        }
        let mut layers = Vec::new();
        for _ in 0..count {
            let at = cursor.position();
            let digest = Sha256(cursor.array()?);
            let blob_len_bytes = cursor.u64()?;
            let section_offset_bytes = cursor.u64()?;
            let len = cursor.u32()?;
            let index = ChunkIndex::decode(cursor.bytes(len as usize)?, section_offset_bytes)?;
            let layer = BundledLayer { digest, blob_len_bytes, index };
            if !layer.ends_with_index(len) {
                return Err(Error::corrupt(PART, format!("{digest}: the blob does not end with its index")).at(at));
            }
            layers.push(layer);
        }
        cursor.end()?;
        Ok(Self { layers })
    }
}

impl BundledLayer {
    fn ends_with_index(&self, index_len_bytes: u32) -> bool {
        let frame_len = SKIPPABLE_HEADER_BYTES as u64 + u64::from(index_len_bytes);
        self.index.section_offset_bytes().checked_add(frame_len) == Some(self.blob_len_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunk_index::tests::index;

    fn bundle() -> impl Strategy<Value = Bundle> {
        let layer = (any::<[u8; 32]>(), index()).prop_map(|(digest, index)| {
            let blob_len_bytes = index.section_offset_bytes() + 8 + index.encode().len() as u64;
            BundledLayer { digest: Sha256(digest), blob_len_bytes, index }
        });
        prop::collection::vec(layer, 0..5).prop_map(|layers| Bundle { layers })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

        #[test]
        fn reads_back(bundle in bundle(), cut in any::<prop::sample::Index>()) {
            let payload = bundle.encode().unwrap();
            prop_assert_eq!(Bundle::decode(&payload), Ok(bundle));
            prop_assert!(Bundle::decode(&payload[..cut.index(payload.len())]).is_err());
        }

        #[test]
        fn damage_is_refused_or_sound(bundle in bundle(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
            let mut payload = bundle.encode().unwrap();
            let at = at.index(payload.len());
            payload[at] = value;
            if let Ok(read) = Bundle::decode(&payload) {
                prop_assert_eq!(read.encode().unwrap(), payload);
            }
        }
    }

    #[test]
    fn blobs_end_with_their_index() {
        let index = crate::ChunkIndexBuilder::new(0).finish();
        let layer = BundledLayer { digest: Sha256::of(b""), blob_len_bytes: 41, index };
        let error = Bundle { layers: vec![layer] }.encode().unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Invalid);
    }
}
