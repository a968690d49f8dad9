//! PAX extended header records: `LENGTH KEY=VALUE\n`, lengths in decimal, values as raw bytes.
//! Source: POSIX.1-2017, pax, "pax Extended Header"; GNU tar manual, "Storing Sparse Files".

use std::collections::BTreeMap;

use ublkimg_image::Time;

use super::Malformed;

/// The records in force for one entry: key to value. An empty value in a local header deletes a global one.
pub(super) type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// A region of a sparse file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
}

/// Reads the records of one extended header into `records`, later ones winning, and returns the sparse regions of
/// format 0.0, the one format that repeats keys.
pub(super) fn read(mut data: &[u8], records: &mut Records) -> Result<Vec<Region>, Malformed> {
    let mut regions = Vec::new();
    let mut offset_bytes = None;
    while !data.is_empty() {
        let (key, value, rest) = split_record(data).ok_or(Malformed("PAX record"))?;
        data = rest;
        match key {
            b"GNU.sparse.offset" => offset_bytes = Some(decimal(value).ok_or(Malformed("GNU.sparse.offset"))?),
            b"GNU.sparse.numbytes" => {
                let len_bytes = decimal(value).ok_or(Malformed("GNU.sparse.numbytes"))?;
                let offset_bytes = offset_bytes.take().ok_or(Malformed("GNU.sparse.numbytes"))?;
                regions.push(Region { offset_bytes, len_bytes });
            }
            _ => {
                records.insert(key.to_vec(), value.to_vec());
            }
        }
    }
    Ok(regions)
}

/// Splits the first record off: key, value, rest.
fn split_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(20).position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&data[..space])?).ok()?;
    let record = data.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then(|| (&record[..equals], &record[equals + 1..], &data[len..]))
}

/// A decimal number of digits only: no sign, no spaces.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A time in seconds with an optional sign and fraction, rounded down to the nanosecond.
pub(super) fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let point = text.iter().position(|byte| *byte == b'.').unwrap_or(text.len());
    let fraction = text.get(point + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(decimal(&text[..point])?).ok()?;
    let (kept, dropped) = fraction.split_at(fraction.len().min(9));
    let mut nanoseconds: u32 = 0;
    for position in 0..9 {
        nanoseconds = nanoseconds * 10 + u32::from(kept.get(position).map_or(0, |digit| digit - b'0'));
    }
    if !negative {
        return Some(Time { seconds, nanoseconds });
    }
    // Down means away from zero here: -0.1 s is one second before the epoch plus 0.9 s.
    if dropped.iter().any(|digit| *digit != b'0') {
        nanoseconds += 1;
    }
    match nanoseconds {
        0 => Some(Time { seconds: -seconds, nanoseconds: 0 }),
        _ => Some(Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds }),
    }
}

/// The extended attributes among the records, by name.
pub(super) fn xattrs(records: &Records) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Malformed> {
    let mut xattrs = BTreeMap::new();
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let name = percent_decode(name).ok_or(Malformed("LIBARCHIVE.xattr name"))?;
            let value = base64_decode(value).ok_or(Malformed("LIBARCHIVE.xattr value"))?;
            // SCHILY sorts after LIBARCHIVE and wins: its value needs no decoding.
            xattrs.insert(name, value);
        } else if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            xattrs.insert(name.to_vec(), value.clone());
        }
    }
    Ok(xattrs)
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%' {
            let hex = std::str::from_utf8(tail.get(..2)?).ok()?;
            decoded.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &tail[2..];
        } else {
            decoded.push(byte);
            rest = tail;
        }
    }
    Some(decoded)
}

/// Base64 with or without padding; libarchive writes none.
fn base64_decode(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let mut decoded = Vec::with_capacity(text.len() * 3 / 4);
    for group in text.chunks(4) {
        let mut bits: u32 = 0;
        for byte in group {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        bits <<= 6 * (4 - group.len());
        let bytes = bits.to_be_bytes();
        match group.len() {
            4 => decoded.extend_from_slice(&bytes[1..]),
            3 => decoded.extend_from_slice(&bytes[1..3]),
            2 => decoded.push(bytes[1]),
            _ => return None,
        }
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_with_newlines_nuls_and_equals_in_values() {
        let mut records = Records::new();
        let regions = read(b"24 SCHILY.xattr.a=x\n\0=y\n\n13 path=a/b\n", &mut records);
        assert!(regions.is_err(), "a wrong length must not be guessed around");
        let mut records = Records::new();
        read(b"24 SCHILY.xattr.a=x\n\0=y\n12 path=a/b\n", &mut records).unwrap();
        assert_eq!(records[&b"SCHILY.xattr.a"[..]], b"x\n\0=y");
        assert_eq!(records[&b"path"[..]], b"a/b");
    }

    #[test]
    fn malformed_records_are_errors() {
        for data in
            [&b"x path=a\n"[..], b"99 path=a\n", b"9 path=ab", b"7 patha\n", b"0 path=a\n", b" path=a\n", b"5 =a\n"]
        {
            assert!(read(data, &mut Records::new()).is_err(), "{:?}", String::from_utf8_lossy(data));
        }
    }

    #[test]
    fn sparse_regions_of_format_0_0() {
        let data = b"23 GNU.sparse.offset=0\n26 GNU.sparse.numbytes=10\n";
        let regions = read(data, &mut Records::new()).unwrap();
        assert_eq!(regions, [Region { offset_bytes: 0, len_bytes: 10 }]);
        assert!(read(b"26 GNU.sparse.numbytes=10\n", &mut Records::new()).is_err());
    }

    #[test]
    fn times_round_down() {
        for (text, seconds, nanoseconds) in [
            ("0", 0, 0),
            ("1350244992.023960108", 1_350_244_992, 23_960_108),
            ("1.5", 1, 500_000_000),
            ("1.0000000019", 1, 1),
            ("-1", -1, 0),
            ("-1.5", -2, 500_000_000),
            ("-0.1", -1, 900_000_000),
            ("-0.0000000001", -1, 999_999_999),
            ("-1.0", -1, 0),
            ("7.", 7, 0),
        ] {
            assert_eq!(time(text.as_bytes()), Some(Time { seconds, nanoseconds }), "{text}");
        }
        for text in ["", "-", ".5", "1.x", "1e3", "+1", " 1", "--1", "99999999999999999999"] {
            assert_eq!(time(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn libarchive_xattrs_are_decoded() {
        let records = Records::from([
            (b"LIBARCHIVE.xattr.user.%41b".to_vec(), b"aGVsbG8".to_vec()),
            (b"SCHILY.xattr.user.raw".to_vec(), b"\0\n".to_vec()),
        ]);
        let xattrs = xattrs(&records).unwrap();
        assert_eq!(xattrs[&b"user.Ab"[..]], b"hello");
        assert_eq!(xattrs[&b"user.raw"[..]], b"\0\n");
        assert_eq!(base64_decode(b"aGVsbG8="), Some(b"hello".to_vec()));
        assert_eq!(base64_decode(b"a"), None);
    }
}
