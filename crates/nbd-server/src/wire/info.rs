//! Information about an export: the client's request (`NBD_OPT_INFO`, `NBD_OPT_GO`) and the
//! server's replies (`NBD_REP_INFO`).

use super::{FieldReader, Malformed, truncate_string, wire_flags, wire_number};

wire_number! {
    /// Kind of information about an export.
    InfoType(u16), "NBD_INFO_" {
        /// Size and transmission flags; always sent.
        EXPORT = 0,
        /// Canonical name.
        NAME = 1,
        /// Human-readable description.
        DESCRIPTION = 2,
        /// Minimum and preferred block size, and maximum payload.
        BLOCK_SIZE = 3,
    }
}

wire_flags! {
    /// Supported commands and properties of an export ("Transmission flags").
    TransmissionFlags(u16) {
        /// Always set; marks the other flags as valid.
        HAS_FLAGS = 0,
        /// The export is read-only; writes are refused.
        READ_ONLY = 1,
        /// `NBD_CMD_FLUSH` is supported.
        SEND_FLUSH = 2,
        /// `NBD_CMD_FLAG_FUA` is supported.
        SEND_FUA = 3,
        /// The medium is rotational.
        ROTATIONAL = 4,
        /// `NBD_CMD_TRIM` is supported.
        SEND_TRIM = 5,
        /// `NBD_CMD_WRITE_ZEROES` is supported.
        SEND_WRITE_ZEROES = 6,
        /// `NBD_CMD_FLAG_DF` is supported.
        SEND_DF = 7,
        /// Several connections to the export see consistent data.
        CAN_MULTI_CONN = 8,
        /// `NBD_CMD_CACHE` is supported.
        SEND_CACHE = 10,
        /// `NBD_CMD_BLOCK_STATUS` accepts a payload that names contexts.
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export's name, as bytes; empty for the default export.
    pub name: &'a [u8],
    /// Kinds of information that the client requests. Unknown kinds are to be ignored.
    pub wanted: Vec<InfoType>,
}

impl<'a> InfoRequest<'a> {
    /// Decodes the option's data.
    ///
    /// # Errors
    /// The name's length "MUST be no larger than the option data length - 6", and the number of
    /// requests must match the remaining data exactly.
    pub fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(data);
        let name = reader.string("the export's name")?;
        let count = reader.u16("the number of information requests")?;
        let mut wanted = Vec::with_capacity(usize::from(count).min(reader.rest.len() / 2));
        for _ in 0..count {
            wanted.push(InfoType(reader.u16("an information request")?));
        }
        reader.finish()?;
        Ok(Self { name, wanted })
    }

    /// Encodes the option's data, as a client sends it.
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

/// One piece of information about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Size and transmission flags.
    Export {
        /// Size of the export, in bytes.
        size: u64,
        /// Supported commands and properties.
        flags: TransmissionFlags,
    },
    /// Canonical name.
    Name(String),
    /// Human-readable description.
    Description(String),
    /// Block size constraints.
    BlockSize(BlockSizes),
}

/// Constraints on the sizes of requests, in bytes ("Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Power of two of which offsets and lengths of requests must be multiples.
    pub minimum: u32,
    /// Power of two of which offsets and lengths should be multiples for efficiency.
    pub preferred: u32,
    /// Maximum length of a payload.
    pub maximum: u32,
}

impl Info {
    /// Encodes the data of an `NBD_REP_INFO` reply.
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
                out.extend(truncate_string(name).as_bytes());
            }
            Self::Description(text) => {
                out.extend(InfoType::DESCRIPTION.0.to_be_bytes());
                out.extend(truncate_string(text).as_bytes());
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

    /// Decodes the data of an `NBD_REP_INFO` reply. Returns `None` for an unknown kind, which a
    /// client ignores.
    ///
    /// # Errors
    /// A field is missing, or bytes are left over.
    pub fn decode(data: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut reader = FieldReader::new(data);
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

/// Encodes the reply to `NBD_OPT_EXPORT_NAME`: size, flags and, unless `no_zeroes` was negotiated,
/// 124 zero bytes of padding.
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
    fn info_request_round_trip() {
        let request =
            InfoRequest { name: b"disk", wanted: vec![InfoType::BLOCK_SIZE, InfoType(99)] };
        let bytes = request.encode();
        assert_eq!(bytes, b"\0\0\0\x04disk\0\x02\0\x03\0\x63");
        assert_eq!(InfoRequest::decode(&bytes), Ok(request));
    }

    #[test]
    fn info_request_with_wrong_lengths_is_rejected() {
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
    fn info_round_trip() {
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
    fn export_name_reply_is_padded_unless_no_zeroes() {
        let flags = TransmissionFlags::HAS_FLAGS;
        assert_eq!(encode_export_name_reply(1, flags, true), b"\0\0\0\0\0\0\0\x01\0\x01");
        assert_eq!(encode_export_name_reply(1, flags, false).len(), 134);
    }
}
