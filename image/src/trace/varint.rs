//! Variable-length numbers: 7 bits to a byte, the lowest first, the top bit set on all but the last byte. Each number
//! has one form: the shortest.

use super::PART;
use crate::cursor::Cursor;
use crate::{Error, Result};

/// Appends a number.
pub(super) fn put(out: &mut Vec<u8>, mut number: u64) {
    loop {
        let [low, ..] = number.to_le_bytes();
        number >>= 7;
        if number == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

/// Reads a number of at most `max`.
pub(super) fn get(cursor: &mut Cursor<'_>, max: u64) -> Result<u64> {
    let at = cursor.position();
    let fault = |detail: &str| Error::corrupt(PART, detail).at(at);
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = cursor.u8()?;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return Err(fault("a number has more than 64 bits"));
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return match byte {
                0 if shift > 0 => Err(fault("a number is not in its shortest form")),
                _ if number > max => Err(fault(&format!("{number} where at most {max} can be"))),
                _ => Ok(number),
            };
        }
    }
    Err(fault("a number has more than 64 bits"))
}

/// Reads a number of at most `max`.
pub(super) fn get_u16(cursor: &mut Cursor<'_>, max: u16) -> Result<u16> {
    get(cursor, u64::from(max)).map(|number| u16::try_from(number).unwrap_or(max))
}

/// A signed number as an unsigned one that is small when it is near 0.
pub(super) fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63).cast_unsigned()
}

/// What [`zigzag`] was made of.
pub(super) fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn reads_back(number in prop_oneof![any::<u64>(), 0..300u64, any::<u32>().prop_map(u64::from)]) {
            let mut out = Vec::new();
            put(&mut out, number);
            let mut cursor = Cursor::new(PART, &out);
            prop_assert_eq!(get(&mut cursor, number), Ok(number));
            prop_assert!(cursor.end().is_ok());
            if let Some(less) = number.checked_sub(1) {
                prop_assert!(get(&mut Cursor::new(PART, &out), less).is_err());
            }
            prop_assert_eq!(unzigzag(zigzag(number.cast_signed())), number.cast_signed());
        }

        /// Whatever is read has one form.
        #[test]
        fn one_form(bytes in prop::collection::vec(prop_oneof![Just(0x80), Just(0), Just(0xff), any::<u8>()], 1..12)) {
            let mut cursor = Cursor::new(PART, &bytes);
            if let Ok(number) = get(&mut cursor, u64::MAX) {
                let mut out = Vec::new();
                put(&mut out, number);
                prop_assert_eq!(&out[..], &bytes[..usize::try_from(cursor.position()).unwrap()]);
            }
        }
    }

    #[test]
    fn small_numbers_of_either_sign_are_short() {
        assert_eq!([0, -1, 1, -2, 2].map(zigzag), [0, 1, 2, 3, 4]);
    }
}
