//! Option negotiation, byte by byte ("Option haggling", "TLS support", "Metadata querying").

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use nbd_server::wire::handshake::ClientFlags;
use nbd_server::{
    Export, ExportSet, Negotiated, NegotiationLimits, PlaintextOutcome, ReadError, ReplyMode,
    Security, Segment, SessionError, Span, greet, negotiate, plaintext_leg,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf, join};

use super::raw::{FLAGS, OPT_GO, OPT_LIST, OPT_STARTTLS, option};

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;
const OPT_EXTENDED_HEADERS: u32 = 11;
const OPT_UNKNOWN: u32 = 99;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const ERR_UNSUP: u32 = (1 << 31) + 1;
const ERR_POLICY: u32 = (1 << 31) + 2;
const ERR_INVALID: u32 = (1 << 31) + 3;
const ERR_TLS_REQD: u32 = (1 << 31) + 5;
const ERR_UNKNOWN: u32 = (1 << 31) + 6;
const ERR_TOO_BIG: u32 = (1 << 31) + 9;
const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

const FIXED_NEWSTYLE: u32 = 1;
/// HAS_FLAGS, READ_ONLY, SEND_FLUSH, CAN_MULTI_CONN, SEND_CACHE.
const ALWAYS: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 10;
const SEND_DF: u16 = 1 << 7;
const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

const SIZE: u64 = 4096;

/// An export with any number of metadata contexts.
#[derive(Debug)]
struct Disk {
    contexts: Vec<String>,
}

impl Disk {
    fn new(contexts: usize) -> ExportSet<Self> {
        let contexts = (0..contexts).map(|number| format!("test:{number}")).collect();
        ExportSet::single(Self { contexts })
    }
}

impl Export for Disk {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn description(&self) -> &'static str {
        "a disk"
    }

    fn size(&self) -> u64 {
        SIZE
    }

    async fn read(&self, _: Span, _: impl FnMut(u64, Segment) + Send) -> Result<(), ReadError> {
        Ok(())
    }

    fn contexts(&self) -> Vec<&str> {
        self.contexts.iter().map(String::as_str).collect()
    }
}

type Outcome = Result<Option<Negotiated<Disk>>, SessionError>;

/// One reply to an option: the option, the kind of reply, and its data.
type Reply = (u32, u32, Vec<u8>);

/// Sends `options` and then the end of the stream. Returns the outcome and all bytes received.
async fn run_on(
    exports: &ExportSet<Disk>,
    flags: u32,
    security: Security,
    options: &[Vec<u8>],
) -> (Outcome, Vec<u8>) {
    let (mut client, mut server) = tokio::io::duplex(1 << 20);
    client.write_all(&options.concat()).await.unwrap();
    client.shutdown().await.unwrap();
    let mut quota = NegotiationLimits::default().quota();
    let outcome = negotiate(&mut server, ClientFlags(flags), security, exports, &mut quota).await;
    drop(server);
    let mut received = Vec::new();
    client.read_to_end(&mut received).await.unwrap();
    (outcome, received)
}

async fn run(options: &[Vec<u8>]) -> (Outcome, Vec<Reply>) {
    let (outcome, received) = run_on(&Disk::new(2), FLAGS, Security::Plain, options).await;
    (outcome, replies(&received))
}

fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<20>() {
        assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let field = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let (data, rest) = rest.split_at(field(16) as usize);
        replies.push((field(8), field(12), data.to_vec()));
        bytes = rest;
    }
    assert!(bytes.is_empty());
    replies
}

/// Returns the kinds of all replies.
fn kinds(replies: &[Reply]) -> Vec<u32> {
    replies.iter().map(|(_, kind, _)| *kind).collect()
}

fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
}

fn info(number: u32, name: &str) -> Vec<u8> {
    option(number, &[string(name), vec![0, 0]].concat())
}

fn contexts(number: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let count = u32::try_from(queries.len()).unwrap().to_be_bytes().to_vec();
    let queries = queries.iter().map(|query| string(query));
    let data: Vec<_> = [string(name), count].into_iter().chain(queries).collect();
    option(number, &data.concat())
}

fn export_info(flags: u16) -> Vec<u8> {
    [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// Returns the transmission flags that GO reports after `options`, and the outcome.
async fn flags_after(options: &[Vec<u8>]) -> (u16, Negotiated<Disk>) {
    let (outcome, replies) = run(&[options, &[info(OPT_GO, "disk")]].concat()).await;
    let (_, _, data) = replies.iter().find(|(option, ..)| *option == OPT_GO).unwrap();
    (u16::from_be_bytes([data[10], data[11]]), outcome.unwrap().unwrap())
}

#[tokio::test]
async fn greeting_rejects_flags_that_were_not_offered() {
    for (flags, is_valid) in [(0, true), (1, true), (3, true), (2, true), (4, false), (7, false)] {
        let (mut client, mut server) = tokio::io::duplex(64);
        client.write_all(&u32::to_be_bytes(flags)).await.unwrap();
        match greet(&mut server).await {
            Ok(got) => assert!(is_valid && got.0 == flags),
            Err(error) => {
                assert!(!is_valid && matches!(error, SessionError::InvalidClientFlags(_)));
            }
        }
    }
}

/// Runs the plaintext phase. Returns the outcome, the kinds of replies, and the number of bytes
/// left unread.
async fn plaintext(
    flags: u32,
    bytes: &[u8],
) -> (Result<PlaintextOutcome, SessionError>, Vec<u32>, usize) {
    let (mut client, mut server) = tokio::io::duplex(1 << 20);
    client.write_all(bytes).await.unwrap();
    client.shutdown().await.unwrap();
    let mut quota = NegotiationLimits::default().quota();
    let outcome = plaintext_leg(&mut server, ClientFlags(flags), &mut quota).await;
    let mut unread = Vec::new();
    server.read_to_end(&mut unread).await.unwrap();
    drop(server);
    let mut received = Vec::new();
    client.read_to_end(&mut received).await.unwrap();
    (outcome, kinds(&replies(&received)), unread.len())
}

#[tokio::test]
async fn plaintext_phase_accepts_only_starttls_and_abort() {
    let injected = option(OPT_GO, &[0; 6]);
    let start = [option(OPT_STARTTLS, b""), injected.clone()].concat();
    let (outcome, kinds, unread) = plaintext(FLAGS, &start).await;
    assert!(matches!(outcome, Ok(PlaintextOutcome::StartTls)));
    assert_eq!((kinds, unread), (vec![REP_ACK], injected.len()));

    let refused = [
        option(OPT_STARTTLS, b"x"),
        info(OPT_GO, "disk"),
        info(OPT_INFO, "disk"),
        option(OPT_LIST, b""),
        option(OPT_UNKNOWN, b""),
        option(OPT_ABORT, b""),
    ];
    let (outcome, kinds, _) = plaintext(FLAGS, &refused.concat()).await;
    assert!(matches!(outcome, Ok(PlaintextOutcome::ClientLeft)));
    let [tls, ack] = [ERR_TLS_REQD, REP_ACK];
    assert_eq!(kinds, [ERR_INVALID, tls, tls, tls, tls, ack]);

    let (outcome, kinds, _) = plaintext(FLAGS, &option(OPT_EXPORT_NAME, b"disk")).await;
    assert!(matches!(outcome, Err(SessionError::TlsRequired)) && kinds.is_empty());
    // A client without fixed newstyle negotiation cannot send STARTTLS.
    let (outcome, kinds, unread) = plaintext(0, &start).await;
    assert!(matches!(outcome, Err(SessionError::TlsRequired)) && kinds.is_empty());
    assert_eq!(unread, start.len());
    // The client closed the connection, between options and within one.
    assert!(matches!(plaintext(FLAGS, b"").await.0, Ok(PlaintextOutcome::ClientLeft)));
    assert!(matches!(plaintext(FLAGS, &start[..7]).await.0, Err(SessionError::Io(_))));
}

#[tokio::test]
async fn info_continues_and_go_ends_the_negotiation() {
    let (outcome, replies) = run(&[
        info(OPT_INFO, "disk"),
        info(OPT_GO, "other"),
        option(OPT_GO, b"x"),
        info(OPT_GO, "disk"),
        info(OPT_INFO, "disk"),
    ])
    .await;
    let negotiated = outcome.unwrap().unwrap();
    assert_eq!((negotiated.export.name(), negotiated.reply_mode), ("disk", ReplyMode::Simple));
    assert!(negotiated.contexts.is_empty());
    let [info, ack] = [REP_INFO, REP_ACK];
    assert_eq!(kinds(&replies), [info, ack, ERR_UNKNOWN, ERR_INVALID, info, ack]);
    assert_eq!(replies[0], (OPT_INFO, REP_INFO, export_info(ALWAYS)));
    assert_eq!(replies[4], (OPT_GO, REP_INFO, export_info(ALWAYS)));
}

#[tokio::test]
async fn requested_information_is_sent() {
    let wanted = [string("disk"), vec![0, 3, 0, 1, 0, 2, 0, 3]].concat();
    let (_, replies) = run(&[option(OPT_INFO, &wanted)]).await;
    let block_size: [u32; 3] = [1, 4096, 32 * 1024 * 1024];
    let sizes: Vec<u8> = block_size.into_iter().flat_map(u32::to_be_bytes).collect();
    let expected = [
        export_info(ALWAYS),
        b"\0\x01disk".to_vec(),
        b"\0\x02a disk".to_vec(),
        [vec![0, 3], sizes].concat(),
        vec![],
    ];
    assert!(replies.iter().map(|(_, _, data)| data).eq(&expected));
}

#[tokio::test]
async fn export_name_replies_with_or_without_zeroes() {
    let reply = [&SIZE.to_be_bytes()[..], &ALWAYS.to_be_bytes()].concat();
    for (flags, zeroes) in [(FLAGS, 0), (FIXED_NEWSTYLE, 124)] {
        for name in ["disk", ""] {
            let options = [option(OPT_EXPORT_NAME, name.as_bytes())];
            let (outcome, received) = run_on(&Disk::new(0), flags, Security::Plain, &options).await;
            assert_eq!(outcome.unwrap().unwrap().export.name(), "disk");
            assert_eq!(received, [reply.clone(), vec![0; zeroes]].concat());
        }
    }
    let (outcome, replies) = run(&[option(OPT_EXPORT_NAME, b"other")]).await;
    assert!(matches!(outcome, Err(SessionError::UnknownExport(_))) && replies.is_empty());
    // "a client that has used NBD_OPT_EXTENDED_HEADERS … MUST NOT use this option"
    let (outcome, replies) =
        run(&[option(OPT_EXTENDED_HEADERS, b""), option(OPT_EXPORT_NAME, b"disk")]).await;
    assert!(matches!(outcome, Err(SessionError::UnknownExport(_))));
    assert_eq!(kinds(&replies), [REP_ACK]);
}

#[tokio::test]
async fn reply_modes_are_negotiated() {
    let [structured, extended] =
        [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS].map(|number| option(number, b""));
    let with_data = [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS].map(|number| option(number, b"x"));
    let (outcome, replies) = run(&[&with_data[..], &[info(OPT_GO, "disk")]].concat()).await;
    assert_eq!(kinds(&replies)[..2], [ERR_INVALID, ERR_INVALID]);
    assert_eq!(outcome.unwrap().unwrap().reply_mode, ReplyMode::Simple);

    let (flags, negotiated) = flags_after(std::slice::from_ref(&structured)).await;
    assert_eq!((flags, negotiated.reply_mode), (ALWAYS | SEND_DF, ReplyMode::Structured));
    let (flags, negotiated) = flags_after(&[structured.clone(), extended.clone()]).await;
    assert_eq!((flags, negotiated.reply_mode), (ALWAYS | SEND_DF, ReplyMode::Extended));
    let (outcome, replies) = run(&[extended, structured, info(OPT_GO, "disk")]).await;
    assert_eq!(kinds(&replies)[..2], [REP_ACK, ERR_EXT_HEADER_REQD]);
    assert_eq!(outcome.unwrap().unwrap().reply_mode, ReplyMode::Extended);
}

#[tokio::test]
async fn other_options_are_answered_and_abort_ends_the_negotiation() {
    let (outcome, replies) = run(&[
        option(OPT_LIST, b""),
        option(OPT_LIST, b"x"),
        option(OPT_UNKNOWN, b"data"),
        option(OPT_ABORT, b""),
        option(OPT_LIST, b""),
    ])
    .await;
    assert!(outcome.unwrap().is_none());
    let expected = [REP_SERVER, REP_ACK, ERR_INVALID, ERR_UNSUP, REP_ACK];
    assert_eq!(kinds(&replies), expected);
    assert_eq!(replies[0].2, [string("disk"), b"a disk".to_vec()].concat());
    for (security, reply) in [(Security::Plain, ERR_POLICY), (Security::Tls, ERR_INVALID)] {
        let options = [option(OPT_STARTTLS, b"")];
        let (outcome, received) = run_on(&Disk::new(0), FLAGS, security, &options).await;
        assert!(outcome.unwrap().is_none());
        assert_eq!(kinds(&self::replies(&received)), [reply]);
    }
}

#[tokio::test]
async fn option_lengths_are_capped() {
    const MAX: usize = 64 * 1024;
    let (outcome, replies) = run(&[option(OPT_UNKNOWN, &[0; MAX])]).await;
    assert!(outcome.unwrap().is_none());
    assert_eq!(kinds(&replies), [ERR_UNSUP]);
    let (outcome, replies) = run(&[option(OPT_UNKNOWN, &[0; MAX + 1])]).await;
    assert!(matches!(outcome, Err(SessionError::OptionTooLarge { length: 65_537, .. })));
    assert!(replies.is_empty());
    let (outcome, _) = run(&[option(OPT_EXPORT_NAME, &[b'x'; 4096])]).await;
    assert!(matches!(outcome, Err(SessionError::UnknownExport(_))));
    let (outcome, _) = run(&[option(OPT_EXPORT_NAME, &[b'x'; 4097])]).await;
    assert!(matches!(outcome, Err(SessionError::OptionTooLarge { length: 4097, .. })));
    // The end of the stream within an option is an error; a wrong magic is a protocol violation.
    let whole = option(OPT_UNKNOWN, b"data");
    for cut in 1..whole.len() {
        let (outcome, _) = run(&[whole[..cut].to_vec()]).await;
        assert!(matches!(outcome, Err(SessionError::Io(_))), "{cut}");
    }
    assert!(matches!(run(&[vec![0; 16]]).await.0, Err(SessionError::Malformed(_))));
}

#[tokio::test]
async fn contexts_are_listed() {
    let (_, replies) = run(&[
        contexts(OPT_LIST_META_CONTEXT, "disk", &[]),
        contexts(OPT_LIST_META_CONTEXT, "disk", &["test:1"]),
        contexts(OPT_LIST_META_CONTEXT, "other", &[]),
        contexts(OPT_LIST_META_CONTEXT, "disk", &["nocolon"]),
    ])
    .await;
    let [context, ack] = [REP_META_CONTEXT, REP_ACK];
    assert_eq!(kinds(&replies), [context, context, ack, context, ack, ERR_UNKNOWN, ERR_INVALID]);
    // "The metadata context ID in these replies is reserved and SHOULD be … zero"
    assert_eq!(replies[1].2, b"\0\0\0\0test:1");
    assert_eq!(replies[3].2, b"\0\0\0\0test:1");
}

#[tokio::test]
async fn contexts_are_selected_for_the_name_they_were_selected_by() {
    let [structured, extended] =
        [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS].map(|number| option(number, b""));
    let select = |queries: &[&str]| contexts(OPT_SET_META_CONTEXT, "disk", queries);
    let (_, replies) = run(&[select(&["test:0"])]).await;
    assert_eq!(kinds(&replies), [ERR_INVALID]);

    let (flags, negotiated) =
        flags_after(&[structured.clone(), select(&["test:1", "test:9", "test:0"])]).await;
    assert_eq!(flags, ALWAYS | SEND_DF);
    let selected: Vec<_> = negotiated.contexts.iter().map(|it| (it.id, it.position)).collect();
    assert_eq!(selected, [(1, 0), (2, 1)]);
    let (flags, _) = flags_after(&[extended.clone(), select(&["test:1"])]).await;
    assert_eq!(flags, ALWAYS | SEND_DF | BLOCK_STATUS_PAYLOAD);
    // Nothing that exists was selected; a later option replaced the selection, also when it failed.
    let failing = contexts(OPT_SET_META_CONTEXT, "other", &["test:1"]);
    for last in [select(&["test:9"]), select(&[]), failing] {
        let (flags, negotiated) = flags_after(&[extended.clone(), select(&["test:1"]), last]).await;
        assert_eq!((flags, negotiated.contexts.len()), (ALWAYS | SEND_DF, 0));
    }
    // The default export is the same one by another name.
    let (outcome, _) = run(&[structured, select(&["test:1"]), info(OPT_GO, "")]).await;
    assert!(outcome.unwrap().unwrap().contexts.is_empty());
}

#[tokio::test]
async fn at_most_64_contexts_can_be_selected() {
    for (count, is_accepted) in [(64, true), (65, false), (66, false)] {
        let names: Vec<String> = (0..count).map(|number| format!("test:{number}")).collect();
        let queries: Vec<&str> = names.iter().map(String::as_str).collect();
        let options = [
            option(OPT_STRUCTURED_REPLY, b""),
            contexts(OPT_SET_META_CONTEXT, "disk", &queries),
            info(OPT_GO, "disk"),
        ];
        let (outcome, received) = run_on(&Disk::new(count), FLAGS, Security::Plain, &options).await;
        let selected = outcome.unwrap().unwrap().contexts.len();
        let refused = kinds(&replies(&received)).contains(&ERR_TOO_BIG);
        assert_eq!((selected, refused), if is_accepted { (count, false) } else { (0, true) });
    }
}

/// A stream whose reads fail.
struct Reset;

impl AsyncRead for Reset {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }
}

/// Only the end of the stream means that the client has left.
#[tokio::test]
async fn a_failing_stream_is_an_error() {
    let mut stream = join(Reset, tokio::io::sink());
    let mut quota = NegotiationLimits::default().quota();
    let flags = ClientFlags(FLAGS);
    let is_reset = |error: SessionError| match error {
        SessionError::Io(error) => error.kind() == io::ErrorKind::ConnectionReset,
        _ => false,
    };
    let left = plaintext_leg(&mut stream, flags, &mut quota).await;
    assert!(left.is_err_and(is_reset));
    let outcome = negotiate(&mut stream, flags, Security::Plain, &Disk::new(0), &mut quota).await;
    assert!(outcome.is_err_and(is_reset));
}
