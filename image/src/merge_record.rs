//! The merge record: what merging needs to know about a layer and its EROFS tree cannot say.
//!
//! A layer's tree must be complete to be an image, so it holds directories that the layer never mentioned; it cannot
//! hold a hard link to a file of a lower layer; and in it a character device 0:0 means "deleted". The record names
//! these cases. It is the payload of the first frame of a layer blob (a skippable one), so merging reads the start of
//! the blob and never its data.

use crate::cursor::Cursor;
use crate::path::path_fault;
use crate::{Error, MAX_BLOCKS, Result};

const PART: &str = "merge record";
const MAGIC: [u8; 4] = *b"UBMR";
const VERSION: u16 = 1;

/// Longest path in a record, in bytes: what its 16-bit length field can say.
const MAX_PATH_BYTES: usize = u16::MAX as usize;

/// What the EROFS tree of a layer cannot say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MergeRecord {
    /// Length of the metadata at the start of the layer's image, in blocks. At least 1.
    pub metadata_blocks: u32,
    /// Paths of directories that the layer has only as parents of its entries: merging must not take their
    /// attributes from this layer if a lower layer has them. Empty = the root directory.
    pub implied_directories: Vec<Vec<u8>>,
    /// Hard links to files of lower layers. They are not in the layer's tree. In the order in which they apply.
    pub lower_links: Vec<LowerLink>,
    /// Paths of character devices 0:0 that are device nodes, not whiteouts.
    pub plain_devices: Vec<Vec<u8>>,
}

/// A hard link whose target is in a lower layer. Paths have no leading slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LowerLink {
    /// The new name.
    pub path: Vec<u8>,
    /// The file it names, in the tree that the layers below (and the links before this one) make.
    pub target: Vec<u8>,
}

impl MergeRecord {
    /// The record as bytes. Lists keep their order.
    ///
    /// # Errors
    /// `Invalid` if `metadata_blocks` is 0 or a path is not a relative one of plain names; `TooLarge` if it has more
    /// than 65535 bytes, or a list more than 2^32 - 1 elements.
    pub fn encode(&self) -> Result<Vec<u8>> {
        if !(1..=MAX_BLOCKS).contains(&self.metadata_blocks) {
            return Err(Error::invalid(PART, format!("{} metadata blocks", self.metadata_blocks)));
        }
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.metadata_blocks.to_le_bytes());
        for len in [self.implied_directories.len(), self.lower_links.len(), self.plain_devices.len()] {
            let len = u32::try_from(len).map_err(|_| Error::too_large(PART, format!("{len} entries")))?;
            out.extend_from_slice(&len.to_le_bytes());
        }
        for path in &self.implied_directories {
            if path.is_empty() {
                out.extend_from_slice(&[0; 2]);
            } else {
                encode_path(&mut out, path)?;
            }
        }
        for link in &self.lower_links {
            encode_path(&mut out, &link.path)?;
            encode_path(&mut out, &link.target)?;
        }
        for path in &self.plain_devices {
            encode_path(&mut out, path)?;
        }
        Ok(out)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// `Corrupt` if `bytes` is not exactly one record with good paths, `Unsupported` if it is of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut cursor = Cursor::new(PART, bytes);
        if cursor.array()? != MAGIC {
            return Err(Error::corrupt(PART, "wrong magic number"));
        }
        let version = cursor.u16()?;
        if version != VERSION {
            return Err(Error::unsupported(PART, format!("version {version}")));
        }
        cursor.zeros(2)?;
        let metadata_blocks = cursor.u32()?;
        if !(1..=MAX_BLOCKS).contains(&metadata_blocks) {
            return Err(Error::corrupt(PART, format!("{metadata_blocks} metadata blocks")));
        }
        let [implied, links, devices] = [cursor.u32()?, cursor.u32()?, cursor.u32()?];
        // Counts are not trusted with an allocation: lists grow as their elements are found in the bytes.
        let mut record = Self { metadata_blocks, ..Self::default() };
        for _ in 0..implied {
            record.implied_directories.push(decode_path(&mut cursor, true)?);
        }
        for _ in 0..links {
            let path = decode_path(&mut cursor, false)?;
            record.lower_links.push(LowerLink { path, target: decode_path(&mut cursor, false)? });
        }
        for _ in 0..devices {
            record.plain_devices.push(decode_path(&mut cursor, false)?);
        }
        cursor.end()?;
        Ok(record)
    }
}

fn encode_path(out: &mut Vec<u8>, path: &[u8]) -> Result<()> {
    let shown = path.escape_ascii();
    if let Some(fault) = path_fault(path) {
        return Err(Error::invalid(PART, format!("path \"{shown}\": a name in it {fault}")));
    }
    let len = u16::try_from(path.len())
        .map_err(|_| Error::too_large(PART, format!("path of {} bytes, at most {MAX_PATH_BYTES}", path.len())))?;
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(path);
    Ok(())
}

fn decode_path(cursor: &mut Cursor<'_>, may_be_root: bool) -> Result<Vec<u8>> {
    let at = cursor.position();
    let len = cursor.u16()?;
    let path = cursor.bytes(usize::from(len))?;
    match path_fault(path) {
        Some(_) if may_be_root && path.is_empty() => Ok(Vec::new()),
        Some(fault) => Err(Error::corrupt(PART, format!("a name in a path {fault}")).at(at)),
        None => Ok(path.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path() -> impl Strategy<Value = Vec<u8>> {
        let name = prop::collection::vec(prop_oneof![b'a'..=b'c', Just(b'.'), Just(0xff)], 3..20);
        prop::collection::vec(
            name.prop_map(|mut name| {
                name[0] = b'n';
                name
            }),
            1..5,
        )
        .prop_map(|names| names.join(&b'/'))
    }

    fn record() -> impl Strategy<Value = MergeRecord> {
        let implied = prop::collection::vec(prop_oneof![4 => path(), 1 => Just(Vec::new())], 0..6);
        let link = (path(), path()).prop_map(|(path, target)| LowerLink { path, target });
        (1..=MAX_BLOCKS, implied, prop::collection::vec(link, 0..6), prop::collection::vec(path(), 0..6)).prop_map(
            |(metadata_blocks, implied_directories, lower_links, plain_devices)| MergeRecord {
                metadata_blocks,
                implied_directories,
                lower_links,
                plain_devices,
            },
        )
    }

    proptest! {
        #[test]
        fn reads_back(record in record()) {
            let bytes = record.encode().unwrap();
            prop_assert_eq!(MergeRecord::decode(&bytes), Ok(record));
            for cut in 0..bytes.len() {
                prop_assert!(MergeRecord::decode(&bytes[..cut]).is_err());
            }
        }

        /// Every record has one form: what is read from damaged bytes is written as the same bytes.
        #[test]
        fn damage_is_refused_or_sound(record in record(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
            let mut bytes = record.encode().unwrap();
            let at = at.index(bytes.len());
            bytes[at] = value;
            if let Ok(read) = MergeRecord::decode(&bytes) {
                prop_assert_eq!(read.encode().unwrap(), bytes);
            }
        }
    }

    #[test]
    fn bad_records_are_not_written() {
        let good = MergeRecord { metadata_blocks: 1, ..MergeRecord::default() };
        assert!(good.encode().is_ok());
        let kind = |record: MergeRecord| record.encode().unwrap_err().kind();
        assert_eq!(kind(MergeRecord::default()), crate::ErrorKind::Invalid);
        assert_eq!(
            kind(MergeRecord { plain_devices: vec![b"/a".to_vec()], ..good.clone() }),
            crate::ErrorKind::Invalid
        );
        assert_eq!(kind(MergeRecord { plain_devices: vec![Vec::new()], ..good.clone() }), crate::ErrorKind::Invalid);
        let long = vec![vec![b'a'; 255]; 256].join(&b'/');
        assert_eq!(long.len(), 65_535);
        assert!(MergeRecord { plain_devices: vec![long.clone()], ..good.clone() }.encode().is_ok());
        let longer = [&long[..], b"/a"].concat();
        assert_eq!(kind(MergeRecord { plain_devices: vec![longer], ..good }), crate::ErrorKind::TooLarge);
    }

    #[test]
    fn huge_counts_are_not_allocated() {
        let mut bytes = MergeRecord { metadata_blocks: 1, ..MergeRecord::default() }.encode().unwrap();
        bytes[12..24].fill(0xff);
        assert!(MergeRecord::decode(&bytes).is_err());
    }
}
