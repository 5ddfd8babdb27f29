//! Parser of little-endian fixed-width fields, as bincode 1 writes them by default.

use super::error::ErrorKind;

/// Cursor over consecutive fields. Every read is checked against the end.
#[derive(Debug)]
pub(super) struct FieldReader<'a> {
    rest: &'a [u8],
}

impl<'a> FieldReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn bytes(&mut self, length: u64, what: &'static str) -> Result<&'a [u8], ErrorKind> {
        let (taken, rest) = usize::try_from(length)
            .ok()
            .and_then(|length| self.rest.split_at_checked(length))
            .ok_or(ErrorKind::Truncated(what))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], ErrorKind> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(ErrorKind::Truncated(what))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, ErrorKind> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, ErrorKind> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Reads one byte, which must be 0 or 1.
    pub(super) fn bool(&mut self, what: &'static str) -> Result<bool, ErrorKind> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [_] => Err(ErrorKind::Invalid(what)),
        }
    }

    /// Reads a flag byte, followed by the value if the flag is set.
    pub(super) fn option<T>(
        &mut self,
        what: &'static str,
        value: impl FnOnce(&mut Self) -> Result<T, ErrorKind>,
    ) -> Result<Option<T>, ErrorKind> {
        self.bool(what)?.then(|| value(self)).transpose()
    }

    /// Reads UTF-8 text preceded by its 64-bit length.
    pub(super) fn string(&mut self, what: &'static str) -> Result<String, ErrorKind> {
        let length = self.u64(what)?;
        let bytes = self.bytes(length, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| ErrorKind::Invalid(what))
    }

    /// Returns the number of bytes left.
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }
}
