//! Requests of the transmission phase ("Request message", "Request types"), with compact or
//! extended headers.

use super::{FieldReader, Malformed, concat_fields, wire_flags, wire_number};

/// Magic number of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic number of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

wire_number! {
    /// Type of a request.
    Command(u16), "NBD_CMD_" {
        /// Read of a range.
        READ = 0,
        /// Write of the data that follows as payload.
        WRITE = 1,
        /// Disconnection, once every request has been answered.
        DISC = 2,
        /// Flush of completed writes to durable storage.
        FLUSH = 3,
        /// Discard of a range.
        TRIM = 4,
        /// Hint to prepare for reads of a range.
        CACHE = 5,
        /// Write of zeros, without a payload.
        WRITE_ZEROES = 6,
        /// Query for the extents of metadata contexts.
        BLOCK_STATUS = 7,
        /// Change of the export's size.
        RESIZE = 8,
    }
}

wire_flags! {
    /// Modifiers of a command ("Command flags").
    CommandFlags(u16) {
        /// Data must be durable before the reply.
        FUA = 0,
        /// Zeros must be allocated, not stored as a hole.
        NO_HOLE = 1,
        /// The reply must have at most one content chunk ("don't fragment").
        DF = 2,
        /// The reply must have at most one extent per context.
        REQ_ONE = 3,
        /// Zeros are to be written only if that is faster than writing data.
        FAST_ZERO = 4,
        /// The length is that of a payload, not of a range of the export.
        PAYLOAD_LEN = 5,
    }
}

/// The client's identifier of a request, returned verbatim in the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cookie(pub u64);

/// A decoded request, not validated yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Modifiers of the command.
    pub flags: CommandFlags,
    /// Type of the request.
    pub command: Command,
    /// The client's identifier of the request.
    pub cookie: Cookie,
    /// Start of the range, in bytes from the start of the export.
    pub offset: u64,
    /// Length in bytes, of a range of the export or of a payload that follows. Fits in 32 bits in a
    /// compact request.
    pub length: u64,
}

impl Request {
    /// Size of a compact request on the wire, in bytes, without payload.
    pub const SIZE: usize = 28;
    /// Size of an extended request on the wire, in bytes, without payload.
    pub const EXTENDED_SIZE: usize = 32;

    /// Encodes a compact request, as a client sends it.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let length = u32::try_from(self.length).unwrap_or(u32::MAX);
        concat_fields(&[
            &REQUEST_MAGIC.to_be_bytes(),
            &self.flags.0.to_be_bytes(),
            &self.command.0.to_be_bytes(),
            &self.cookie.0.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &length.to_be_bytes(),
        ])
    }

    /// Encodes an extended request, as a client sends it.
    pub fn encode_extended(&self) -> [u8; Self::EXTENDED_SIZE] {
        concat_fields(&[
            &EXTENDED_REQUEST_MAGIC.to_be_bytes(),
            &self.flags.0.to_be_bytes(),
            &self.command.0.to_be_bytes(),
            &self.cookie.0.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &self.length.to_be_bytes(),
        ])
    }

    /// Decodes a compact request.
    ///
    /// # Errors
    /// The magic number is wrong. Message framing has then been lost, and nothing that follows can
    /// be trusted.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        Self::decode_fields(bytes, REQUEST_MAGIC, |reader| reader.u32("a length").map(u64::from))
    }

    /// Decodes an extended request.
    ///
    /// # Errors
    /// As for [`Request::decode`].
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_SIZE]) -> Result<Self, Malformed> {
        Self::decode_fields(bytes, EXTENDED_REQUEST_MAGIC, |reader| reader.u64("a length"))
    }

    fn decode_fields(
        bytes: &[u8],
        expected: u32,
        length: impl FnOnce(&mut FieldReader<'_>) -> Result<u64, Malformed>,
    ) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(bytes);
        let magic = reader.u32("a request's magic")?;
        if magic != expected {
            return Err(Malformed::BadMagic { what: "a request", got: magic.into() });
        }
        let request = Self {
            flags: CommandFlags(reader.u16("a request's flags")?),
            command: Command(reader.u16("a request's command")?),
            cookie: Cookie(reader.u64("a request's cookie")?),
            offset: reader.u64("a request's offset")?,
            length: length(&mut reader)?,
        };
        reader.finish()?;
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_round_trip() {
        let request = Request {
            flags: CommandFlags::DF,
            command: Command::READ,
            cookie: Cookie(0x0102_0304_0506_0708),
            offset: 0x1000,
            length: 512,
        };
        let bytes = b"\x25\x60\x95\x13\0\x04\0\0\x01\x02\x03\x04\x05\x06\x07\x08\
                      \0\0\0\0\0\0\x10\0\0\0\x02\0";
        assert_eq!(&request.encode(), bytes);
        assert_eq!(Request::decode(bytes), Ok(request));
    }

    #[test]
    fn extended_request_round_trip() {
        let bytes = b"\x21\xe4\x1c\x71\0\x20\0\x07\0\0\0\0\0\0\0\x09\
                      \0\0\0\0\0\0\x10\0\x01\0\0\0\0\0\0\0";
        let request = Request {
            flags: CommandFlags::PAYLOAD_LEN,
            command: Command::BLOCK_STATUS,
            cookie: Cookie(9),
            offset: 0x1000,
            length: 1 << 56,
        };
        assert_eq!(Request::decode_extended(bytes), Ok(request));
        assert_eq!(&request.encode_extended(), bytes);
        assert!(Request::decode_extended(&[0; 32]).is_err());
    }

    #[test]
    fn wrong_magic_is_rejected_and_unknown_command_is_not() {
        let mut bytes = [0; Request::SIZE];
        assert!(Request::decode(&bytes).is_err());
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[7] = 99;
        assert_eq!(Request::decode(&bytes).unwrap().command, Command(99));
    }
}
