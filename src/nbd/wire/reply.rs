//! Replies of the transmission phase ("Simple reply message", "Error values").

use super::request::Cookie;
use super::{Malformed, Reader, wire_number};

/// The magic number of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

wire_number! {
    /// Why a request failed ("Error values").
    ErrorCode(u32), "NBD_E" {
        /// No error.
        OK = 0,
        /// Not permitted: a write to a read-only export.
        PERM = 1,
        /// The data can't be had.
        IO = 5,
        /// Out of memory.
        NOMEM = 12,
        /// The request makes no sense.
        INVAL = 22,
        /// Out of space.
        NOSPC = 28,
        /// Too large for this way of asking.
        OVERFLOW = 75,
        /// Not supported.
        NOTSUP = 95,
        /// The server is shutting down.
        SHUTDOWN = 108,
    }
}

/// A simple reply's head: 16 bytes; behind a successful READ, its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// [`ErrorCode::OK`], or why it failed.
    pub error: ErrorCode,
    /// The request's mark.
    pub cookie: Cookie,
}

impl SimpleReply {
    /// Its size on the wire, in bytes, without data.
    pub const SIZE: usize = 16;

    /// The bytes to send.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let fields: [&[u8]; 3] = [
            &SIMPLE_REPLY_MAGIC.to_be_bytes(),
            &self.error.0.to_be_bytes(),
            &self.cookie.0.to_be_bytes(),
        ];
        for (to, from) in out.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        out
    }

    /// Reads a reply's head.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_reply_both_ways() {
        let reply = SimpleReply { error: ErrorCode::INVAL, cookie: Cookie(7) };
        let bytes = b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x07";
        assert_eq!(&reply.encode(), bytes);
        assert_eq!(SimpleReply::decode(bytes), Ok(reply));
        assert!(SimpleReply::decode(&[0; 16]).is_err());
        assert_eq!(ErrorCode::INVAL.to_string(), "NBD_EINVAL");
    }
}
