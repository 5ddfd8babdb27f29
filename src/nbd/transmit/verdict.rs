//! What is to be done about a request: a pure judgement.

use crate::nbd::Span;
use crate::nbd::wire::MAX_PAYLOAD;
use crate::nbd::wire::reply::ErrorCode;
use crate::nbd::wire::request::{Command, CommandFlags, Request};

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Read this and send it.
    Read(Span),
    /// There is nothing to do; say so.
    Done,
    /// Skip so many bytes of payload, then answer with an error.
    Refuse { error: ErrorCode, payload: u32 },
    /// Answer what is open, then close.
    Disconnect,
    /// Close: so long a payload isn't worth skipping.
    TooLarge(u32),
}

/// Judges a request to an export of `size` bytes.
pub(super) fn judge(request: &Request, size: u64) -> Verdict {
    let refuse = |error| Verdict::Refuse { error, payload: 0 };
    match request.command {
        Command::WRITE if request.length > MAX_PAYLOAD => Verdict::TooLarge(request.length),
        // "If this flag [READ_ONLY] is set, the server MUST error subsequent write
        // operations"; "it SHOULD return NBD_EPERM".
        Command::WRITE => Verdict::Refuse { error: ErrorCode::PERM, payload: request.length },
        Command::TRIM | Command::WRITE_ZEROES => refuse(ErrorCode::PERM),
        // "A client MUST NOT send anything to the server after sending an NBD_CMD_DISC",
        // so there is nobody to tell about stray flags.
        Command::DISC => Verdict::Disconnect,
        // "The server SHOULD return NBD_EINVAL if it receives an unknown command flag",
        // or one that doesn't apply: none of those known applies here.
        _ if request.flags != CommandFlags::default() => refuse(ErrorCode::INVAL),
        Command::READ => read(request, size).map_or(refuse(ErrorCode::INVAL), Verdict::Read),
        // "length and offset are reserved, and MUST be set to all-zero"
        Command::FLUSH if request.offset == 0 && request.length == 0 => Verdict::Done,
        // FLUSH with a range, and "NBD_EINVAL if it receives an unknown command".
        _ => refuse(ErrorCode::INVAL),
    }
}

/// The range of a READ, if it is within the export and the maximum payload.
fn read(request: &Request, size: u64) -> Option<Span> {
    let end = request.offset.checked_add(request.length.into())?;
    (end <= size && request.length <= MAX_PAYLOAD)
        .then_some(Span { offset: request.offset, length: request.length })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::request::Cookie;

    fn verdict(command: Command, offset: u64, length: u32) -> Verdict {
        let flags = CommandFlags::default();
        judge(&Request { flags, command, cookie: Cookie(1), offset, length }, 1000)
    }

    const EINVAL: Verdict = Verdict::Refuse { error: ErrorCode::INVAL, payload: 0 };

    #[test]
    fn reads_end_where_the_export_ends() {
        assert_eq!(
            verdict(Command::READ, 0, 1000),
            Verdict::Read(Span { offset: 0, length: 1000 })
        );
        assert_eq!(
            verdict(Command::READ, 1000, 0),
            Verdict::Read(Span { offset: 1000, length: 0 })
        );
        for (offset, length) in [(0, 1001), (999, 2), (1001, 0), (u64::MAX, 1), (u64::MAX, 0)] {
            assert_eq!(verdict(Command::READ, offset, length), EINVAL, "{offset} {length}");
        }
    }

    #[test]
    fn the_largest_read_is_the_maximum_payload() {
        let read = |length| {
            let flags = CommandFlags::default();
            let request =
                Request { flags, command: Command::READ, cookie: Cookie(1), offset: 0, length };
            judge(&request, u64::MAX >> 1)
        };
        assert!(matches!(read(MAX_PAYLOAD), Verdict::Read(_)));
        assert_eq!(read(MAX_PAYLOAD + 1), EINVAL);
    }

    #[test]
    fn writes_are_not_permitted() {
        assert_eq!(
            verdict(Command::WRITE, 0, 10),
            Verdict::Refuse { error: ErrorCode::PERM, payload: 10 }
        );
        assert_eq!(verdict(Command::WRITE, 0, MAX_PAYLOAD + 1), Verdict::TooLarge(MAX_PAYLOAD + 1));
        let eperm = Verdict::Refuse { error: ErrorCode::PERM, payload: 0 };
        assert_eq!(verdict(Command::TRIM, 0, u32::MAX), eperm);
        assert_eq!(verdict(Command::WRITE_ZEROES, 0, u32::MAX), eperm);
    }

    #[test]
    fn what_is_not_understood_is_einval() {
        assert_eq!(verdict(Command::FLUSH, 0, 0), Verdict::Done);
        assert_eq!(verdict(Command::FLUSH, 1, 0), EINVAL);
        assert_eq!(verdict(Command::CACHE, 0, 1), EINVAL);
        assert_eq!(verdict(Command(99), 0, 0), EINVAL);
        let fua = Request {
            flags: CommandFlags::FUA,
            command: Command::READ,
            cookie: Cookie(1),
            offset: 0,
            length: 1,
        };
        assert_eq!(judge(&fua, 1000), EINVAL);
    }
}
