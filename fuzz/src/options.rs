//! Option haggling: whatever the client says, each of its options gets the answer that the
//! specification wants, the stream stays in step, and what is chosen is what was agreed on.

use std::collections::HashSet;

use arbitrary::{Arbitrary, Unstructured};
use nbd_server::wire::handshake::ClientFlags;
use nbd_server::wire::meta::MAX_QUERIES;
use nbd_server::wire::option::{Opt, Rep};
use nbd_server::{
    Export, Negotiated, NegotiationLimits, ReplyMode, Security, SessionError, negotiate,
};

use crate::export::{CONTEXTS, Pattern, Patterns};
use crate::replies::{Bytes, OptionReplies};
use crate::script::{Script, run};

/// A name as a client may give it.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Name<'a> {
    Default,
    Disk,
    Other,
    Any(&'a [u8]),
    Long(u16),
}

impl Name<'_> {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Default => Vec::new(),
            Self::Disk => b"disk".to_vec(),
            Self::Other => "ändere".into(),
            Self::Any(bytes) => bytes.to_vec(),
            Self::Long(length) => vec![b'x'; length.into()],
        }
    }
}

#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Query<'a> {
    Known(bool),
    Namespace(bool),
    Any(&'a [u8]),
}

/// What a client says: mostly options that make sense, or nearly.
#[derive(Debug, Arbitrary)]
pub enum Said<'a> {
    /// An option without data.
    Bare(u8),
    /// An option with any data.
    Data(u8, &'a [u8]),
    /// INFO or GO, and by how much its lengths are wrong.
    About {
        go: bool,
        name: Name<'a>,
        wanted: Vec<u8>,
        wrong: (u8, i8),
        behind: &'a [u8],
    },
    /// LIST_META_CONTEXT or SET_META_CONTEXT.
    Contexts {
        set: bool,
        name: Name<'a>,
        queries: Vec<Query<'a>>,
        wrong: (u8, i8),
        behind: &'a [u8],
    },
    ExportName(Name<'a>),
    /// An option that promises more than there is.
    Promise(u8, u32),
    Raw(&'a [u8]),
}

impl Said<'_> {
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut option = |number: u8, data: &[u8]| {
            out.extend(b"IHAVEOPT");
            out.extend(u32::from(number % 14).to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
        };
        // A length that may be wrong.
        let length = |length: usize, (which, by): (u8, i8), this: u8| {
            let wrong = if which % 16 == this { i32::from(by) } else { 0 };
            (length as u32).wrapping_add_signed(wrong).to_be_bytes()
        };
        match self {
            Self::Bare(number) => option(*number, &[]),
            Self::Data(number, data) => option(*number, data),
            Self::About { go, name, wanted, wrong, behind } => {
                let name = name.bytes();
                let mut data = length(name.len(), *wrong, 1).to_vec();
                data.extend(name);
                data.extend(&length(wanted.len(), *wrong, 2)[2..]);
                wanted.iter().for_each(|kind| data.extend([0, kind % 6]));
                data.extend(*behind);
                option(if *go { 7 } else { 6 }, &data);
            }
            Self::Contexts { set, name, queries, wrong, behind } => {
                let name = name.bytes();
                let mut data = length(name.len(), *wrong, 1).to_vec();
                data.extend(name);
                data.extend(length(queries.len(), *wrong, 2));
                for query in queries {
                    let query: &[u8] = match query {
                        Query::Known(which) => CONTEXTS[usize::from(*which)].as_bytes(),
                        Query::Namespace(false) => b"base:",
                        Query::Namespace(true) => b"x:y:",
                        Query::Any(bytes) => bytes,
                    };
                    data.extend(length(query.len(), *wrong, 3));
                    data.extend(query);
                }
                data.extend(*behind);
                option(if *set { 10 } else { 9 }, &data);
            }
            Self::ExportName(name) => option(1, &name.bytes()),
            Self::Promise(number, length) => {
                out.extend(b"IHAVEOPT");
                out.extend(u32::from(number % 14).to_be_bytes());
                out.extend(length.to_be_bytes());
            }
            Self::Raw(bytes) => out.extend(*bytes),
        }
    }
}

/// The options in a client's bytes: number and data, or `None`, and nothing after it, where
/// the server has to close.
pub fn options_of(mut bytes: &[u8]) -> impl Iterator<Item = Option<(u32, &[u8])>> {
    let mut is_over = false;
    std::iter::from_fn(move || {
        if is_over || bytes.is_empty() {
            return None;
        }
        let option = whole_option(&mut bytes);
        is_over = option.is_none();
        Some(option)
    })
}

fn whole_option<'a>(bytes: &mut &'a [u8]) -> Option<(u32, &'a [u8])> {
    let (head, rest) = bytes.split_at_checked(16)?;
    let number = u32::from_be_bytes(head[8..12].try_into().unwrap());
    let length = u32::from_be_bytes(head[12..].try_into().unwrap()) as usize;
    let most = if number == 1 { 4096 } else { 65536 };
    if !head.starts_with(b"IHAVEOPT") || length > most {
        return None;
    }
    let (data, rest) = rest.split_at_checked(length)?;
    *bytes = rest;
    Some((number, data))
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    tls: bool,
    no_zeroes: bool,
    size: u64,
    pieces: &'a [u8],
    options: Vec<Said<'a>>,
    tail: &'a [u8],
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut bytes = Vec::new();
    input.options.iter().for_each(|option| option.encode(&mut bytes));
    bytes.extend(input.tail);
    let mut script = Script::new(&bytes, input.pieces);
    let no_zeroes = if input.no_zeroes { ClientFlags::NO_ZEROES } else { ClientFlags::default() };
    let flags = ClientFlags::FIXED_NEWSTYLE.with(no_zeroes);
    let security = if input.tls { Security::Tls } else { Security::Plain };
    let exports = Patterns::of_size(input.size >> 1);

    let mut quota = NegotiationLimits::default().quota();
    let outcome = run(negotiate(&mut script, flags, security, &exports, &mut quota));
    let judge = Judge {
        input: &input,
        exports: &exports,
        replies: OptionReplies::new(&script.output),
        mode: ReplyMode::Simple,
        selected: None,
    };
    judge.judge(&bytes, &outcome, script.consumed());
}

/// What has been agreed on so far, and what the server has said.
struct Judge<'a> {
    input: &'a Input<'a>,
    exports: &'a Patterns,
    replies: OptionReplies<'a>,
    mode: ReplyMode,
    /// By the last SET_META_CONTEXT, if that was a success.
    selected: Option<Selected>,
}

struct Selected {
    name: Vec<u8>,
    /// Their numbers, and their positions among the export's contexts.
    contexts: Vec<(u32, usize)>,
}

type Outcome = Result<Option<Negotiated<Pattern>>, SessionError>;

impl<'a> Judge<'a> {
    fn judge(mut self, bytes: &[u8], outcome: &Outcome, consumed: usize) {
        let mut at = 0;
        for option in options_of(bytes) {
            let Some((number, data)) = option else {
                assert!(outcome.is_err());
                return self.replies.expect_end();
            };
            at += 16 + data.len();
            let option = Opt(number);
            match number {
                1 => {
                    self.export_name(data, outcome);
                    assert_eq!(consumed, at);
                    return self.replies.expect_end();
                }
                2 => {
                    self.expect(option, Rep::ACK);
                    assert!(matches!(outcome, Ok(None)) && consumed == at);
                    return self.replies.expect_end();
                }
                3 => self.list(data),
                5 if self.input.tls => self.expect(option, Rep::ERR_INVALID),
                5 => self.expect(option, Rep::ERR_POLICY),
                6 | 7 => {
                    let name = self.describe(option, data);
                    if number == 7
                        && let Some(name) = name
                    {
                        self.expect_chosen(name, outcome);
                        assert_eq!(consumed, at, "what follows are requests");
                        return self.replies.expect_end();
                    }
                }
                8 | 11 if !data.is_empty() => self.expect(option, Rep::ERR_INVALID),
                8 if self.mode == ReplyMode::Extended => {
                    self.expect(option, Rep::ERR_EXT_HEADER_REQD);
                }
                8 | 11 => {
                    let structured = number == 8;
                    self.mode =
                        if structured { ReplyMode::Structured } else { ReplyMode::Extended };
                    self.expect(option, Rep::ACK);
                }
                9 => self.contexts(option, data),
                10 => self.contexts(option, data),
                _ => self.expect(option, Rep::ERR_UNSUP),
            }
        }
        assert!(matches!(outcome, Ok(None)) && consumed == bytes.len());
        self.replies.expect_end();
    }

    fn expect(&mut self, option: Opt, reply: Rep) {
        assert_eq!(self.replies.next(option).reply, reply);
    }

    /// EXPORT_NAME has no reply but the export, or the end.
    fn export_name(&mut self, name: &[u8], outcome: &Outcome) {
        let known = self.exports.by_name(name);
        let Some(export) = known.filter(|_| self.mode != ReplyMode::Extended) else {
            assert!(outcome.is_err());
            return;
        };
        let reply = &mut self.replies.0;
        assert_eq!(reply.u64(), export.size());
        let flags = reply.u16();
        self.expect_flags(flags, name);
        if !self.input.no_zeroes {
            assert_eq!(self.replies.0.take(124), [0; 124]);
        }
        self.expect_chosen(name, outcome);
    }

    fn list(&mut self, data: &[u8]) {
        if !data.is_empty() {
            return self.expect(Opt::LIST, Rep::ERR_INVALID);
        }
        for export in self.exports.all() {
            let reply = self.replies.next(Opt::LIST);
            assert_eq!(reply.reply, Rep::SERVER);
            let mut data = Bytes(reply.data);
            let length = data.u32() as usize;
            assert_eq!(data.take(length), export.name().as_bytes());
            assert_eq!(data.0, export.description().as_bytes());
        }
        self.expect(Opt::LIST, Rep::ACK);
    }

    /// INFO and GO; the name if that was a success.
    fn describe<'d>(&mut self, option: Opt, data: &'d [u8]) -> Option<&'d [u8]> {
        let Some((name, wanted)) = info_request(data) else {
            self.expect(option, Rep::ERR_INVALID);
            return None;
        };
        let Some(export) = self.exports.by_name(name) else {
            self.expect(option, Rep::ERR_UNKNOWN);
            return None;
        };
        let mut missing: Vec<u16> = vec![0];
        missing.extend([1, 2, 3].iter().filter(|kind| wanted.contains(kind)));
        loop {
            let reply = self.replies.next(option);
            if reply.reply == Rep::ACK {
                break;
            }
            assert_eq!(reply.reply, Rep::INFO);
            let mut data = Bytes(reply.data);
            let kind = data.u16();
            let position = missing.iter().position(|missing| *missing == kind);
            missing.remove(position.expect("information that was not asked for, or twice"));
            match kind {
                0 => {
                    assert_eq!(data.u64(), export.size());
                    let flags = data.u16();
                    self.expect_flags(flags, name);
                }
                1 => assert_eq!(data.take(data.0.len()), export.name().as_bytes()),
                2 => assert_eq!(data.take(data.0.len()), export.description().as_bytes()),
                _ => assert_eq!([data.u32(), data.u32(), data.u32()], [1, 4096, 32 << 20]),
            }
            assert!(data.is_empty());
        }
        assert!(missing.is_empty(), "information that is missing: {missing:?}");
        Some(name)
    }

    /// LIST_META_CONTEXT and SET_META_CONTEXT.
    fn contexts(&mut self, option: Opt, data: &[u8]) {
        let set = option == Opt::SET_META_CONTEXT;
        if set {
            self.selected = None;
        }
        let request = meta_request(data).filter(|_| !set || self.mode != ReplyMode::Simple);
        let Some((name, queries)) = request else {
            return self.expect(option, Rep::ERR_INVALID);
        };
        let different: HashSet<&[u8]> = queries.iter().copied().collect();
        if different.len() > MAX_QUERIES {
            return self.expect(option, Rep::ERR_TOO_BIG);
        }
        if self.exports.by_name(name).is_none() {
            return self.expect(option, Rep::ERR_UNKNOWN);
        }
        let mut selected: Vec<(u32, usize)> = Vec::new();
        for (position, context) in CONTEXTS.iter().enumerate() {
            let context = context.as_bytes();
            let is_exact = queries.contains(&context);
            let is_listed = queries.is_empty()
                || queries.iter().any(|query| query.ends_with(b":") && context.starts_with(query));
            if is_exact || (!set && is_listed) {
                let reply = self.replies.next(option);
                assert_eq!(reply.reply, Rep::META_CONTEXT);
                let mut data = Bytes(reply.data);
                let id = data.u32();
                assert_eq!(data.0, context);
                assert!(!set || selected.iter().all(|(other, _)| *other != id));
                selected.push((id, position));
            }
        }
        self.expect(option, Rep::ACK);
        if set {
            self.selected = Some(Selected { name: name.to_vec(), contexts: selected });
        }
    }

    fn contexts_for(&self, name: &[u8]) -> &[(u32, usize)] {
        let selected = self.selected.as_ref().filter(|selected| selected.name == name);
        selected.map_or(&[], |selected| &selected.contexts)
    }

    /// READ_ONLY, flushes, caching and several connections always; DF with chunks.
    fn expect_flags(&self, flags: u16, name: &[u8]) {
        let always = 1 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 10;
        let df = if self.mode == ReplyMode::Simple { 0 } else { 1 << 7 };
        let has_payload = self.mode == ReplyMode::Extended && !self.contexts_for(name).is_empty();
        assert_eq!(flags, always | df | if has_payload { 1 << 12 } else { 0 });
    }

    fn expect_chosen(&self, name: &[u8], outcome: &Outcome) {
        let Ok(Some(chosen)) = outcome else { panic!("nothing was chosen: {outcome:?}") };
        let export = self.exports.by_name(name).expect("an export of that name");
        assert_eq!(chosen.export.name(), export.name());
        assert_eq!(chosen.reply_mode, self.mode);
        let contexts: Vec<_> = chosen.contexts.iter().map(|c| (c.id, c.position)).collect();
        assert_eq!(contexts, self.contexts_for(name));
    }
}

/// A name, and what is wanted.
fn info_request(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = string(data)?;
    let (count, rest) = rest.split_at_checked(2)?;
    if rest.len() != 2 * usize::from(u16::from_be_bytes(count.try_into().ok()?)) {
        return None;
    }
    let wanted = rest.chunks(2).map(|kind| u16::from_be_bytes([kind[0], kind[1]])).collect();
    Some((name, wanted))
}

/// A name, and queries.
fn meta_request(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = string(data)?;
    let (count, mut rest) = rest.split_at_checked(4)?;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(count.try_into().ok()?) {
        let (query, behind) = string(rest)?;
        if !query.contains(&b':') {
            return None;
        }
        queries.push(query);
        rest = behind;
    }
    rest.is_empty().then_some((name, queries))
}

fn string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_at_checked(4)?;
    let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
    rest.split_at_checked(length).filter(|_| length <= 4096)
}
