//! Extended attributes of an inode: a header and entries, right after the inode.

use std::collections::BTreeMap;

use super::format::{PART, XATTR_ALIGN, XATTR_ENTRY_BYTES, XATTR_HEADER_BYTES};
use crate::cursor::Cursor;
use crate::{Error, ErrorKind, Result};

/// Most bytes of xattrs of one inode, header and padding included: what Linux allows for a single list of names or a
/// single value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
pub(super) const MAX_XATTR_BYTES: usize = 64 * 1024;

/// Longest full name (`XATTR_NAME_MAX`).
const MAX_NAME_BYTES: usize = 255;

/// Name prefixes that have a number on disk; the rest of the name is stored. The ACL ones are whole names.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

fn is_whole_name(prefix: &[u8]) -> bool {
    !prefix.ends_with(b".")
}

/// Prefix number and rest of a name.
fn split(name: &[u8]) -> Result<(u8, &[u8]), String> {
    let shown = name.escape_ascii();
    if name.len() > MAX_NAME_BYTES || name.contains(&0) {
        return Err(format!("xattr name \"{shown}\" is longer than {MAX_NAME_BYTES} bytes or contains NUL"));
    }
    PREFIXES
        .iter()
        .find_map(|(prefix, number)| Some((*number, name.strip_prefix(*prefix)?, is_whole_name(prefix))))
        .filter(|(_, rest, whole)| rest.is_empty() == *whole)
        .map(|(number, rest, _)| (number, rest))
        .ok_or_else(|| format!("xattr \"{shown}\" has no prefix that EROFS knows"))
}

/// Bytes that the xattrs take, or why they cannot be stored.
pub(super) fn len_bytes(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<usize, (ErrorKind, String)> {
    if xattrs.is_empty() {
        return Ok(0); // A header without entries is not allowed.
    }
    let mut len = XATTR_HEADER_BYTES;
    for (name, value) in xattrs {
        let (_, rest) = split(name).map_err(|detail| (ErrorKind::Invalid, detail))?;
        len += (XATTR_ENTRY_BYTES + rest.len() + value.len()).next_multiple_of(XATTR_ALIGN);
    }
    match len {
        ..=MAX_XATTR_BYTES => Ok(len),
        _ => Err((ErrorKind::TooLarge, format!("{len} bytes of xattrs, at most {MAX_XATTR_BYTES}"))),
    }
}

/// Appends the xattrs.
pub(super) fn encode(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>, out: &mut Vec<u8>) -> Result<(), String> {
    if xattrs.is_empty() {
        return Ok(());
    }
    let start = out.len();
    out.extend_from_slice(&[0; XATTR_HEADER_BYTES]);
    for (name, value) in xattrs {
        let (prefix, rest) = split(name)?;
        let too_long = |_| format!("xattr \"{}\" is too long", name.escape_ascii());
        out.push(u8::try_from(rest.len()).map_err(too_long)?);
        out.push(prefix);
        out.extend_from_slice(&u16::try_from(value.len()).map_err(too_long)?.to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(start + (out.len() - start).next_multiple_of(XATTR_ALIGN), 0);
    }
    Ok(())
}

/// Reads the xattrs of an inode: all bytes after it that its count field claims.
pub(super) fn decode(bytes: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    if bytes.is_empty() {
        return Ok(xattrs);
    }
    if bytes.len() > MAX_XATTR_BYTES {
        return Err(Error::unsupported(PART, format!("{} bytes of xattrs of one inode", bytes.len())));
    }
    let mut cursor = Cursor::new(PART, bytes);
    cursor.bytes(4)?; // Name filter: a hint for lookups.
    if cursor.u8()? != 0 {
        return Err(Error::unsupported(PART, "shared xattrs"));
    }
    cursor.zeros(XATTR_HEADER_BYTES - 5)?;
    if cursor.remaining() == 0 {
        return Err(Error::corrupt(PART, "xattr header without entries"));
    }
    while cursor.remaining() > 0 {
        let (name_len, prefix_number, value_len) = (cursor.u8()?, cursor.u8()?, cursor.u16()?);
        let prefix = PREFIXES.iter().find(|(_, number)| *number == prefix_number);
        let (prefix, _) = prefix.ok_or_else(|| Error::unsupported(PART, format!("xattr prefix {prefix_number}")))?;
        let name = [prefix, cursor.bytes(usize::from(name_len))?].concat();
        let value = cursor.bytes(usize::from(value_len))?;
        let used = XATTR_ENTRY_BYTES + usize::from(name_len) + value.len();
        cursor.bytes(used.next_multiple_of(XATTR_ALIGN) - used)?;
        split(&name).map_err(|fault| Error::corrupt(PART, fault))?;
        if let Some(_twice) = xattrs.insert(name, value.to_vec()) {
            return Err(Error::corrupt(PART, "two xattrs of one name"));
        }
    }
    Ok(xattrs)
}
