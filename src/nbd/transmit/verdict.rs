//! What is to be done about a request: a pure judgement.

use crate::nbd::Span;
use crate::nbd::error::Refusal;
use crate::nbd::wire::MAX_PAYLOAD;
use crate::nbd::wire::reply::ErrorCode;
use crate::nbd::wire::request::{Command, CommandFlags, Request};

/// What was agreed on before the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Session {
    /// The export's size in bytes.
    pub(super) size: u64,
    /// Whether replies are structured.
    pub(super) structured: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Read this and send it; if `whole`, in no more than one content chunk.
    Read { span: Span, whole: bool },
    /// There is nothing to do; say so.
    Done,
    /// Skip so many bytes of payload, then refuse.
    Refuse { refusal: Refusal, payload: u32 },
    /// Answer what is open, then close.
    Disconnect,
    /// Close: so long a payload isn't worth skipping.
    TooLarge(u32),
}

/// Judges a request.
pub(super) fn judge(request: &Request, session: Session) -> Verdict {
    let refuse = |refusal| Verdict::Refuse { refusal, payload: 0 };
    match request.command {
        Command::WRITE if request.length > MAX_PAYLOAD => Verdict::TooLarge(request.length),
        // "If this flag [READ_ONLY] is set, the server MUST error subsequent write
        // operations"; "it SHOULD return NBD_EPERM".
        Command::WRITE => Verdict::Refuse { refusal: READ_ONLY, payload: request.length },
        Command::TRIM | Command::WRITE_ZEROES => refuse(READ_ONLY),
        // "A client MUST NOT send anything to the server after sending an NBD_CMD_DISC",
        // so there is nobody to tell about stray flags.
        Command::DISC => Verdict::Disconnect,
        // "The server SHOULD return NBD_EINVAL if it receives an unknown command flag",
        // or one that doesn't apply.
        _ if !request.flags.without(known_flags(request.command, session)).is_empty() => {
            refuse(UNKNOWN_FLAG)
        }
        Command::READ => read(request, session),
        // "length and offset are reserved, and MUST be set to all-zero"
        Command::FLUSH if request.offset == 0 && request.length == 0 => Verdict::Done,
        Command::FLUSH => refuse(FLUSH_WITH_RANGE),
        // "NBD_EINVAL if it receives an unknown command"
        _ => refuse(UNKNOWN_COMMAND),
    }
}

const READ_ONLY: Refusal = Refusal::new(ErrorCode::PERM, "this export is read-only");
const UNKNOWN_FLAG: Refusal =
    Refusal::new(ErrorCode::INVAL, "this command was sent with a flag that doesn't apply to it");
const UNKNOWN_COMMAND: Refusal =
    Refusal::new(ErrorCode::INVAL, "this server doesn't know that command");
const FLUSH_WITH_RANGE: Refusal =
    Refusal::new(ErrorCode::INVAL, "a flush has neither offset nor length");
const BEYOND_END: Refusal =
    Refusal::new(ErrorCode::INVAL, "the range is beyond the end of the export");
const READ_TOO_LONG: Refusal =
    Refusal::new(ErrorCode::INVAL, "a read is at most 32 MiB long: ask for less at a time");

/// Which flags a command may have.
fn known_flags(command: Command, session: Session) -> CommandFlags {
    match command {
        // "MUST NOT be set unless the transmission flags include NBD_FLAG_SEND_DF", which
        // is there with structured replies.
        Command::READ if session.structured => CommandFlags::DF,
        _ => CommandFlags::default(),
    }
}

fn read(request: &Request, session: Session) -> Verdict {
    let refuse = |refusal| Verdict::Refuse { refusal, payload: 0 };
    match request.offset.checked_add(request.length.into()) {
        Some(end) if end <= session.size => {}
        _ => return refuse(BEYOND_END),
    }
    if request.length > MAX_PAYLOAD {
        return refuse(READ_TOO_LONG);
    }
    Verdict::Read {
        span: Span { offset: request.offset, length: request.length },
        whole: request.flags.contains(CommandFlags::DF),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::request::Cookie;

    const SIMPLE: Session = Session { size: 1000, structured: false };
    const STRUCTURED: Session = Session { size: 1000, structured: true };

    fn request(command: Command, offset: u64, length: u32) -> Request {
        Request { flags: CommandFlags::default(), command, cookie: Cookie(1), offset, length }
    }

    fn verdict(command: Command, offset: u64, length: u32) -> Verdict {
        judge(&request(command, offset, length), SIMPLE)
    }

    fn refused(refusal: Refusal) -> Verdict {
        Verdict::Refuse { refusal, payload: 0 }
    }

    #[test]
    fn reads_end_where_the_export_ends() {
        for (offset, length) in [(0, 1000), (999, 1), (1000, 0)] {
            let read = Verdict::Read { span: Span { offset, length }, whole: false };
            assert_eq!(verdict(Command::READ, offset, length), read);
        }
        for (offset, length) in [(0, 1001), (999, 2), (1001, 0), (u64::MAX, 1), (u64::MAX, 0)] {
            assert_eq!(verdict(Command::READ, offset, length), refused(BEYOND_END));
        }
    }

    #[test]
    fn the_largest_read_is_the_maximum_payload() {
        let large = Session { size: u64::MAX >> 1, ..SIMPLE };
        let read = |length| judge(&request(Command::READ, 0, length), large);
        assert!(matches!(read(MAX_PAYLOAD), Verdict::Read { .. }));
        assert_eq!(read(MAX_PAYLOAD + 1), refused(READ_TOO_LONG));
    }

    #[test]
    fn writes_are_not_permitted() {
        assert_eq!(
            verdict(Command::WRITE, 0, 10),
            Verdict::Refuse { refusal: READ_ONLY, payload: 10 }
        );
        assert_eq!(verdict(Command::WRITE, 0, MAX_PAYLOAD + 1), Verdict::TooLarge(MAX_PAYLOAD + 1));
        assert_eq!(verdict(Command::TRIM, 0, u32::MAX), refused(READ_ONLY));
        assert_eq!(verdict(Command::WRITE_ZEROES, 0, u32::MAX), refused(READ_ONLY));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert_eq!(verdict(Command::FLUSH, 0, 0), Verdict::Done);
        assert_eq!(verdict(Command::FLUSH, 1, 0), refused(FLUSH_WITH_RANGE));
        assert_eq!(verdict(Command::CACHE, 0, 1), refused(UNKNOWN_COMMAND));
        assert_eq!(verdict(Command(99), 0, 0), refused(UNKNOWN_COMMAND));
    }

    #[test]
    fn flags_need_what_they_belong_to() {
        let with =
            |flags, session| judge(&Request { flags, ..request(Command::READ, 0, 1) }, session);
        assert_eq!(with(CommandFlags::FUA, STRUCTURED), refused(UNKNOWN_FLAG));
        assert_eq!(with(CommandFlags::DF, SIMPLE), refused(UNKNOWN_FLAG));
        assert_eq!(with(CommandFlags(0x8000), STRUCTURED), refused(UNKNOWN_FLAG));
        assert!(matches!(with(CommandFlags::DF, STRUCTURED), Verdict::Read { whole: true, .. }));
    }
}
