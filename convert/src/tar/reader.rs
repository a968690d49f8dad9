//! The forward pass over an archive: headers to entries, data to pieces.

use std::borrow::Cow;
use std::io::Read;

use tar_core::{EntryType, Header};
use ublkimg_image::{DeviceNumber, Time};

use super::number::{number, unsigned};
use super::pax::{self, Records, Region};
use super::sparse::{self, SparseMap};
use super::{BLOCK, EXTENSION_BYTES_MAX, Entry, EntryKind, Malformed};
use crate::error::{Error, Result};

/// Bytes handed to the consumer of a file's content at once.
const PIECE_BYTES: usize = 64 << 10;

/// A part of a file's content, in order.
pub(crate) enum Piece<'a> {
    /// Bytes that the archive stores.
    Data(&'a [u8]),
    /// That many zero bytes which it does not store.
    Zeros(u64),
}

/// Reads the entries of an archive one after another.
pub(crate) struct TarReader<R> {
    input: R,
    /// Bytes read so far; for messages.
    position: u64,
    globals: Records,
    /// Stored bytes of the current entry that have not been read, and their padding.
    data_left: u64,
    padding_left: u64,
    sparse: Option<SparseMap>,
    /// A block that was looked at and belongs to what comes next.
    ahead: Option<[u8; BLOCK]>,
    ended: bool,
}

/// What extended headers say about the next entry.
#[derive(Default)]
struct Extensions {
    records: Records,
    sparse_0_0: Vec<Region>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    bytes: usize,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(input: R) -> Self {
        Self {
            input,
            position: 0,
            globals: Records::new(),
            data_left: 0,
            padding_left: 0,
            sparse: None,
            ahead: None,
            ended: false,
        }
    }

    /// The next entry; `None` at the end of the archive. Content of the entry before that was not read is skipped.
    ///
    /// # Errors
    /// `BadSource` with the place for a malformed or truncated archive; errors of the input as they are.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.skip_rest()?;
        let mut extensions = Extensions::default();
        while let Some(block) = self.header_block()? {
            let at = self.position - BLOCK as u64;
            let header = Header::from_bytes(&block);
            if !has_good_checksum(&block) {
                return Err(malformed_at(at, Malformed("header checksum")));
            }
            match header.entry_type() {
                EntryType::XHeader | EntryType::Other(b'X') => {
                    let data = self.extension(header, &mut extensions.bytes, at)?;
                    let regions = pax::read(&data, &mut extensions.records).map_err(|what| malformed_at(at, what))?;
                    extensions.sparse_0_0.extend(regions);
                }
                EntryType::XGlobalHeader => {
                    let mut bytes = self.globals.iter().map(|(key, value)| key.len() + value.len()).sum();
                    let data = self.extension(header, &mut bytes, at)?;
                    pax::read(&data, &mut self.globals).map_err(|what| malformed_at(at, what))?;
                }
                EntryType::GnuLongName => {
                    extensions.long_name = Some(c_string(self.extension(header, &mut extensions.bytes, at)?));
                }
                EntryType::GnuLongLink => {
                    extensions.long_link = Some(c_string(self.extension(header, &mut extensions.bytes, at)?));
                }
                // A volume label, not a file.
                EntryType::Other(b'V') => {}
                _ => return self.entry(header, &extensions, at).map(Some),
            }
        }
        if extensions.bytes > 0 {
            return Err(malformed_at(self.position, Malformed("extended header without an entry")));
        }
        Ok(None)
    }

    /// Bytes of the input that were read.
    pub(crate) fn position_bytes(&self) -> u64 {
        self.position
    }

    /// Bytes up to the next header.
    pub(crate) fn unread_bytes(&self) -> u64 {
        self.data_left + self.padding_left
    }

    /// Hands the content of the current file to `consume`, front to back. Its pieces have the length of the file
    /// together.
    ///
    /// # Errors
    /// Those of [`next_entry`](Self::next_entry) and of `consume`.
    pub(crate) fn read_content(&mut self, mut consume: impl FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
        let Some(map) = self.sparse.take() else {
            return self.read_data(self.data_left, &mut consume);
        };
        for (zeros, data) in map.runs() {
            if zeros > 0 {
                consume(Piece::Zeros(zeros))?;
            }
            self.read_data(data, &mut consume)?;
        }
        Ok(())
    }

    /// Reads to the end of the input: what follows the archive belongs to its digest.
    pub(crate) fn drain(mut self) -> Result<()> {
        std::io::copy(&mut self.input, &mut std::io::sink()).map_err(|error| Error::io("reading tar", error))?;
        Ok(())
    }

    fn read_data(&mut self, len: u64, consume: &mut impl FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
        let mut buffer = [0_u8; PIECE_BYTES];
        let mut left = len;
        while left > 0 {
            let want = usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            self.read_exact(&mut buffer[..want])?;
            left -= want as u64;
            self.data_left -= want as u64;
            consume(Piece::Data(&buffer[..want]))?;
        }
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<()> {
        let (data, padding) = (std::mem::take(&mut self.data_left), std::mem::take(&mut self.padding_left));
        self.sparse = None;
        let skipped = std::io::copy(&mut self.input.by_ref().take(data + padding), &mut std::io::sink())
            .map_err(|error| Error::io("reading tar", error))?;
        self.position += skipped;
        if skipped < data {
            return Err(self.truncated());
        }
        // Some writers end an archive with the last byte of data.
        self.ended |= skipped < data + padding;
        Ok(())
    }

    /// The next header; `None` at the end. One zero block is the end only if nothing but zeros follows it at once.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        if self.ended {
            return Ok(None);
        }
        let block = self.block_or_end()?;
        if let Some(block) = block
            && block.iter().any(|byte| *byte != 0)
        {
            return Ok(Some(block));
        }
        self.ended = true;
        if block.is_some()
            && let Some(second) = self.block_or_end()?
            && second.iter().any(|byte| *byte != 0)
        {
            return Err(malformed_at(self.position, Malformed("entry after a lone zero block")));
        }
        Ok(None)
    }

    /// A whole block, or `None` at the end of the input.
    fn block_or_end(&mut self) -> Result<Option<[u8; BLOCK]>> {
        if let Some(block) = self.ahead.take() {
            self.position += BLOCK as u64;
            return Ok(Some(block));
        }
        let mut block = [0_u8; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(self.truncated()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("reading tar", error)),
            }
        }
        self.position += BLOCK as u64;
        Ok(Some(block))
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        match self.input.read_exact(buffer) {
            Ok(()) => {
                self.position += buffer.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof && error.get_ref().is_none() => {
                Err(self.truncated())
            }
            Err(error) => Err(Error::io("reading tar", error)),
        }
    }

    /// The data of an extended header; `total` counts the bytes of all of them.
    fn extension(&mut self, header: &Header, total: &mut usize, at: u64) -> Result<Vec<u8>> {
        let size = unsigned(&header.as_ustar().size).ok_or_else(|| malformed_at(at, Malformed("size")))?;
        let size = usize::try_from(size).ok().filter(|size| *size <= EXTENSION_BYTES_MAX - *total);
        let size = size.ok_or_else(|| malformed_at(at, Malformed("extended header (too long)")))?;
        *total += size;
        let mut data = vec![0; size.next_multiple_of(BLOCK)];
        self.read_exact(&mut data)?;
        data.truncate(size);
        Ok(data)
    }

    fn entry(&mut self, header: &Header, extensions: &Extensions, at: u64) -> Result<Entry> {
        let facts = Facts { header, extensions, globals: &self.globals };
        let path = facts.path().map_err(|what| malformed_at(at, what))?;
        let name_it = |what: Malformed| malformed_at(at, what).within(crate::path::show(&path));
        let stored_bytes = facts.size().map_err(name_it)?;
        let mut entry = facts.entry(path.clone()).map_err(name_it)?;
        if let EntryKind::File { size_bytes } = &mut entry.kind {
            self.data_left = stored_bytes;
            self.padding_left =
                stored_bytes.checked_next_multiple_of(BLOCK as u64).ok_or(Malformed("size")).map_err(name_it)?
                    - stored_bytes;
            self.sparse =
                self.sparse_map(header, extensions).map_err(|error| error.within(crate::path::show(&path)))?;
            *size_bytes = self.sparse.as_ref().map_or(stored_bytes, |map| map.size_bytes);
        } else if matches!(entry.kind, EntryKind::HardLink(_)) && stored_bytes > 0 {
            self.find_link_data(stored_bytes).map_err(|error| error.within(crate::path::show(&path)))?;
        }
        Ok(entry)
    }

    /// Tells a hard link that carries the file once more (`pax -o linkdata`) from one that only says its size: in front
    /// of data there is no header. Where Go's reader finds an entry, so does this.
    fn find_link_data(&mut self, stored_bytes: u64) -> Result<()> {
        let Some(block) = self.block_or_end()? else { return Ok(()) };
        if block.iter().all(|byte| *byte == 0) || has_good_checksum(&block) {
            self.position -= BLOCK as u64;
            self.ahead = Some(block);
            return Ok(());
        }
        let padded_bytes = stored_bytes.checked_next_multiple_of(BLOCK as u64).ok_or(Malformed("size"))?;
        self.data_left = stored_bytes.saturating_sub(BLOCK as u64);
        self.padding_left = padded_bytes - stored_bytes.max(BLOCK as u64);
        self.skip_rest()
    }

    /// The sparse map of a file, if it has one. What the map takes of the data is no longer in `data_left`.
    fn sparse_map(&mut self, header: &Header, extensions: &Extensions) -> Result<Option<SparseMap>> {
        let at = self.position - BLOCK as u64;
        let records = &extensions.records;
        let record = |key: &[u8]| records.get(key).map(Vec::as_slice);
        let size_record = || {
            let size = record(b"GNU.sparse.realsize").or_else(|| record(b"GNU.sparse.size"));
            size.and_then(pax::decimal).ok_or_else(|| malformed_at(at, Malformed("GNU.sparse.size")))
        };
        let (size_bytes, regions) = if header.entry_type() == EntryType::GnuSparse {
            let gnu = header.try_as_gnu().ok_or_else(|| malformed_at(at, Malformed("sparse header")))?;
            let size = unsigned(&gnu.realsize).ok_or_else(|| malformed_at(at, Malformed("real size")))?;
            (size, self.old_gnu_regions(header)?)
        } else if record(b"GNU.sparse.major") == Some(b"1") && record(b"GNU.sparse.minor") == Some(b"0") {
            let size = size_record()?;
            (size, self.map_before_data()?)
        } else if let Some(map) = record(b"GNU.sparse.map") {
            (size_record()?, sparse::regions_of_0_1(map).map_err(|what| malformed_at(at, what))?)
        } else if record(b"GNU.sparse.size").is_some() || record(b"GNU.sparse.numblocks").is_some() {
            (size_record()?, extensions.sparse_0_0.clone())
        } else if records.keys().any(|key| key.starts_with(b"GNU.sparse.")) {
            return Err(malformed_at(at, Malformed("sparse file of an unknown format")));
        } else {
            return Ok(None);
        };
        SparseMap::new(size_bytes, regions, self.data_left).map(Some).map_err(|what| malformed_at(at, what))
    }

    /// The regions in an old GNU header and the extension blocks behind it, which are not part of the data.
    fn old_gnu_regions(&mut self, header: &Header) -> Result<Vec<Region>> {
        let mut regions = Vec::new();
        let gnu = header.as_gnu();
        let mut more = gnu.isextended[0] != 0;
        let descriptors = &header.as_bytes()[386..386 + 4 * 24];
        sparse::push_old_gnu(descriptors, &mut regions).map_err(|what| malformed_at(self.position, what))?;
        while more {
            let mut block = [0_u8; BLOCK];
            self.read_exact(&mut block)?;
            let before = regions.len();
            sparse::push_old_gnu(&block[..21 * 24], &mut regions).map_err(|what| malformed_at(self.position, what))?;
            more = block[504] != 0;
            if more && regions.len() == before {
                return Err(malformed_at(self.position, Malformed("empty sparse extension")));
            }
        }
        Ok(regions)
    }

    /// The map of PAX 1.0: it fills whole blocks at the start of the data.
    fn map_before_data(&mut self) -> Result<Vec<Region>> {
        let mut block = [0_u8; BLOCK];
        let mut used = BLOCK;
        sparse::regions_of_1_0(|| {
            let mut digits = Vec::new();
            loop {
                if used == BLOCK {
                    let at = self.position;
                    self.data_left = self
                        .data_left
                        .checked_sub(BLOCK as u64)
                        .ok_or(Malformed("sparse map"))
                        .map_err(|what| malformed_at(at, what))?;
                    self.read_exact(&mut block)?;
                    used = 0;
                }
                let byte = block[used];
                used += 1;
                match byte {
                    b'\n' => return pax::decimal(&digits).ok_or_else(|| Malformed("sparse map").into()),
                    _ if digits.len() < 20 => digits.push(byte),
                    _ => return Err(Malformed("sparse map").into()),
                }
            }
        })
    }

    fn truncated(&self) -> Error {
        Error::bad_source(format!("tar archive is truncated after byte {}", self.position))
    }
}

/// A header with everything that extends it.
struct Facts<'a> {
    header: &'a Header,
    extensions: &'a Extensions,
    globals: &'a Records,
}

impl Facts<'_> {
    /// A PAX record; an empty value means that it is not there.
    fn record(&self, key: &[u8]) -> Option<&[u8]> {
        let record = self.extensions.records.get(key).or_else(|| self.globals.get(key));
        record.map(Vec::as_slice).filter(|value| !value.is_empty())
    }

    fn path(&self) -> Result<Vec<u8>, Malformed> {
        let path: Cow<'_, [u8]> = if let Some(path) = self.record(b"GNU.sparse.name").or_else(|| self.record(b"path")) {
            Cow::Borrowed(path)
        } else if let Some(path) = &self.extensions.long_name {
            Cow::Borrowed(path)
        } else {
            match self.prefix() {
                b"" => Cow::Borrowed(self.header.path_bytes()),
                prefix => Cow::Owned([prefix, b"/".as_slice(), self.header.path_bytes()].concat()),
            }
        };
        if path.is_empty() || path.contains(&0) { Err(Malformed("name")) } else { Ok(path.into_owned()) }
    }

    /// The directory part of the name in a ustar header. Like Go, whatever the version field says, and shorter in the
    /// variant of Schily's tar.
    fn prefix(&self) -> &[u8] {
        let ustar = self.header.as_ustar();
        if ustar.magic != *b"ustar\0" {
            return b"";
        }
        let prefix = if self.header.as_bytes()[508..] == *b"tar\0" { &ustar.prefix[..131] } else { &ustar.prefix[..] };
        prefix.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    fn link(&self) -> Result<Vec<u8>, Malformed> {
        let link = self.record(b"linkpath").or(self.extensions.long_link.as_deref());
        let link = link.unwrap_or_else(|| self.header.link_name_bytes());
        if link.is_empty() || link.contains(&0) { Err(Malformed("link target")) } else { Ok(link.to_vec()) }
    }

    /// Stored bytes of the data.
    fn size(&self) -> Result<u64, Malformed> {
        let size = match self.record(b"size") {
            Some(size) => pax::decimal(size),
            None => unsigned(&self.header.as_ustar().size),
        };
        // Positions are 64-bit; a size that could wrap them is a lie.
        size.filter(|size| *size <= i64::MAX.cast_unsigned()).ok_or(Malformed("size"))
    }

    fn owner(&self, key: &[u8], field: &[u8]) -> Option<u32> {
        let id = match self.record(key) {
            Some(text) => i64::try_from(pax::decimal(text)?).ok()?,
            None => number(field)?,
        };
        // Some archivers write "nobody" as -2.
        u32::try_from(id).ok().or_else(|| i32::try_from(id).ok().map(i32::cast_unsigned))
    }

    fn mtime(&self) -> Option<Time> {
        match self.record(b"mtime") {
            Some(text) => pax::time(text),
            None => Some(Time { seconds: number(&self.header.as_ustar().mtime)?, nanoseconds: 0 }),
        }
    }

    fn device(&self) -> Result<DeviceNumber, Malformed> {
        let ustar = self.header.as_ustar();
        let (major, minor) = (unsigned(&ustar.dev_major), unsigned(&ustar.dev_minor));
        // The kernel's device numbers have 12 and 20 bits.
        match (major, minor) {
            (Some(major @ 0..=0xfff), Some(minor @ 0..=0xf_ffff)) => Ok(DeviceNumber {
                major: u32::try_from(major).map_err(|_| Malformed("device number"))?,
                minor: u32::try_from(minor).map_err(|_| Malformed("device number"))?,
            }),
            _ => Err(Malformed("device number")),
        }
    }

    fn entry(&self, path: Vec<u8>) -> Result<Entry, Malformed> {
        let ustar = self.header.as_ustar();
        let kind = match self.header.entry_type() {
            // Before ustar, a directory was a file whose name ends in a slash.
            EntryType::Regular if ustar.typeflag == [0] && path.ends_with(b"/") => EntryKind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => EntryKind::File { size_bytes: 0 },
            EntryType::Link => EntryKind::HardLink(self.link()?),
            EntryType::Symlink => EntryKind::Symlink(self.link()?),
            EntryType::Char => EntryKind::CharDevice(self.device()?),
            EntryType::Block => EntryKind::BlockDevice(self.device()?),
            EntryType::Directory => EntryKind::Directory,
            EntryType::Fifo => EntryKind::Fifo,
            _ => return Err(Malformed("entry type")),
        };
        let mode = number(&ustar.mode).ok_or(Malformed("mode"))? & 0o7777;
        let mut xattrs = pax::xattrs(self.globals)?;
        xattrs.extend(pax::xattrs(&self.extensions.records)?);
        Ok(Entry {
            path,
            kind,
            mode: u16::try_from(mode).map_err(|_| Malformed("mode"))?,
            uid: self.owner(b"uid", &ustar.uid).ok_or(Malformed("uid"))?,
            gid: self.owner(b"gid", &ustar.gid).ok_or(Malformed("gid"))?,
            mtime: self.mtime().ok_or(Malformed("mtime"))?,
            xattrs,
        })
    }
}

impl From<Malformed> for Error {
    fn from(Malformed(what): Malformed) -> Self {
        Self::bad_source(format!("tar archive: bad {what}"))
    }
}

/// Some old archivers summed signed bytes.
fn has_good_checksum(block: &[u8; BLOCK]) -> bool {
    const FIELD: std::ops::Range<usize> = 148..156;
    let summed = || block.iter().enumerate().map(|(at, byte)| if FIELD.contains(&at) { b' ' } else { *byte });
    let signed: i64 = summed().map(|byte| i64::from(byte.cast_signed())).sum();
    let unsigned: i64 = summed().map(i64::from).sum();
    number(&block[FIELD]).is_some_and(|sum| sum == unsigned || sum == signed)
}

fn malformed_at(position: u64, Malformed(what): Malformed) -> Error {
    Error::bad_source(format!("tar archive, byte {position}: bad {what}"))
}

/// The bytes before the first NUL.
fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}
