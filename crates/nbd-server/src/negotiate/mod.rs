//! Option negotiation ("Fixed newstyle negotiation", "TLS support").
//!
//! Options are read to their exact length, never through a buffer that reads ahead. No plaintext is
//! left over after STARTTLS that could be mistaken for data received inside TLS.

mod contexts;
mod quota;
mod stream;

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::SessionError;
use super::export::{Export, Exports, ListEntry};
use super::wire::handshake::ClientFlags;
use super::wire::info::{
    BlockSizes, Info, InfoRequest, InfoType, TransmissionFlags, encode_export_name_reply,
};
use super::wire::option::{
    MAX_OPTION_DATA, Opt, OptionHeader, Rep, encode_server_data, push_error, push_reply,
};
use super::wire::{MAX_NAME, MAX_PAYLOAD, Printable};
use contexts::NegotiationState;
pub use contexts::SelectedContext;
pub use quota::{NegotiationLimits, NegotiationQuota};
use stream::stream_replies;

/// Outcome of the plaintext phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaintextOutcome {
    /// STARTTLS was acknowledged; the client's TLS handshake comes next.
    StartTls,
    /// The client aborted or closed the connection.
    ClientLeft,
}

/// Protection of the stream on which options are negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// No protection, and TLS is not offered ("NOTLS mode").
    Plain,
    /// TLS is active ("FORCEDTLS mode", after STARTTLS).
    Tls,
}

/// Runs the plaintext phase of a server that requires TLS ("FORCEDTLS mode"): accepts STARTTLS and
/// ABORT, and refuses everything else. No state survives STARTTLS except what was spent of the
/// client's `quota`.
///
/// # Errors
/// The stream failed, the client broke the protocol or used up its quota, or it cannot or does
/// not want to use TLS.
pub async fn plaintext_leg<S>(
    stream: &mut S,
    flags: ClientFlags,
    quota: &mut NegotiationQuota,
) -> Result<PlaintextOutcome, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // "The server MUST operate in NOTLS mode unless … the client replied with
    // NBD_FLAG_C_FIXED_NEWSTYLE": this server requires TLS, so it can't serve such a client.
    if !flags.contains(ClientFlags::FIXED_NEWSTYLE) {
        return Err(SessionError::TlsRequired);
    }
    while let Some((option, data)) = read_option(stream, quota).await? {
        let mut out = Vec::new();
        match option {
            Opt::STARTTLS if data.is_empty() => {
                push_reply(&mut out, option, Rep::ACK, &[]);
                send(stream, &out).await?;
                return Ok(PlaintextOutcome::StartTls);
            }
            // "The client MUST NOT send any additional data with the option."
            Opt::STARTTLS => push_error(&mut out, option, Rep::ERR_INVALID, NO_DATA_ALLOWED),
            Opt::ABORT => {
                acknowledge_abort(stream).await;
                return Ok(PlaintextOutcome::ClientLeft);
            }
            // "as this request cannot error, it MUST terminate the session"
            Opt::EXPORT_NAME => return Err(SessionError::TlsRequired),
            // "any other option, including NBD_OPT_INFO and unsupported options, … MUST
            // reply with NBD_REP_ERR_TLS_REQD"
            _ => push_error(
                &mut out,
                option,
                Rep::ERR_TLS_REQD,
                "TLS is required: enable TLS in the client",
            ),
        }
        send(stream, &out).await?;
    }
    Ok(PlaintextOutcome::ClientLeft)
}

/// Format of requests and replies in the transmission phase, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplyMode {
    /// Simple replies (the default).
    #[default]
    Simple,
    /// Structured replies (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// Extended headers, in requests too (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

/// Outcome of a successful negotiation.
#[derive(Debug)]
pub struct Negotiated<E> {
    /// The export to serve.
    pub export: Arc<E>,
    /// Format of requests and replies.
    pub reply_mode: ReplyMode,
    /// The metadata contexts that the client selected.
    pub contexts: Vec<SelectedContext>,
}

/// Handles options until the client chooses an export, which is returned, or leaves (`None`).
///
/// # Errors
/// The stream failed, the client broke the protocol or used up its quota, or it chose an
/// unknown export by `NBD_OPT_EXPORT_NAME`.
pub async fn negotiate<S, X>(
    stream: &mut S,
    flags: ClientFlags,
    security: Security,
    exports: &X,
    quota: &mut NegotiationQuota,
) -> Result<Option<Negotiated<X::Export>>, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    X: Exports,
{
    let mut state = NegotiationState::new();
    while let Some((option, data)) = read_option(stream, quota).await? {
        let mut out = Vec::new();
        match option {
            // "a client that has used NBD_OPT_EXTENDED_HEADERS … MUST NOT use this option": handled
            // like an unknown export.
            Opt::EXPORT_NAME => {
                let unknown = || SessionError::UnknownExport(Printable(&data).to_string());
                if state.reply_mode == ReplyMode::Extended {
                    return Err(unknown());
                }
                let export = resolve(&data, exports, &state).await.ok_or_else(unknown)?;
                let no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
                let flags = offered_flags(&state, &data);
                send(stream, &encode_export_name_reply(export.size(), flags, no_zeroes)).await?;
                return Ok(Some(state.into_negotiated(&data, export)));
            }
            Opt::ABORT => {
                acknowledge_abort(stream).await;
                return Ok(None);
            }
            Opt::GO | Opt::INFO => {
                let found = reply_info(&mut out, option, &data, exports, &state).await;
                if let Some((name, export)) = found
                    && option == Opt::GO
                {
                    send(stream, &out).await?;
                    return Ok(Some(state.into_negotiated(name, export)));
                }
            }
            // "the server SHOULD reject a request that includes data"
            Opt::STRUCTURED_REPLY | Opt::EXTENDED_HEADERS if !data.is_empty() => {
                push_error(&mut out, option, Rep::ERR_INVALID, NO_DATA_ALLOWED);
            }
            // "the server is unable to downgrade to structured replies … if extended headers
            // have already been enabled"
            Opt::STRUCTURED_REPLY if state.reply_mode == ReplyMode::Extended => push_error(
                &mut out,
                option,
                Rep::ERR_EXT_HEADER_REQD,
                "extended headers are already negotiated",
            ),
            Opt::STRUCTURED_REPLY => {
                state.reply_mode = ReplyMode::Structured;
                push_reply(&mut out, option, Rep::ACK, &[]);
            }
            Opt::EXTENDED_HEADERS => {
                state.reply_mode = ReplyMode::Extended;
                push_reply(&mut out, option, Rep::ACK, &[]);
            }
            Opt::LIST_META_CONTEXT => {
                contexts::reply_list(stream, &mut out, &data, exports).await?;
            }
            Opt::SET_META_CONTEXT => contexts::set(&mut out, &data, exports, &mut state).await,
            Opt::LIST => reply_list(stream, &mut out, &data, exports).await?,
            Opt::STARTTLS => refuse_starttls(&mut out, security),
            _ => push_error(
                &mut out,
                option,
                Rep::ERR_UNSUP,
                &format!("unsupported option {option}"),
            ),
        }
        send(stream, &out).await?;
    }
    Ok(None)
}

const NO_DATA_ALLOWED: &str = "this option takes no data";

/// Returns the transmission flags for the export that the client calls `name`. Only features that
/// work are advertised ("Transmission flags").
fn offered_flags<E: Export>(state: &NegotiationState<E>, name: &[u8]) -> TransmissionFlags {
    let always = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::READ_ONLY)
        .with(TransmissionFlags::SEND_FLUSH)
        .with(TransmissionFlags::CAN_MULTI_CONN)
        .with(TransmissionFlags::SEND_CACHE);
    let has_contexts =
        state.selection_for(name).is_some_and(|selection| !selection.contexts.is_empty());
    match state.reply_mode {
        ReplyMode::Simple => always,
        // "MUST leave this flag clear if neither structured replies nor extended headers
        // have been negotiated"
        ReplyMode::Structured => always.with(TransmissionFlags::SEND_DF),
        // "SHOULD NOT advertise this bit … if the client does not negotiate metacontexts"
        ReplyMode::Extended if has_contexts => {
            always.with(TransmissionFlags::SEND_DF).with(TransmissionFlags::BLOCK_STATUS_PAYLOAD)
        }
        ReplyMode::Extended => always.with(TransmissionFlags::SEND_DF),
    }
}

/// Handles INFO and GO. Returns the export, and its name as the client gave it, if the reply was a
/// success.
async fn reply_info<'a, X: Exports>(
    out: &mut Vec<u8>,
    option: Opt,
    data: &'a [u8],
    exports: &X,
    state: &NegotiationState<X::Export>,
) -> Option<(&'a [u8], Arc<X::Export>)> {
    let request = match InfoRequest::decode(data) {
        Ok(request) => request,
        Err(malformed) => {
            push_error(out, option, Rep::ERR_INVALID, &malformed.to_string());
            return None;
        }
    };
    let export =
        or_reply_unknown(out, option, request.name, resolve(request.name, exports, state).await)?;

    let mut push = |info: Info| push_reply(out, option, Rep::INFO, &info.encode());
    push(Info::Export { size: export.size(), flags: offered_flags(state, request.name) });
    if request.wanted.contains(&InfoType::NAME) {
        push(Info::Name(export.name().to_owned()));
    }
    if request.wanted.contains(&InfoType::DESCRIPTION) {
        push(Info::Description(export.description().to_owned()));
    }
    if request.wanted.contains(&InfoType::BLOCK_SIZE) {
        push(Info::BlockSize(BlockSizes {
            minimum: 1,
            preferred: export.preferred_block_size(),
            maximum: MAX_PAYLOAD,
        }));
    }
    push_reply(out, option, Rep::ACK, &[]);
    Some((request.name, export))
}

/// Returns the export of that name: the one whose contexts were selected if the name is the same,
/// otherwise a newly looked-up one.
async fn resolve<X: Exports>(
    name: &[u8],
    exports: &X,
    state: &NegotiationState<X::Export>,
) -> Option<Arc<X::Export>> {
    match state.selection_for(name) {
        Some(selection) => Some(Arc::clone(&selection.export)),
        None => exports.find(name).await,
    }
}

/// Passes on an export that was `found` by `name`; writes an error reply if there is none.
fn or_reply_unknown<E>(
    out: &mut Vec<u8>,
    option: Opt,
    name: &[u8],
    found: Option<Arc<E>>,
) -> Option<Arc<E>> {
    if found.is_none() {
        push_unknown(out, option, name);
    }
    found
}

fn push_unknown(out: &mut Vec<u8>, option: Opt, name: &[u8]) {
    let message = match name {
        [] => "no default export; NBD_OPT_LIST lists the exports".to_owned(),
        name => format!("no export named {}", Printable(name)),
    };
    push_error(out, option, Rep::ERR_UNKNOWN, &message);
}

async fn reply_list<S: AsyncWrite + Unpin, X: Exports>(
    stream: &mut S,
    out: &mut Vec<u8>,
    data: &[u8],
    exports: &X,
) -> io::Result<()> {
    // "The server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID."
    if !data.is_empty() {
        push_error(out, Opt::LIST, Rep::ERR_INVALID, NO_DATA_ALLOWED);
        return Ok(());
    }
    let encode =
        |ListEntry { name, description }: &ListEntry| encode_server_data(name, description);
    let each = (Opt::LIST, Rep::SERVER);
    stream_replies(stream, out, each, |listings| exports.list(listings), encode).await?;
    push_reply(out, Opt::LIST, Rep::ACK, &[]);
    Ok(())
}

fn refuse_starttls(out: &mut Vec<u8>, security: Security) {
    let (reply, message) = match security {
        // "If the server receives NBD_OPT_STARTTLS when TLS has already been negotiated,
        // it MUST reply with NBD_REP_ERR_INVALID."
        Security::Tls => (Rep::ERR_INVALID, "TLS is already active"),
        Security::Plain => {
            (Rep::ERR_POLICY, "this server doesn't offer TLS: disable TLS in the client")
        }
    };
    push_error(out, Opt::STARTTLS, reply, message);
}

/// Reads the next option and its data. Returns `None` if the client closed the connection between
/// two options.
async fn read_option<S>(
    stream: &mut S,
    quota: &mut NegotiationQuota,
) -> Result<Option<(Opt, Vec<u8>)>, SessionError>
where
    S: AsyncRead + Unpin,
{
    let mut head = [0; OptionHeader::SIZE];
    let [first, rest @ ..] = &mut head;
    match stream.read_u8().await {
        Ok(byte) => *first = byte,
        Err(end) if end.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    stream.read_exact(rest).await?;

    let OptionHeader { option, length } = OptionHeader::decode(&head)?;
    let cap = match option {
        // The data is the name itself, so nothing longer than a name is valid.
        Opt::EXPORT_NAME => MAX_NAME,
        _ => MAX_OPTION_DATA,
    };
    if length > cap {
        return Err(SessionError::OptionTooLarge { option, length });
    }
    quota.charge(length)?;
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok(Some((option, data)))
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// Acknowledges ABORT. "The server SHOULD gracefully handle the client sending an NBD_OPT_ABORT and
/// closing the connection without waiting for a reply", so errors are ignored.
async fn acknowledge_abort<S: AsyncWrite + Unpin>(stream: &mut S) {
    let mut out = Vec::new();
    push_reply(&mut out, Opt::ABORT, Rep::ACK, &[]);
    if send(stream, &out).await.is_ok() {
        stream.shutdown().await.unwrap_or_default();
    }
}
