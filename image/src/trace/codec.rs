//! A trace as bytes: a header of fixed fields, the command, the blobs, then entries of some three to six bytes.
//!
//! An entry says only what is new: its blob and confidence if they are not those of the entry before, its place as the
//! distance from the end of the last entry of that blob. `FORMAT.md` has the tables. Every trace has one form.

use super::{
    COMMAND_ARGS_MAX, COMMAND_BYTES_MAX, ENTRY_BLOCKS_MAX, GAP_US_MAX, PART, TRACE_BYTES_MAX, TRACE_ENTRIES_MAX, Trace,
    TraceEntry, TraceHeader, varint,
};
use crate::cursor::Cursor;
use crate::{Error, MAX_DEVICES, Result, Sha256};

const MAGIC: [u8; 4] = *b"UBTR";
const VERSION: u16 = 1;

/// Flag of a header: the time of readiness is known.
const READY: u16 = 1;

/// Flags of an entry, below its number of blocks - 1.
const OTHER_BLOB: u16 = 1;
const OTHER_CONFIDENCE: u16 = 2;

/// Least bytes of an entry: flags, distance, time.
const ENTRY_BYTES_MIN: usize = 3;

/// See [`Trace::encode`].
pub(super) fn encode(trace: &Trace) -> Result<Vec<u8>> {
    if trace.entries.len() > TRACE_ENTRIES_MAX {
        return Err(Error::too_large(PART, format!("{} entries", trace.entries.len())));
    }
    trace.check(|fault| Error::invalid(PART, fault))?;
    let mut out = Vec::with_capacity(4096 + trace.entries.len() * 6);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    put_header(&mut out, &trace.header);
    out.extend_from_slice(&u32::try_from(trace.entries.len()).unwrap_or(u32::MAX).to_le_bytes());
    let mut state = EntryState::new(trace.header.blobs.len());
    for entry in &trace.entries {
        state.put(&mut out, entry);
    }
    Ok(out)
}

/// See [`Trace::decode`].
pub(super) fn decode(bytes: &[u8]) -> Result<Trace> {
    if bytes.len() > TRACE_BYTES_MAX {
        return Err(Error::corrupt(PART, format!("{} bytes, at most {TRACE_BYTES_MAX}", bytes.len())));
    }
    let mut cursor = Cursor::new(PART, bytes);
    if cursor.array()? != MAGIC {
        return Err(Error::corrupt(PART, "wrong magic number"));
    }
    let version = cursor.u16()?;
    if version != VERSION {
        return Err(Error::unsupported(PART, format!("version {version}")));
    }
    let header = get_header(&mut cursor)?;
    let at = cursor.position();
    let count = cursor.u32()? as usize;
    if count > TRACE_ENTRIES_MAX || count > cursor.remaining() / ENTRY_BYTES_MIN {
        let detail = format!("{count} entries in {} bytes, at most {TRACE_ENTRIES_MAX}", cursor.remaining());
        return Err(Error::corrupt(PART, detail).at(at));
    }
    let mut state = EntryState::new(header.blobs.len());
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(state.get(&mut cursor)?);
    }
    cursor.end()?;
    let trace = Trace { header, entries };
    trace.check(|fault| Error::corrupt(PART, fault))?;
    Ok(trace)
}

/// Appends a header. It must be a good one.
pub(super) fn put_header(out: &mut Vec<u8>, header: &TraceHeader) {
    let flags = if header.ready_us.is_some() { READY } else { 0 };
    out.extend_from_slice(&flags.to_le_bytes());
    out.extend_from_slice(&header.manifest.0);
    out.extend_from_slice(&header.read_ahead_kb.to_le_bytes());
    out.extend_from_slice(&header.runs.to_le_bytes());
    out.extend_from_slice(&header.ready_us.unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&header.lost.to_le_bytes());
    // A good header has at most 4096 arguments of 128 KiB and 1000 blobs.
    for len in [header.command.len(), header.blobs.len()] {
        out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
    }
    for argument in &header.command {
        out.extend_from_slice(&u32::try_from(argument.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(argument.as_bytes());
    }
    for blob in &header.blobs {
        out.extend_from_slice(&blob.0);
    }
}

/// Reads a header. Its counts are within their bounds; the rest is for [`TraceHeader::fault`].
pub(super) fn get_header(cursor: &mut Cursor<'_>) -> Result<TraceHeader> {
    let at = cursor.position();
    let fault = |detail: String| Error::corrupt(PART, detail).at(at);
    let flags = cursor.u16()?;
    if flags & !READY != 0 {
        return Err(Error::unsupported(PART, format!("flags {flags:#x}")).at(at));
    }
    let manifest = Sha256(cursor.array()?);
    let [read_ahead_kb, runs] = [cursor.u32()?, cursor.u32()?];
    let [ready_us, lost] = [cursor.u64()?, cursor.u64()?];
    let ready_us = match flags & READY {
        0 if ready_us != 0 => return Err(fault(format!("not ready after {ready_us} us"))),
        0 => None,
        _ => Some(ready_us),
    };
    let [arguments, blob_count] = [usize::from(cursor.u16()?), usize::from(cursor.u16()?)];
    if arguments > COMMAND_ARGS_MAX || blob_count > MAX_DEVICES {
        return Err(fault(format!("command of {arguments} arguments, {blob_count} blobs")));
    }
    // Counts are not trusted with an allocation: lists grow as their elements are found in the bytes.
    let mut command = Vec::new();
    for _ in 0..arguments {
        let len = cursor.u32()? as usize;
        if len > COMMAND_BYTES_MAX {
            return Err(fault(format!("argument of {len} bytes")));
        }
        let argument = std::str::from_utf8(cursor.bytes(len)?);
        command.push(argument.map_err(|_| fault("an argument of the command is not UTF-8".to_owned()))?.to_owned());
    }
    let mut blobs = Vec::new();
    for _ in 0..blob_count {
        blobs.push(Sha256(cursor.array()?));
    }
    Ok(TraceHeader { manifest, command, read_ahead_kb, runs, ready_us, lost, blobs })
}

/// What an entry is written and read relative to.
pub(super) struct EntryState {
    blob: u16,
    confidence: u8,
    /// End of the last entry of each blob, in blocks.
    ends: Vec<u32>,
}

impl EntryState {
    /// Before the first entry of a trace with that many blobs.
    pub(super) fn new(blobs: usize) -> Self {
        Self { blob: 0, confidence: u8::MAX, ends: vec![0; blobs] }
    }

    /// Appends an entry. It must be a good one.
    pub(super) fn put(&mut self, out: &mut Vec<u8>, entry: &TraceEntry) {
        let other_blob = if entry.blob == self.blob { 0 } else { OTHER_BLOB };
        let other_confidence = if entry.confidence == self.confidence { 0 } else { OTHER_CONFIDENCE };
        varint::put(out, u64::from((entry.blocks - 1) << 2 | other_confidence | other_blob));
        if other_blob != 0 {
            varint::put(out, u64::from(entry.blob));
        }
        let end = &mut self.ends[usize::from(entry.blob)];
        varint::put(out, varint::zigzag(i64::from(entry.block) - i64::from(*end)));
        varint::put(out, entry.since_previous_us);
        if other_confidence != 0 {
            out.push(entry.confidence);
        }
        (self.blob, self.confidence) = (entry.blob, entry.confidence);
        *end = entry.block + u32::from(entry.blocks);
    }

    /// Reads an entry and refuses one that is out of bounds.
    pub(super) fn get(&mut self, cursor: &mut Cursor<'_>) -> Result<TraceEntry> {
        let at = cursor.position();
        let fault = |detail: String| Error::corrupt(PART, detail).at(at);
        let head = varint::get_u16(cursor, (ENTRY_BLOCKS_MAX - 1) << 2 | OTHER_CONFIDENCE | OTHER_BLOB)?;
        let blocks = (head >> 2) + 1;
        let blob = match head & OTHER_BLOB {
            0 => self.blob,
            _ => varint::get_u16(cursor, u16::MAX)?,
        };
        let blobs = self.ends.len();
        let Some(end) = self.ends.get_mut(usize::from(blob)) else {
            return Err(fault(format!("blob {blob} of {blobs}")));
        };
        let block = varint::unzigzag(varint::get(cursor, u64::MAX)?).checked_add(i64::from(*end));
        let block = block.and_then(|block| u32::try_from(block).ok());
        let block = block.ok_or_else(|| fault("a block out of every blob".to_owned()))?;
        let since_previous_us = varint::get(cursor, GAP_US_MAX)?;
        let confidence = match head & OTHER_CONFIDENCE {
            0 => self.confidence,
            _ => cursor.u8()?,
        };
        let entry = TraceEntry { blob, block, blocks, since_previous_us, confidence };
        let repeated = head & OTHER_BLOB != 0 && blob == self.blob
            || head & OTHER_CONFIDENCE != 0 && confidence == self.confidence;
        if let Some(detail) = entry.fault(blobs) {
            return Err(fault(detail));
        }
        if repeated {
            return Err(fault("an entry says again what the one before said".to_owned()));
        }
        (self.blob, self.confidence) = (blob, confidence);
        *end = block + u32::from(blocks);
        Ok(entry)
    }
}
