//! Reading little-endian fields one after another from bytes that may end too soon.

use crate::{Error, Result};

/// A place in a byte slice. Every read checks what is left, so a truncated input is an error, never a panic.
pub(crate) struct Cursor<'a> {
    part: &'static str,
    rest: &'a [u8],
    at: u64,
}

impl<'a> Cursor<'a> {
    /// `part` names the bytes in errors.
    pub(crate) fn new(part: &'static str, bytes: &'a [u8]) -> Self {
        Self { part, rest: bytes, at: 0 }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn position(&self) -> u64 {
        self.at
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        let Some((head, rest)) = self.rest.split_at_checked(len) else {
            let left = self.rest.len();
            return Err(Error::corrupt(self.part, format!("truncated: needs {len} bytes, has {left}")).at(self.at));
        };
        self.rest = rest;
        self.at += len as u64;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Reads bytes that must be zero.
    pub(crate) fn zeros(&mut self, len: usize) -> Result<()> {
        let at = self.at;
        if self.bytes(len)?.iter().any(|byte| *byte != 0) {
            return Err(Error::unsupported(self.part, "reserved bytes are not zero").at(at));
        }
        Ok(())
    }

    /// Ends the reading; bytes left over are an error.
    pub(crate) fn end(self) -> Result<()> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(Error::corrupt(self.part, format!("{left} bytes too many")).at(self.at)),
        }
    }
}
