//! Options and their replies ("Fixed newstyle negotiation", "Option types",
//! "Option reply types").

use super::handshake::IHAVEOPT;
use super::{Malformed, Reader, clip, wire_number};

/// The magic number of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// The longest option data that is read, in bytes.
///
/// An option of one name and some numbers fits sixteen times over; whoever announces
/// more isn't haggling, and draining it would keep the connection busy for nothing.
pub const MAX_OPTION_DATA: u32 = 64 * 1024;

wire_number! {
    /// What the client asks for during negotiation.
    Opt(u32), "NBD_OPT_" {
        /// Choose an export and begin transmission, with no way to report an error.
        EXPORT_NAME = 1,
        /// Leave.
        ABORT = 2,
        /// Name the exports.
        LIST = 3,
        /// Go on inside TLS.
        STARTTLS = 5,
        /// Describe an export.
        INFO = 6,
        /// Describe an export, and begin transmission.
        GO = 7,
        /// Use structured replies.
        STRUCTURED_REPLY = 8,
        /// Name the metadata contexts of an export.
        LIST_META_CONTEXT = 9,
        /// Select metadata contexts.
        SET_META_CONTEXT = 10,
        /// Use extended headers.
        EXTENDED_HEADERS = 11,
    }
}

wire_number! {
    /// What the server answers.
    Rep(u32), "NBD_REP_" {
        /// Done.
        ACK = 1,
        /// An export's name and description.
        SERVER = 2,
        /// A piece of information about an export.
        INFO = 3,
        /// A metadata context.
        META_CONTEXT = 4,
        /// The option is unknown here.
        ERR_UNSUP = 0x8000_0001,
        /// The option is known, and forbidden here.
        ERR_POLICY = 0x8000_0002,
        /// The option's data makes no sense.
        ERR_INVALID = 0x8000_0003,
        /// This platform can't do it.
        ERR_PLATFORM = 0x8000_0004,
        /// Not without TLS.
        ERR_TLS_REQD = 0x8000_0005,
        /// There is no such export.
        ERR_UNKNOWN = 0x8000_0006,
        /// The server is shutting down.
        ERR_SHUTDOWN = 0x8000_0007,
        /// Not without a request for block sizes.
        ERR_BLOCK_SIZE_REQD = 0x8000_0008,
        /// Too large to process.
        ERR_TOO_BIG = 0x8000_0009,
        /// Not with anything less than extended headers.
        ERR_EXT_HEADER_REQD = 0x8000_000a,
    }
}

impl Rep {
    /// Whether this reply says that the option failed.
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

/// The head of an option: 16 bytes, then `length` bytes of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// What is asked for.
    pub option: Opt,
    /// How many bytes of data follow.
    pub length: u32,
}

impl OptionHeader {
    /// Its size on the wire, in bytes.
    pub const SIZE: usize = 16;

    /// Reads the head; the data isn't here yet.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
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

/// A whole option as a client sends it.
///
/// # Panics
/// Never: `data` that is longer than a 32-bit length can say is cut.
pub fn encode_option(option: Opt, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(OptionHeader::SIZE + data.len());
    out.extend(IHAVEOPT.to_be_bytes());
    out.extend(option.0.to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(data.iter().take(length as usize));
    out
}

/// The head of an option reply: 20 bytes, then `length` bytes of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that this answers.
    pub option: Opt,
    /// The answer.
    pub reply: Rep,
    /// How many bytes of data follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Its size on the wire, in bytes.
    pub const SIZE: usize = 20;

    /// Reads the head; the data isn't here yet.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
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

/// Appends one reply to `out`, so that several leave in one write.
pub fn push_reply(out: &mut Vec<u8>, option: Opt, reply: Rep, data: &[u8]) {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.0.to_be_bytes());
    out.extend(reply.0.to_be_bytes());
    out.extend(length.to_be_bytes());
    out.extend(data.iter().take(length as usize));
}

/// Appends an error with a sentence for the person at the other end.
pub fn push_error(out: &mut Vec<u8>, option: Opt, reply: Rep, message: &str) {
    push_reply(out, option, reply, clip(message).as_bytes());
}

/// The data of `NBD_REP_SERVER`: a name, then a description for people.
pub fn server_data(name: &str, description: &str) -> Vec<u8> {
    let name = clip(name).as_bytes();
    let mut data = Vec::with_capacity(4 + name.len() + description.len());
    data.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
    data.extend(name);
    data.extend(clip(description).as_bytes());
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_both_ways() {
        let bytes = encode_option(Opt::LIST, b"");
        assert_eq!(bytes, b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        assert_eq!(
            OptionHeader::decode(bytes.as_slice().try_into().unwrap()),
            Ok(OptionHeader { option: Opt::LIST, length: 0 })
        );
        assert!(OptionHeader::decode(b"NBDMAGIC\0\0\0\x03\0\0\0\0").is_err());
    }

    #[test]
    fn reply_both_ways() {
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
    fn an_error_text_never_exceeds_the_string_limit() {
        let mut out = Vec::new();
        push_error(&mut out, Opt(77), Rep::ERR_UNSUP, &"x".repeat(10_000));
        assert_eq!(out.len(), OptionReplyHeader::SIZE + 4096);
    }

    #[test]
    fn numbers_unknown_to_us_still_print() {
        assert_eq!(Opt::GO.to_string(), "NBD_OPT_GO");
        assert_eq!(Opt(77).to_string(), "NBD_OPT_0x4d");
        assert_eq!(Rep::ERR_POLICY.to_string(), "NBD_REP_ERR_POLICY");
    }
}
