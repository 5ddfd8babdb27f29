//! Replies of the transmission phase ("Simple reply message", "Structured reply chunk message",
//! "Error values").

use super::request::Cookie;
use super::{
    FieldReader, MAX_STRING, Malformed, concat_fields, truncate_string, wire_flags, wire_number,
};

/// Magic number of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

wire_number! {
    /// Error code of a failed request ("Error values").
    ErrorCode(u32), "NBD_E" {
        /// No error.
        OK = 0,
        /// Operation not permitted, such as a write to a read-only export.
        PERM = 1,
        /// Input/output error.
        IO = 5,
        /// Out of memory.
        NOMEM = 12,
        /// Invalid request.
        INVAL = 22,
        /// No space left.
        NOSPC = 28,
        /// Value too large, such as the length of a read.
        OVERFLOW = 75,
        /// Operation not supported.
        NOTSUP = 95,
        /// The server is shutting down.
        SHUTDOWN = 108,
    }
}

/// Header of a simple reply: 16 bytes, followed by the data of a successful READ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// Error code; [`ErrorCode::OK`] on success.
    pub error: ErrorCode,
    /// The request's cookie.
    pub cookie: Cookie,
}

impl SimpleReply {
    /// Size on the wire, in bytes, without data.
    pub const SIZE: usize = 16;

    /// Encodes the header.
    pub fn encode(self) -> [u8; Self::SIZE] {
        concat_fields(&[
            &SIMPLE_REPLY_MAGIC.to_be_bytes(),
            &self.error.0.to_be_bytes(),
            &self.cookie.0.to_be_bytes(),
        ])
    }

    /// Decodes the header.
    ///
    /// # Errors
    /// The magic number is wrong.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(bytes);
        let magic = reader.u32("a reply's magic")?;
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(Malformed::BadMagic { what: "a reply", got: magic.into() });
        }
        let reply = Self {
            error: ErrorCode(reader.u32("a reply's error")?),
            cookie: Cookie(reader.u64("a reply's cookie")?),
        };
        reader.finish()?;
        Ok(reply)
    }
}

/// Magic number of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

wire_flags! {
    /// Flags of a structured reply chunk ("Structured reply flags").
    ReplyFlags(u16) {
        /// This is the last chunk of the reply.
        DONE = 0,
    }
}

wire_number! {
    /// Type of a structured reply chunk's payload ("Structured reply types").
    ReplyType(u16), "NBD_REPLY_TYPE_" {
        /// No payload; the request succeeded unless an error chunk preceded.
        NONE = 0,
        /// An offset, followed by data.
        OFFSET_DATA = 1,
        /// Offset and length of a run of zeros.
        OFFSET_HOLE = 2,
        /// Extents of a metadata context, with 32-bit lengths.
        BLOCK_STATUS = 5,
        /// Extents of a metadata context, with 64-bit lengths.
        BLOCK_STATUS_EXT = 6,
        /// Error code and message.
        ERROR = 0x8001,
        /// Error code, message and offset.
        ERROR_OFFSET = 0x8002,
    }
}

/// Header of a structured reply chunk: 20 bytes, followed by `length` bytes of payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Flags; [`ReplyFlags::DONE`] marks the last chunk.
    pub flags: ReplyFlags,
    /// Type of the payload.
    pub kind: ReplyType,
    /// The request's cookie.
    pub cookie: Cookie,
    /// Number of bytes of payload that follow.
    pub length: u32,
}

impl ChunkHeader {
    /// Size on the wire, in bytes, without payload.
    pub const SIZE: usize = 20;

    /// Encodes the header.
    pub fn encode(self) -> [u8; Self::SIZE] {
        concat_fields(&[
            &STRUCTURED_REPLY_MAGIC.to_be_bytes(),
            &self.flags.0.to_be_bytes(),
            &self.kind.0.to_be_bytes(),
            &self.cookie.0.to_be_bytes(),
            &self.length.to_be_bytes(),
        ])
    }

    /// Decodes the header.
    ///
    /// # Errors
    /// The magic number is wrong.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(bytes);
        let magic = reader.u32("a chunk's magic")?;
        if magic != STRUCTURED_REPLY_MAGIC {
            return Err(Malformed::BadMagic { what: "a chunk", got: magic.into() });
        }
        let header = Self {
            flags: ReplyFlags(reader.u16("a chunk's flags")?),
            kind: ReplyType(reader.u16("a chunk's type")?),
            cookie: Cookie(reader.u64("a chunk's cookie")?),
            length: reader.u32("a chunk's length")?,
        };
        reader.finish()?;
        Ok(header)
    }
}

/// Magic number of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Header of an extended reply chunk: 32 bytes, followed by `length` bytes of payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedChunkHeader {
    /// Fields in common with a structured reply chunk.
    pub chunk: ChunkHeader,
    /// Offset of the request, regardless of any offset in the payload.
    pub offset: u64,
}

impl ExtendedChunkHeader {
    /// Size on the wire, in bytes, without payload.
    pub const SIZE: usize = 32;

    /// Encodes the header.
    pub fn encode(self) -> [u8; Self::SIZE] {
        concat_fields(&[
            &EXTENDED_REPLY_MAGIC.to_be_bytes(),
            &self.chunk.flags.0.to_be_bytes(),
            &self.chunk.kind.0.to_be_bytes(),
            &self.chunk.cookie.0.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &u64::from(self.chunk.length).to_be_bytes(),
        ])
    }

    /// Decodes the header.
    ///
    /// # Errors
    /// The magic number is wrong, or the length exceeds 32 bits, which no payload does.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(bytes);
        let magic = reader.u32("a chunk's magic")?;
        if magic != EXTENDED_REPLY_MAGIC {
            return Err(Malformed::BadMagic { what: "a chunk", got: magic.into() });
        }
        let flags = ReplyFlags(reader.u16("a chunk's flags")?);
        let kind = ReplyType(reader.u16("a chunk's type")?);
        let cookie = Cookie(reader.u64("a chunk's cookie")?);
        let offset = reader.u64("a chunk's offset")?;
        let length = u32::try_from(reader.u64("a chunk's length")?)
            .map_err(|_| Malformed::Truncated("a chunk's payload"))?;
        reader.finish()?;
        Ok(Self { chunk: ChunkHeader { flags, kind, cookie, length }, offset })
    }
}

/// Extent of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes; never zero.
    pub length: u64,
    /// Status of the extent, as defined by the metadata context.
    pub flags: u32,
}

/// Extent flag of `base:allocation`: nothing is stored in the extent.
pub const STATE_HOLE: u32 = 1;
/// Extent flag of `base:allocation`: the extent reads as zeros.
pub const STATE_ZERO: u32 = 2;

/// Maximum number of extents in one chunk ("Servers SHOULD NOT send more than 2^20 extents in a
/// single reply chunk").
pub const MAX_EXTENTS: usize = 1 << 20;

/// Encodes the payload of `NBD_REPLY_TYPE_BLOCK_STATUS`. The extents must lie within a request
/// whose own length fits in 32 bits.
pub fn encode_block_status(context: u32, extents: &[Extent]) -> Vec<u8> {
    let mut out = context.to_be_bytes().to_vec();
    for extent in extents.iter().take(MAX_EXTENTS) {
        out.extend(u32::try_from(extent.length).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(extent.flags.to_be_bytes());
    }
    out
}

/// Encodes the payload of `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`.
pub fn encode_block_status_ext(context: u32, extents: &[Extent]) -> Vec<u8> {
    let count = extents.len().min(MAX_EXTENTS);
    let mut out = context.to_be_bytes().to_vec();
    out.extend(u32::try_from(count).unwrap_or(0).to_be_bytes());
    for extent in extents.iter().take(count) {
        out.extend(extent.length.to_be_bytes());
        out.extend(u64::from(extent.flags).to_be_bytes());
    }
    out
}

/// Encodes the payload of an error chunk: `NBD_REPLY_TYPE_ERROR_OFFSET` if there is an `offset`,
/// otherwise `NBD_REPLY_TYPE_ERROR`.
pub fn encode_error(error: ErrorCode, message: &str, offset: Option<u64>) -> Vec<u8> {
    const _: () = assert!(MAX_STRING <= u16::MAX as usize);
    let message = truncate_string(message).as_bytes();
    let mut out = Vec::with_capacity(14 + message.len());
    out.extend(error.0.to_be_bytes());
    out.extend(u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    out.extend(message);
    out.extend(offset.into_iter().flat_map(u64::to_be_bytes));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_reply_round_trip() {
        let reply = SimpleReply { error: ErrorCode::INVAL, cookie: Cookie(7) };
        let bytes = b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x07";
        assert_eq!(&reply.encode(), bytes);
        assert_eq!(SimpleReply::decode(bytes), Ok(reply));
        assert!(SimpleReply::decode(&[0; 16]).is_err());
        assert_eq!(ErrorCode::INVAL.to_string(), "NBD_EINVAL");
    }
    #[test]
    fn chunk_header_round_trip() {
        let header = ChunkHeader {
            flags: ReplyFlags::DONE,
            kind: ReplyType::OFFSET_HOLE,
            cookie: Cookie(7),
            length: 12,
        };
        let bytes = b"\x66\x8e\x33\xef\0\x01\0\x02\0\0\0\0\0\0\0\x07\0\0\0\x0c";
        assert_eq!(&header.encode(), bytes);
        assert_eq!(ChunkHeader::decode(bytes), Ok(header));
    }

    #[test]
    fn extended_chunk_header_round_trip() {
        let chunk = ChunkHeader {
            flags: ReplyFlags::DONE,
            kind: ReplyType::BLOCK_STATUS_EXT,
            cookie: Cookie(7),
            length: 24,
        };
        let bytes = b"\x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x07\
                      \0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x18";
        let header = ExtendedChunkHeader { chunk, offset: 9 };
        assert_eq!(&header.encode(), bytes);
        assert_eq!(ExtendedChunkHeader::decode(bytes), Ok(header));
        let mut longer = *bytes;
        longer[27] = 1;
        assert!(ExtendedChunkHeader::decode(&longer).is_err());
        let extent = Extent { length: 1 << 40, flags: 3 };
        assert_eq!(
            encode_block_status_ext(5, &[extent]),
            b"\0\0\0\x05\0\0\0\x01\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\x03"
        );
    }

    #[test]
    fn compact_extents_are_encoded() {
        let extents = [Extent { length: 512, flags: 3 }, Extent { length: 0xffff_fdff, flags: 0 }];
        assert_eq!(
            encode_block_status(5, &extents),
            b"\0\0\0\x05\0\0\x02\0\0\0\0\x03\xff\xff\xfd\xff\0\0\0\0"
        );
    }

    #[test]
    fn errors_carry_a_message_and_an_optional_offset() {
        assert_eq!(encode_error(ErrorCode::IO, "no", None), b"\0\0\0\x05\0\x02no");
        assert_eq!(encode_error(ErrorCode::IO, "", Some(9)), b"\0\0\0\x05\0\0\0\0\0\0\0\0\0\x09");
        assert_eq!(encode_error(ErrorCode::IO, &"x".repeat(9999), None).len(), 6 + 4096);
    }
}
