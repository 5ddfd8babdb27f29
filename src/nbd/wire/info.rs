//! What a client may ask about an export, and the answers (`NBD_OPT_INFO`,
//! `NBD_OPT_GO`, `NBD_REP_INFO`).

use super::{Malformed, Reader, clip, wire_flags, wire_number};

wire_number! {
    /// A kind of information about an export.
    InfoType(u16), "NBD_INFO_" {
        /// Size and transmission flags; always given.
        EXPORT = 0,
        /// The canonical name.
        NAME = 1,
        /// A description for people.
        DESCRIPTION = 2,
        /// Minimum, preferred and maximum sizes.
        BLOCK_SIZE = 3,
    }
}

wire_flags! {
    /// What can be done with an export ("Transmission flags").
    TransmissionFlags(u16) {
        /// Always set.
        HAS_FLAGS = 0,
        /// Writes are refused.
        READ_ONLY = 1,
        /// `NBD_CMD_FLUSH` works.
        SEND_FLUSH = 2,
        /// `NBD_CMD_FLAG_FUA` works.
        SEND_FUA = 3,
        /// The medium rotates.
        ROTATIONAL = 4,
        /// `NBD_CMD_TRIM` works.
        SEND_TRIM = 5,
        /// `NBD_CMD_WRITE_ZEROES` works.
        SEND_WRITE_ZEROES = 6,
        /// `NBD_CMD_FLAG_DF` works.
        SEND_DF = 7,
        /// Several connections see the same data.
        CAN_MULTI_CONN = 8,
        /// `NBD_CMD_CACHE` works.
        SEND_CACHE = 10,
        /// `NBD_CMD_BLOCK_STATUS` takes a payload that names contexts.
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export's name, as bytes; empty for the default export.
    pub name: &'a [u8],
    /// What else the client wants to know. Kinds unknown to us are to be ignored.
    pub wanted: Vec<InfoType>,
}

impl<'a> InfoRequest<'a> {
    /// Reads the option's data.
    ///
    /// # Errors
    /// The name's length "MUST be no larger than the option data length - 6", and the
    /// number of requests must be what follows it, to the byte.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(data);
        let name = reader.string("the export's name")?;
        let count = reader.u16("the number of information requests")?;
        let mut wanted = Vec::with_capacity(usize::from(count).min(reader.rest.len() / 2));
        for _ in 0..count {
            wanted.push(InfoType(reader.u16("an information request")?));
        }
        reader.finish()?;
        Ok(Self { name, wanted })
    }

    /// The bytes that a client sends.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(6 + self.name.len() + 2 * self.wanted.len());
        out.extend(u32::try_from(self.name.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(self.name);
        out.extend(u16::try_from(self.wanted.len()).unwrap_or(u16::MAX).to_be_bytes());
        for kind in &self.wanted {
            out.extend(kind.0.to_be_bytes());
        }
        out
    }
}

/// A piece of information about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Size in bytes, and flags.
    Export {
        /// The export's size, in bytes.
        size: u64,
        /// What can be done with it.
        flags: TransmissionFlags,
    },
    /// The canonical name.
    Name(String),
    /// A description for people.
    Description(String),
    /// Size constraints.
    BlockSize(BlockSizes),
}

/// The sizes that requests should and must keep to, in bytes ("Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Requests must be multiples of this, a power of two.
    pub minimum: u32,
    /// Requests are efficient as multiples of this, a power of two.
    pub preferred: u32,
    /// No request may be longer.
    pub maximum: u32,
}

impl Info {
    /// The data of an `NBD_REP_INFO` reply.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(14);
        match self {
            Self::Export { size, flags } => {
                out.extend(InfoType::EXPORT.0.to_be_bytes());
                out.extend(size.to_be_bytes());
                out.extend(flags.0.to_be_bytes());
            }
            Self::Name(name) => {
                out.extend(InfoType::NAME.0.to_be_bytes());
                out.extend(clip(name).as_bytes());
            }
            Self::Description(text) => {
                out.extend(InfoType::DESCRIPTION.0.to_be_bytes());
                out.extend(clip(text).as_bytes());
            }
            Self::BlockSize(sizes) => {
                out.extend(InfoType::BLOCK_SIZE.0.to_be_bytes());
                out.extend(sizes.minimum.to_be_bytes());
                out.extend(sizes.preferred.to_be_bytes());
                out.extend(sizes.maximum.to_be_bytes());
            }
        }
        out
    }

    /// Reads a reply's data; `None` is a kind unknown to us, which a client ignores.
    pub fn decode(data: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut reader = Reader::new(data);
        let kind = InfoType(reader.u16("the information type")?);
        let info = match kind {
            InfoType::EXPORT => Self::Export {
                size: reader.u64("the export's size")?,
                flags: TransmissionFlags(reader.u16("the transmission flags")?),
            },
            InfoType::BLOCK_SIZE => Self::BlockSize(BlockSizes {
                minimum: reader.u32("the minimum block size")?,
                preferred: reader.u32("the preferred block size")?,
                maximum: reader.u32("the maximum payload")?,
            }),
            InfoType::NAME => {
                return Ok(Some(Self::Name(String::from_utf8_lossy(reader.rest()).into_owned())));
            }
            InfoType::DESCRIPTION => {
                let text = String::from_utf8_lossy(reader.rest()).into_owned();
                return Ok(Some(Self::Description(text)));
            }
            _ => return Ok(None),
        };
        reader.finish()?;
        Ok(Some(info))
    }
}

/// The reply to `NBD_OPT_EXPORT_NAME`: size and flags, and 124 zeros for a client that
/// did not ask to be spared them.
pub fn encode_export_name_reply(size: u64, flags: TransmissionFlags, no_zeroes: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(134);
    out.extend(size.to_be_bytes());
    out.extend(flags.0.to_be_bytes());
    if !no_zeroes {
        out.extend([0; 124]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_request_both_ways() {
        let request =
            InfoRequest { name: b"disk", wanted: vec![InfoType::BLOCK_SIZE, InfoType(99)] };
        let bytes = request.encode();
        assert_eq!(bytes, b"\0\0\0\x04disk\0\x02\0\x03\0\x63");
        assert_eq!(InfoRequest::decode(&bytes), Ok(request));
    }

    #[test]
    fn info_request_with_wrong_lengths() {
        for bad in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0",
            b"\0\0\0\0\0",
            b"\0\0\0\x05disk\0\0",
            b"\xff\xff\xff\xffdisk\0\0",
            b"\0\0\0\x04disk\0\x01",
            b"\0\0\0\x04disk\0\x00\0",
        ] {
            assert!(InfoRequest::decode(bad).is_err(), "{bad:?}");
        }
        assert!(InfoRequest::decode(b"\0\0\0\0\0\0").is_ok());
    }

    #[test]
    fn info_both_ways() {
        let golden: [(Info, &[u8]); 4] = [
            (
                Info::Export {
                    size: 0x0102,
                    flags: TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::READ_ONLY),
                },
                b"\0\0\0\0\0\0\0\0\x01\x02\0\x03",
            ),
            (Info::Name("a".into()), b"\0\x01a"),
            (Info::Description("b".into()), b"\0\x02b"),
            (
                Info::BlockSize(BlockSizes { minimum: 1, preferred: 4096, maximum: MAX }),
                b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0",
            ),
        ];
        const MAX: u32 = super::super::MAX_PAYLOAD;
        for (info, bytes) in golden {
            assert_eq!(info.encode(), bytes);
            assert_eq!(Info::decode(bytes), Ok(Some(info)));
        }
        assert_eq!(Info::decode(b"\0\x63what"), Ok(None));
        assert!(Info::decode(b"\0\0\0").is_err());
    }

    #[test]
    fn export_name_reply_pads_unless_told_not_to() {
        let flags = TransmissionFlags::HAS_FLAGS;
        assert_eq!(encode_export_name_reply(1, flags, true), b"\0\0\0\0\0\0\0\x01\0\x01");
        assert_eq!(encode_export_name_reply(1, flags, false).len(), 134);
    }
}
