//! Encoding and decoding of the messages of the NBD protocol.
//!
//! There is one module per family of messages, in the order in which they are exchanged:
//! [`handshake`], [`option`], [`info`], [`meta`], [`request`], [`reply`]. Nothing here does I/O,
//! waits, or logs. All integers are big-endian ("Conventions").
//!
//! Numbers that a peer chooses are represented by open types: an unknown value is kept, can be
//! printed, and is answered. It is never a parse error.

pub mod handshake;
pub mod info;
pub mod meta;
pub mod option;
pub mod reply;
pub mod request;

use std::fmt::{self, Write as _};

/// Maximum length of a string, in bytes ("Conventions").
pub const MAX_STRING: usize = MAX_NAME as usize;

/// [`MAX_STRING`] in the type of a length field.
pub const MAX_NAME: u32 = 4096;

/// Maximum length of a READ, and of a WRITE payload that is drained in order to refuse it properly,
/// in bytes ("Size constraints").
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;

/// Error for a message that violates its own framing: it is too short, too long, or out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A field extends past the end of the message; its name is given.
    #[error("the message ends within {0}")]
    Truncated(&'static str),
    /// Bytes are left over after the last field; their number is given.
    #[error("{0} unexpected bytes after the last field")]
    TrailingBytes(usize),
    /// A magic number is wrong, so message framing has been lost.
    #[error("{what} has the wrong magic number {got:#x}")]
    BadMagic {
        /// The message that was expected.
        what: &'static str,
        /// The number that was received.
        got: u64,
    },
    /// A string is longer than [`MAX_STRING`]; its length in bytes is given.
    #[error("string of {0} bytes exceeds the limit of {MAX_STRING} bytes")]
    StringTooLong(usize),
    /// A query for metadata contexts has no namespace.
    #[error("query without a colon after its namespace")]
    NoNamespace,
}

/// Reader of fields from a complete message.
///
/// Every read is checked against the end of the message, and [`FieldReader::finish`] rejects
/// leftover bytes. In the methods, `field` is the field's name for error messages.
#[derive(Debug)]
pub(crate) struct FieldReader<'a> {
    rest: &'a [u8],
}

impl<'a> FieldReader<'a> {
    /// Creates a reader that starts at the first byte of `message`.
    pub(crate) fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    /// Reads the next `length` bytes.
    ///
    /// # Errors
    /// Fewer than `length` bytes are left.
    pub(crate) fn bytes(
        &mut self,
        length: usize,
        field: &'static str,
    ) -> Result<&'a [u8], Malformed> {
        let (taken, rest) =
            self.rest.split_at_checked(length).ok_or(Malformed::Truncated(field))?;
        self.rest = rest;
        Ok(taken)
    }

    /// Reads the next `N` bytes as an array.
    ///
    /// # Errors
    /// Fewer than `N` bytes are left.
    pub(crate) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], Malformed> {
        let (taken, rest) =
            self.rest.split_first_chunk::<N>().ok_or(Malformed::Truncated(field))?;
        self.rest = rest;
        Ok(*taken)
    }

    /// Reads a 16-bit integer.
    ///
    /// # Errors
    /// Fewer than 2 bytes are left.
    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, Malformed> {
        self.array(field).map(u16::from_be_bytes)
    }

    /// Reads a 32-bit integer.
    ///
    /// # Errors
    /// Fewer than 4 bytes are left.
    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, Malformed> {
        self.array(field).map(u32::from_be_bytes)
    }

    /// Reads a 64-bit integer.
    ///
    /// # Errors
    /// Fewer than 8 bytes are left.
    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, Malformed> {
        self.array(field).map(u64::from_be_bytes)
    }

    /// Reads a string with a 32-bit length prefix, at most [`MAX_STRING`] bytes long.
    ///
    /// The bytes are not checked to be UTF-8: names are compared whole, as bytes.
    ///
    /// # Errors
    /// The string extends past the end of the message, or is too long.
    pub(crate) fn string(&mut self, field: &'static str) -> Result<&'a [u8], Malformed> {
        let length = self.u32(field)? as usize;
        let string = self.bytes(length, field)?;
        if length > MAX_STRING {
            return Err(Malformed::StringTooLong(length));
        }
        Ok(string)
    }

    /// Returns the bytes that have not been read yet.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Checks that the whole message has been read.
    ///
    /// # Errors
    /// Bytes are left over.
    pub(crate) fn finish(self) -> Result<(), Malformed> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(Malformed::TrailingBytes(left)),
        }
    }
}

/// Concatenates fields into a message of fixed size.
///
/// The fields' sizes must add up to `N`; each message type has a test against golden bytes for
/// that.
fn concat_fields<const N: usize>(fields: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    let mut rest = out.as_mut_slice();
    for field in fields {
        let Some((to, behind)) = rest.split_at_mut_checked(field.len()) else { break };
        to.copy_from_slice(field);
        rest = behind;
    }
    out
}

/// Truncates `text` to at most [`MAX_STRING`] bytes, at a character boundary.
pub(crate) fn truncate_string(text: &str) -> &str {
    let end = text.floor_char_boundary(MAX_STRING);
    text.get(..end).unwrap_or_default()
}

/// Declares a number of the protocol as an open type with named values.
macro_rules! wire_number {
    (
        $(#[$doc:meta])*
        $name:ident($repr:ty), $prefix:literal {
            $( $(#[$value_doc:meta])* $value_name:ident = $value:expr, )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub $repr);

        impl $name {
            $( $(#[$value_doc])* pub const $value_name: Self = Self($value); )*
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match *self {
                    $( Self::$value_name => f.write_str(concat!($prefix, stringify!($value_name))), )*
                    Self(other) => write!(f, concat!($prefix, "{:#x}"), other),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Debug::fmt(self, f)
            }
        }
    };
}
pub(crate) use wire_number;

/// Declares a bit field of the protocol; unknown bits are kept.
macro_rules! wire_flags {
    (
        $(#[$doc:meta])*
        $name:ident($repr:ty) {
            $( $(#[$flag_doc:meta])* $flag:ident = $bit:expr, )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name(pub $repr);

        impl $name {
            $( $(#[$flag_doc])* pub const $flag: Self = Self(1 << $bit); )*

            /// Returns true if all bits of `flags` are set.
            pub const fn contains(self, flags: Self) -> bool {
                self.0 & flags.0 == flags.0
            }

            /// Returns the union of these flags and `other`.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// Returns the bits that are set here and not in `known`.
            #[must_use]
            pub const fn without(self, known: Self) -> Self {
                Self(self.0 & !known.0)
            }

            /// Returns true if no bit is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }
    };
}
pub(crate) use wire_flags;

/// Wrapper that displays bytes chosen by a peer, escaped so that they cannot corrupt a log or a
/// terminal, and shortened.
///
/// Embedders may log it as it is. The package nbd-telemetry escapes more than this, such as invisible
/// characters, but the engine depends on no other package of this workspace.
#[derive(Clone, Copy)]
pub struct Printable<'a>(pub &'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Number of bytes shown: enough to recognize a name. Longer ones would flood the log.
        const SHOWN: usize = 128;
        let shown = self.0.get(..SHOWN).unwrap_or(self.0);
        f.write_char('"')?;
        for chunk in shown.utf8_chunks() {
            chunk.valid().escape_debug().fmt(f)?;
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        f.write_char('"')?;
        if self.0.len() > SHOWN {
            write!(f, "… ({} bytes)", self.0.len())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reader_stops_at_the_end_and_rejects_leftover_bytes() {
        let mut reader = FieldReader::new(&[0, 1, 2, 3, 4]);
        assert_eq!(reader.u16("a"), Ok(1));
        assert_eq!(reader.u32("b"), Err(Malformed::Truncated("b")));
        assert_eq!(reader.finish(), Err(Malformed::TrailingBytes(3)));
    }

    #[test]
    fn string_lengths_are_validated() {
        let huge = [0xff, 0xff, 0xff, 0xff, b'x'];
        assert_eq!(FieldReader::new(&huge).string("name"), Err(Malformed::Truncated("name")));

        let mut longest = 4096u32.to_be_bytes().to_vec();
        longest.extend([b'x'; 4096]);
        assert_eq!(FieldReader::new(&longest).string("name").unwrap().len(), 4096);

        let mut too_long = 4097u32.to_be_bytes().to_vec();
        too_long.extend([b'x'; 4097]);
        assert_eq!(FieldReader::new(&too_long).string("name"), Err(Malformed::StringTooLong(4097)));
    }

    #[test]
    fn truncation_keeps_characters_whole() {
        let text = "é".repeat(3000);
        let clipped = truncate_string(&text);
        assert!(clipped.len() <= MAX_STRING);
        assert!(text.starts_with(clipped));
        assert_eq!(truncate_string("short"), "short");
    }

    #[test]
    fn printable_escapes_and_truncates() {
        assert_eq!(Printable(b"a\n\x1b[31m\0").to_string(), r#""a\n\u{1b}[31m\0""#);
        assert!(Printable(&[b'x'; 4096]).to_string().len() < 200);
    }
}
