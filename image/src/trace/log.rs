//! A trace while it is recorded: a file that is only appended to.
//!
//! The log is a sequence of records, each with its length and a CRC-32C. A record is the header (the first one), a batch
//! of entries, or the end. Whatever a crash leaves behind its last whole record (part of a record, zeros) is not taken;
//! all before it is. A batch does not refer to the one before it.

use super::codec::{self, EntryState};
use super::{READY_US_MAX, TRACE_ENTRIES_MAX, Trace, TraceEntry, TraceHeader, coalesce};
use crate::cursor::Cursor;
use crate::{Error, Result};

const PART: &str = "trace log";
const MAGIC: [u8; 4] = *b"UBTL";
const VERSION: u16 = 1;

const ENTRIES: u8 = 1;
const END: u8 = 2;

/// Most entries of one batch: what a crash can cost. 16 bytes each at most.
pub const LOG_BATCH_ENTRIES_MAX: usize = 4096;

/// Longest record: a header with the longest command and all blobs.
const RECORD_BYTES_MAX: usize = 256 << 10;

/// Bytes before the payload of a record: length and checksum.
const RECORD_HEADER_BYTES: usize = 8;

/// What a log holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceLog {
    /// As it was when recording began.
    pub header: TraceHeader,
    /// First reads in order, as they were appended. At most [`TRACE_ENTRIES_MAX`].
    pub entries: Vec<TraceEntry>,
    /// How recording ended; `None` if it goes on or was cut off.
    pub end: Option<LogEnd>,
    /// Length of the records that are whole, in bytes. What follows may be cut off and overwritten.
    pub whole_len_bytes: u64,
}

/// The end of a recording.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogEnd {
    /// Time from the start of the clock to readiness, if it was seen.
    pub ready_us: Option<u64>,
    /// First reads that were dropped for want of room.
    pub lost: u64,
}

impl TraceLog {
    /// The start of a log.
    ///
    /// # Errors
    /// `Invalid` if the header is out of its bounds.
    pub fn begin(header: &TraceHeader) -> Result<Vec<u8>> {
        if let Some(fault) = header.fault() {
            return Err(Error::invalid(PART, fault));
        }
        let mut payload = Vec::new();
        payload.extend_from_slice(&MAGIC);
        payload.extend_from_slice(&VERSION.to_le_bytes());
        codec::put_header(&mut payload, header);
        Ok(record(&payload))
    }

    /// Entries to append to a log with that header, in as many records as they need. Blocks may have been in an entry
    /// before.
    ///
    /// # Errors
    /// `Invalid` if an entry is out of its bounds.
    pub fn append(header: &TraceHeader, entries: &[TraceEntry]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for batch in entries.chunks(LOG_BATCH_ENTRIES_MAX) {
            let mut payload = vec![ENTRIES];
            let mut state = EntryState::new(header.blobs.len());
            for entry in batch {
                if let Some(fault) = entry.fault(header.blobs.len()) {
                    return Err(Error::invalid(PART, fault));
                }
                state.put(&mut payload, entry);
            }
            out.extend(record(&payload));
        }
        Ok(out)
    }

    /// The end to append to a log. The last one counts.
    ///
    /// # Errors
    /// `Invalid` if the time of readiness is out of its bounds.
    pub fn finish(end: LogEnd) -> Result<Vec<u8>> {
        if let Some(ready_us) = end.ready_us.filter(|ready_us| *ready_us > READY_US_MAX) {
            return Err(Error::invalid(PART, format!("ready after {ready_us} us")));
        }
        let mut payload = vec![END, u8::from(end.ready_us.is_some())];
        payload.extend_from_slice(&end.ready_us.unwrap_or(0).to_le_bytes());
        payload.extend_from_slice(&end.lost.to_le_bytes());
        Ok(record(&payload))
    }

    /// Reads a log as far as it is whole.
    ///
    /// # Errors
    /// `Corrupt` if not even its header is whole, or if a whole record makes no sense; `Unsupported` if the log is of
    /// another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut records = Records { bytes, at: 0 };
        let Some(payload) = records.next() else {
            return Err(Error::corrupt(PART, "no whole header"));
        };
        let mut log = Self { header: decode_header(payload)?, entries: Vec::new(), end: None, whole_len_bytes: 0 };
        log.whole_len_bytes = records.at as u64;
        while let Some(payload) = records.next() {
            log.take(payload).map_err(|error| error.at(log.whole_len_bytes))?;
            log.whole_len_bytes = records.at as u64;
        }
        Ok(log)
    }

    /// The trace: no block twice, neighbours together, with what the end says. What does not fit is counted as lost.
    ///
    /// # Errors
    /// None for a log that was decoded: its parts are within their bounds.
    pub fn into_trace(self) -> Result<Trace> {
        let mut header = self.header;
        if let Some(end) = self.end {
            header.ready_us = end.ready_us;
            header.lost = header.lost.saturating_add(end.lost);
        }
        let mut entries = coalesce(self.entries);
        if let Some(dropped) = entries.len().checked_sub(TRACE_ENTRIES_MAX) {
            entries.truncate(TRACE_ENTRIES_MAX);
            header.lost = header.lost.saturating_add(dropped as u64);
        }
        let trace = Trace { header, entries };
        trace.check(|fault| Error::invalid(PART, fault))?;
        Ok(trace)
    }

    fn take(&mut self, payload: &[u8]) -> Result<()> {
        let mut cursor = Cursor::new(PART, payload);
        match cursor.u8()? {
            ENTRIES => {
                let mut state = EntryState::new(self.header.blobs.len());
                while cursor.remaining() > 0 {
                    if self.entries.len() == TRACE_ENTRIES_MAX {
                        return Err(Error::corrupt(PART, format!("more than {TRACE_ENTRIES_MAX} entries")));
                    }
                    self.entries.push(state.get(&mut cursor)?);
                }
            }
            END => {
                let is_ready = cursor.u8()? != 0;
                let [ready_us, lost] = [cursor.u64()?, cursor.u64()?];
                if ready_us > READY_US_MAX {
                    return Err(Error::corrupt(PART, format!("ready after {ready_us} us")));
                }
                self.end = Some(LogEnd { ready_us: is_ready.then_some(ready_us), lost });
            }
            kind => return Err(Error::unsupported(PART, format!("record of kind {kind}"))),
        }
        cursor.end()
    }
}

fn decode_header(payload: &[u8]) -> Result<TraceHeader> {
    let mut cursor = Cursor::new(PART, payload);
    if cursor.array()? != MAGIC {
        return Err(Error::corrupt(PART, "wrong magic number"));
    }
    let version = cursor.u16()?;
    if version != VERSION {
        return Err(Error::unsupported(PART, format!("version {version}")));
    }
    let header = codec::get_header(&mut cursor)?;
    cursor.end()?;
    match header.fault() {
        Some(fault) => Err(Error::corrupt(PART, fault)),
        None => Ok(header),
    }
}

/// A payload with its length and checksum before it.
fn record(payload: &[u8]) -> Vec<u8> {
    debug_assert!(payload.len() <= RECORD_BYTES_MAX);
    let mut out = Vec::with_capacity(RECORD_HEADER_BYTES + payload.len());
    out.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// The payloads of the records that are whole.
struct Records<'a> {
    bytes: &'a [u8],
    /// End of the last one.
    at: usize,
}

impl<'a> Iterator for Records<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let mut cursor = Cursor::new(PART, &self.bytes[self.at..]);
        let len = cursor.u32().ok()? as usize;
        let checksum = cursor.u32().ok()?;
        // No record is empty: zeros, which a crash may leave at the end of a file, are none.
        let payload = cursor.bytes(len).ok().filter(|_| (1..=RECORD_BYTES_MAX).contains(&len))?;
        if crc32c::crc32c(payload) != checksum {
            return None;
        }
        self.at += RECORD_HEADER_BYTES + len;
        Some(payload)
    }
}
