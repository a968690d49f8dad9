//! The two bitmaps of a blob file on disk. Both have this form (numbers little-endian):
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic: `UBLKLIVE` or `UBLKSAFE` |
//! | 8 | 8 | number of blocks |
//! | 16 | 16 | boot id (zeros in a durable bitmap) |
//! | 32 | 32 | digest of the chunk index that the blob file belongs to |
//! | 64 | 32 | SHA-256 of the words (zeros in a live bitmap, whose words change in place) |
//! | 96 | 8 each | the words |
//!
//! A file that differs in any point is taken for absent: the store may forget, it never lies.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use ublkimg_image::Sha256;

use super::bitmap::Bitmap;
use super::disk;
use super::layout::{BlobPaths, replace_file};
use crate::error::{Error, Result};

const HEADER_BYTES: usize = 96;

/// The kernel's name for this boot: 16 random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BootId(pub(crate) [u8; 16]);

impl BootId {
    /// That of the running kernel (random(4), `boot_id`).
    pub(crate) fn current() -> Result<Self> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = fs::read_to_string(path).map_err(|error| Error::path("read", path, error))?;
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let number = std::str::from_utf8(&digits).ok().and_then(|digits| u128::from_str_radix(digits, 16).ok());
        let what = || Error::new(crate::ErrorKind::Unsupported, format!("{} is not a boot id", path.display()));
        number.map(|number| Self(number.to_be_bytes())).ok_or_else(what)
    }
}

/// What a bitmap's header says about the file that it belongs to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    /// Digest of the chunk index.
    pub(crate) index: Sha256,
    /// Number of blocks.
    pub(crate) blocks: u32,
}

/// How long a bitmap is to be believed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Validity {
    /// As long as the page cache lives: this boot.
    Live(BootId),
    /// For ever: its data was synced before it.
    Durable,
}

fn header(identity: Identity, validity: Validity, words: &[u8]) -> Vec<u8> {
    let (magic, boot_id, digest) = match validity {
        Validity::Live(boot_id) => (b"UBLKLIVE", boot_id.0, [0; 32]),
        Validity::Durable => (b"UBLKSAFE", [0; 16], Sha256::of(words).0),
    };
    let fields: [&[u8]; 5] = [magic, &u64::from(identity.blocks).to_le_bytes(), &boot_id, &identity.index.0, &digest];
    fields.concat()
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Reads a bitmap; `None` if there is none to be believed.
pub(crate) fn read(path: &Path, identity: Identity, validity: Validity) -> Result<Option<Bitmap>> {
    let len_bytes = HEADER_BYTES + Bitmap::words_for(identity.blocks) * size_of::<u64>();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::path("open", path, error)),
    };
    let doing = |error| Error::path("read", path, error);
    if file.metadata().map_err(doing)?.len() != len_bytes as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; len_bytes];
    file.read_exact_at(&mut bytes, 0).map_err(doing)?;
    let (head, words) = bytes.split_at(HEADER_BYTES);
    if head != header(identity, validity, words) {
        return Ok(None);
    }
    let words: Vec<u64> = words.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    Ok(Bitmap::from_words(identity.blocks, &words))
}

/// Reads the bitmap of a blob file that is to be believed in this boot; `None` if there is none.
pub(crate) fn read_believed(paths: &BlobPaths, identity: Identity, boot_id: BootId) -> Result<Option<Bitmap>> {
    match read(&paths.live, identity, Validity::Live(boot_id))? {
        Some(live) => Ok(Some(live)),
        None => read(&paths.durable, identity, Validity::Durable),
    }
}

/// Writes a bitmap in place of what was there, whole or not at all. A durable one is on the disk on return.
pub(crate) fn write(path: &Path, identity: Identity, validity: Validity, words: &[u64]) -> Result<()> {
    let words = bytes_of(words);
    replace_file(path, matches!(validity, Validity::Durable), &[&header(identity, validity, &words), &words])
}

/// Overwrites some words of a live bitmap.
pub(crate) fn write_words(path: &Path, file: &File, first: usize, words: &[u64]) -> std::io::Result<()> {
    disk::write_all_at(path, file, &bytes_of(words), (HEADER_BYTES + first * size_of::<u64>()) as u64)
}
