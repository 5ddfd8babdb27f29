//! The messages that open a session: the server's greeting and the client's flags ("Newstyle
//! negotiation").

use super::{FieldReader, Malformed, wire_flags};

/// "NBDMAGIC", the first eight bytes of every session.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", the magic number of newstyle negotiation and of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;

wire_flags! {
    /// Features that the server offers in its greeting ("Handshake flags").
    HandshakeFlags(u16) {
        /// The server understands options other than EXPORT_NAME, and replies to unknown ones with
        /// an error.
        FIXED_NEWSTYLE = 0,
        /// The 124 bytes of padding after the reply to EXPORT_NAME can be omitted.
        NO_ZEROES = 1,
    }
}

wire_flags! {
    /// Offered features that the client accepts ("Client flags").
    ClientFlags(u32) {
        /// The client uses fixed newstyle negotiation.
        FIXED_NEWSTYLE = 0,
        /// The client accepts that the padding is omitted.
        NO_ZEROES = 1,
    }
}

/// The server's greeting: 18 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Features that the server offers.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Size on the wire, in bytes.
    pub const SIZE: usize = 18;

    /// Encodes the greeting.
    pub fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::SIZE);
        out.extend(NBDMAGIC.to_be_bytes());
        out.extend(IHAVEOPT.to_be_bytes());
        out.extend(self.flags.0.to_be_bytes());
        out
    }

    /// Decodes the greeting of a newstyle server.
    ///
    /// # Errors
    /// A magic number is wrong, as in the greeting of an oldstyle server.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = FieldReader::new(bytes);
        for expected in [NBDMAGIC, IHAVEOPT] {
            let got = reader.u64("the greeting")?;
            if got != expected {
                return Err(Malformed::BadMagic { what: "the greeting", got });
            }
        }
        let flags = HandshakeFlags(reader.u16("the handshake flags")?);
        reader.finish()?;
        Ok(Self { flags })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_round_trip() {
        let greeting =
            Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES) };
        assert_eq!(greeting.encode(), b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(Greeting::decode(b"NBDMAGICIHAVEOPT\0\x03"), Ok(greeting));
        assert!(matches!(
            Greeting::decode(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0"),
            Err(Malformed::BadMagic { .. })
        ));
    }
}
