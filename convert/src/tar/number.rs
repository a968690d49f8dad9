//! Numbers in tar headers: octal text, or base-256 when the top bit of the field is set (GNU).

/// Reads a numeric field; spaces and NULs around the digits are padding, an empty field is zero.
///
/// Returns `None` for anything that is not one number of at most 63 bits and a sign: readers differ in what they make
/// of such fields, and a reader that guesses reads another archive than its neighbour.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base256(field),
        _ => octal(field),
    }
}

/// The same for fields that must not be negative.
pub(super) fn unsigned(field: &[u8]) -> Option<u64> {
    number(field).and_then(|value| u64::try_from(value).ok())
}

fn octal(field: &[u8]) -> Option<i64> {
    let is_padding = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !is_padding(byte)).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(is_padding).unwrap_or(digits.len());
    let mut value: i64 = 0;
    for digit in &digits[..end] {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value = value.checked_mul(8)?.checked_add(i64::from(digit))?;
    }
    Some(value)
}

/// Big-endian two's complement with the top bit taken as the marker, so bit 6 of the first byte is the sign.
fn base256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let first = if negative { field[0] } else { field[0] & 0x7f };
    let mut value: i128 = i128::from(first.cast_signed());
    for byte in &field[1..] {
        value = value.checked_mul(256)?.checked_add(i128::from(*byte))?;
    }
    i64::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_with_all_kinds_of_padding() {
        for (field, want) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"12 garba", Some(0o12)),
            (b"0000648\0", None),
            (b"-000001\0", None),
            (b"777777777777777777777777", None),
        ] {
            assert_eq!(number(field), want, "{:?}", String::from_utf8_lossy(field));
        }
    }

    #[test]
    fn base256_fields_with_signs_and_overflow() {
        let mut big = [0_u8; 12];
        big[0] = 0x80;
        big[7] = 1;
        assert_eq!(number(&big), Some(1 << 32));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        let mut minus_300 = [0xff_u8; 12];
        minus_300[10..].copy_from_slice(&[0xfe, 0xd4]);
        assert_eq!(number(&minus_300), Some(-300));
        assert_eq!(unsigned(&minus_300), None);
        let mut too_big = [0_u8; 12];
        too_big[0] = 0x80;
        too_big[3] = 1;
        assert_eq!(number(&too_big), None);
    }
}
