//! Options and option replies ("Fixed newstyle negotiation", "Option types", "Option reply types").

use super::handshake::IHAVEOPT;
use super::{FieldReader, Malformed, truncate_string, wire_number};

/// Magic number of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Maximum length of option data that is accepted, in bytes.
///
/// This is sixteen times what an option with one name and some numbers needs. A client that
/// announces more is not negotiating in earnest, and draining the data would keep the connection
/// busy for nothing.
pub const MAX_OPTION_DATA: u32 = 64 * 1024;

wire_number! {
    /// Type of a client's option.
    Opt(u32), "NBD_OPT_" {
        /// Choice of an export, which starts transmission; errors cannot be reported.
        EXPORT_NAME = 1,
        /// End of the session.
        ABORT = 2,
        /// List of the exports.
        LIST = 3,
        /// Start of TLS.
        STARTTLS = 5,
        /// Information about an export.
        INFO = 6,
        /// Information about an export, and start of transmission.
        GO = 7,
        /// Use of structured replies.
        STRUCTURED_REPLY = 8,
        /// List of the metadata contexts of an export.
        LIST_META_CONTEXT = 9,
        /// Selection of metadata contexts of an export.
        SET_META_CONTEXT = 10,
        /// Use of extended headers.
        EXTENDED_HEADERS = 11,
    }
}

wire_number! {
    /// Type of a server's option reply.
    Rep(u32), "NBD_REP_" {
        /// Success; ends the replies to an option.
        ACK = 1,
        /// Name and description of an export.
        SERVER = 2,
        /// One piece of information about an export.
        INFO = 3,
        /// A metadata context.
        META_CONTEXT = 4,
        /// The option is not supported by this server.
        ERR_UNSUP = 0x8000_0001,
        /// The option is supported but forbidden by the server's policy.
        ERR_POLICY = 0x8000_0002,
        /// The option's data is malformed, or the option is invalid in the current state.
        ERR_INVALID = 0x8000_0003,
        /// The option is not supported on this platform.
        ERR_PLATFORM = 0x8000_0004,
        /// TLS is required.
        ERR_TLS_REQD = 0x8000_0005,
        /// The export does not exist.
        ERR_UNKNOWN = 0x8000_0006,
        /// The server is shutting down.
        ERR_SHUTDOWN = 0x8000_0007,
        /// The client must request block sizes.
        ERR_BLOCK_SIZE_REQD = 0x8000_0008,
        /// The request or the reply is too large.
        ERR_TOO_BIG = 0x8000_0009,
        /// Extended headers are required.
        ERR_EXT_HEADER_REQD = 0x8000_000a,
    }
}

impl Rep {
    /// Returns true if this is an error reply.
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

/// Header of an option: 16 bytes, followed by `length` bytes of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Type of the option.
    pub option: Opt,
    /// Number of bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Size on the wire, in bytes.
    pub const SIZE: usize = 16;

    /// Decodes the header, without the data that follows.
    ///
    /// # Errors
    /// The magic number is wrong.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(bytes);
        let got = reader.u64("an option's magic")?;
        if got != IHAVEOPT {
            return Err(Malformed::BadMagic { what: "an option", got });
        }
        let option = Opt(reader.u32("an option's number")?);
        let length = reader.u32("an option's length")?;
        reader.finish()?;
        Ok(Self { option, length })
    }
}

/// Encodes a complete option, as a client sends it.
///
/// # Panics
/// Never: `data` longer than `u32::MAX` bytes is truncated.
pub fn encode_option(option: Opt, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(OptionHeader::SIZE + data.len());
    out.extend(IHAVEOPT.to_be_bytes());
    out.extend(option.0.to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(data.iter().take(length as usize));
    out
}

/// Header of an option reply: 20 bytes, followed by `length` bytes of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option to which this replies.
    pub option: Opt,
    /// Type of the reply.
    pub reply: Rep,
    /// Number of bytes of data that follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Size on the wire, in bytes.
    pub const SIZE: usize = 20;

    /// Decodes the header, without the data that follows.
    ///
    /// # Errors
    /// The magic number is wrong.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(bytes);
        let got = reader.u64("a reply's magic")?;
        if got != OPTION_REPLY_MAGIC {
            return Err(Malformed::BadMagic { what: "an option reply", got });
        }
        let option = Opt(reader.u32("a reply's option")?);
        let reply = Rep(reader.u32("a reply's type")?);
        let length = reader.u32("a reply's length")?;
        reader.finish()?;
        Ok(Self { option, reply, length })
    }
}

/// Appends one option reply to `out`, so that several can be sent in one write.
pub fn push_reply(out: &mut Vec<u8>, option: Opt, reply: Rep, data: &[u8]) {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.0.to_be_bytes());
    out.extend(reply.0.to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(data.iter().take(length as usize));
}

/// Appends an error reply with a human-readable message, which is truncated to the protocol's
/// limit.
pub fn push_error(out: &mut Vec<u8>, option: Opt, reply: Rep, message: &str) {
    push_reply(out, option, reply, truncate_string(message).as_bytes());
}

/// Encodes the data of `NBD_REP_SERVER`: a name and a human-readable description.
pub fn encode_server_data(name: &str, description: &str) -> Vec<u8> {
    let name = truncate_string(name).as_bytes();
    let mut data = Vec::with_capacity(4 + name.len() + description.len());
    data.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
    data.extend(name);
    data.extend(truncate_string(description).as_bytes());
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_round_trip() {
        let bytes = encode_option(Opt::LIST, b"");
        assert_eq!(bytes, b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        assert_eq!(
            OptionHeader::decode(bytes.as_slice().try_into().unwrap()),
            Ok(OptionHeader { option: Opt::LIST, length: 0 })
        );
        assert!(OptionHeader::decode(b"NBDMAGIC\0\0\0\x03\0\0\0\0").is_err());
    }

    #[test]
    fn option_reply_round_trip() {
        let mut out = Vec::new();
        push_error(&mut out, Opt::GO, Rep::ERR_UNKNOWN, "no");
        assert_eq!(out, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x02no");
        let header = OptionReplyHeader::decode(out[..20].try_into().unwrap()).unwrap();
        assert_eq!(
            header,
            OptionReplyHeader { option: Opt::GO, reply: Rep::ERR_UNKNOWN, length: 2 }
        );
        assert!(header.reply.is_error() && !Rep::ACK.is_error());
    }

    #[test]
    fn error_message_is_truncated_to_the_string_limit() {
        let mut out = Vec::new();
        push_error(&mut out, Opt(77), Rep::ERR_UNSUP, &"x".repeat(10_000));
        assert_eq!(out.len(), OptionReplyHeader::SIZE + 4096);
    }

    #[test]
    fn unknown_numbers_are_displayed() {
        assert_eq!(Opt::GO.to_string(), "NBD_OPT_GO");
        assert_eq!(Opt(77).to_string(), "NBD_OPT_0x4d");
        assert_eq!(Rep::ERR_POLICY.to_string(), "NBD_REP_ERR_POLICY");
    }
}
