//! The first words of a session: the server's greeting and the client's flags
//! ("Newstyle negotiation").

use super::{Malformed, Reader, wire_flags};

/// "NBDMAGIC", the first eight bytes of every session.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", the magic of newstyle negotiation and of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;

wire_flags! {
    /// What the server offers in its greeting ("Handshake flags").
    HandshakeFlags(u16) {
        /// Options other than EXPORT_NAME are understood, and answered with errors.
        FIXED_NEWSTYLE = 0,
        /// The 124 bytes of padding behind EXPORT_NAME can be left out.
        NO_ZEROES = 1,
    }
}

wire_flags! {
    /// What the client takes up of it ("Client flags").
    ClientFlags(u32) {
        /// The client speaks fixed newstyle.
        FIXED_NEWSTYLE = 0,
        /// The client wants no padding.
        NO_ZEROES = 1,
    }
}

/// The server's greeting: 18 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// What the server offers.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Its size on the wire, in bytes.
    pub const SIZE: usize = 18;

    /// The bytes to send.
    pub fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::SIZE);
        out.extend(NBDMAGIC.to_be_bytes());
        out.extend(IHAVEOPT.to_be_bytes());
        out.extend(self.flags.0.to_be_bytes());
        out
    }

    /// Reads what a newstyle server sends first.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
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
    fn greeting_both_ways() {
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
