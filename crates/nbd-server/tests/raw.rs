//! Messages as bytes, written down from the specification and not from the code under test, so that
//! a wrong number in the code is found.

pub const REQUEST_MAGIC: u32 = 0x2560_9513;

/// Client flags: fixed newstyle and no zeroes.
pub const FLAGS: u32 = 3;

pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_GO: u32 = 7;

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_CACHE: u16 = 5;

/// Start of a simple reply that reports success.
pub const SIMPLE_SUCCESS: [u8; 8] = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0];

/// A request with a compact header.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl Request {
    pub fn read(cookie: u64, offset: u64, length: u32) -> Self {
        Self { command: CMD_READ, cookie, offset, length }
    }

    pub fn disc() -> Self {
        Self { command: CMD_DISC, ..Self::default() }
    }

    pub fn encode(self) -> Vec<u8> {
        const FLAGS: u16 = 0;
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(FLAGS.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(self.length.to_be_bytes());
        bytes
    }
}

/// Returns an option with its data.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [b"IHAVEOPT", &number.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}
