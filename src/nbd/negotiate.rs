//! Option haggling ("Fixed newstyle negotiation", "TLS support").
//!
//! Options are read to their exact length, never through a buffer that reads ahead:
//! behind STARTTLS no plaintext is left that could be mistaken for something encrypted.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::SessionError;
use super::export::{Export, Exports};
use super::wire::handshake::ClientFlags;
use super::wire::info::{
    BlockSizes, Info, InfoRequest, InfoType, TransmissionFlags, encode_export_name_reply,
};
use super::wire::option::{
    MAX_OPTION_DATA, Opt, OptionHeader, Rep, push_error, push_reply, server_data,
};
use super::wire::{MAX_NAME, MAX_PAYLOAD, Printable};

/// How the leg in clear ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaintextOutcome {
    /// The client was told to begin its TLS handshake.
    StartTls,
    /// The client left.
    Ended,
}

/// What protects the stream on which options are haggled over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// Nothing, and TLS isn't offered ("NOTLS mode").
    Plain,
    /// TLS is running ("FORCEDTLS mode", second half).
    Tls,
}

/// The leg in clear of a server that requires TLS ("FORCEDTLS mode"): answers STARTTLS
/// and ABORT, and refuses everything else. It keeps no state, so there is none that
/// could survive STARTTLS.
///
/// # Errors
/// The stream failed, the client broke the protocol, or it can't or won't use TLS.
pub async fn plaintext_leg<S>(
    stream: &mut S,
    flags: ClientFlags,
) -> Result<PlaintextOutcome, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // "The server MUST operate in NOTLS mode unless … the client replied with
    // NBD_FLAG_C_FIXED_NEWSTYLE": with such a client this server can't talk at all.
    if !flags.contains(ClientFlags::FIXED_NEWSTYLE) {
        return Err(SessionError::TlsRequired);
    }
    while let Some((option, data)) = read_option(stream).await? {
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
                send_farewell(stream).await;
                return Ok(PlaintextOutcome::Ended);
            }
            // "as this request cannot error, it MUST terminate the session"
            Opt::EXPORT_NAME => return Err(SessionError::TlsRequired),
            // "any other option, including NBD_OPT_INFO and unsupported options, … MUST
            // reply with NBD_REP_ERR_TLS_REQD"
            _ => push_error(
                &mut out,
                option,
                Rep::ERR_TLS_REQD,
                "this server requires TLS: connect with TLS switched on",
            ),
        }
        send(stream, &out).await?;
    }
    Ok(PlaintextOutcome::Ended)
}

/// How requests are answered, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplyMode {
    /// Simple replies.
    #[default]
    Simple,
    /// Structured replies (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
}

/// What the client chose.
#[derive(Debug)]
pub struct Chosen<E> {
    /// What to serve.
    pub export: Arc<E>,
    /// How to answer.
    pub replies: ReplyMode,
}

/// Haggles until the client chooses an export, which is returned, or leaves (`None`).
///
/// # Errors
/// The stream failed, the client broke the protocol, or it chose an unknown export by
/// `NBD_OPT_EXPORT_NAME`.
pub async fn negotiate<S, X>(
    stream: &mut S,
    flags: ClientFlags,
    security: Security,
    exports: &X,
) -> Result<Option<Chosen<X::Export>>, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    X: Exports,
{
    let mut replies = ReplyMode::default();
    while let Some((option, data)) = read_option(stream).await? {
        let mut out = Vec::new();
        match option {
            Opt::EXPORT_NAME => {
                let export = exports
                    .find(&data)
                    .await
                    .ok_or_else(|| SessionError::UnknownExport(Printable(&data).to_string()))?;
                let no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
                let flags = offered_flags(replies);
                send(stream, &encode_export_name_reply(export.size(), flags, no_zeroes)).await?;
                return Ok(Some(Chosen { export, replies }));
            }
            Opt::ABORT => {
                send_farewell(stream).await;
                return Ok(None);
            }
            Opt::GO | Opt::INFO => {
                let found = describe(&mut out, option, &data, exports, replies).await;
                if let Some(export) = found
                    && option == Opt::GO
                {
                    send(stream, &out).await?;
                    return Ok(Some(Chosen { export, replies }));
                }
            }
            Opt::STRUCTURED_REPLY if data.is_empty() => {
                replies = ReplyMode::Structured;
                push_reply(&mut out, option, Rep::ACK, &[]);
            }
            // "the server SHOULD reject a request that includes data"
            Opt::STRUCTURED_REPLY => {
                push_error(&mut out, option, Rep::ERR_INVALID, NO_DATA_ALLOWED);
            }
            Opt::LIST => list(&mut out, &data, exports).await,
            Opt::STARTTLS => refuse_starttls(&mut out, security),
            _ => push_error(
                &mut out,
                option,
                Rep::ERR_UNSUP,
                &format!("this server doesn't know the option {option}"),
            ),
        }
        send(stream, &out).await?;
    }
    Ok(None)
}

const NO_DATA_ALLOWED: &str = "this option takes no data";

/// What works, and nothing else ("Transmission flags").
fn offered_flags(replies: ReplyMode) -> TransmissionFlags {
    let always = TransmissionFlags::HAS_FLAGS
        .with(TransmissionFlags::READ_ONLY)
        .with(TransmissionFlags::SEND_FLUSH)
        .with(TransmissionFlags::CAN_MULTI_CONN);
    match replies {
        ReplyMode::Simple => always,
        // "MUST leave this flag clear if structured replies have not been negotiated"
        ReplyMode::Structured => always.with(TransmissionFlags::SEND_DF),
    }
}

/// Answers INFO and GO; returns the export if the answer was a success.
async fn describe<X: Exports>(
    out: &mut Vec<u8>,
    option: Opt,
    data: &[u8],
    exports: &X,
    replies: ReplyMode,
) -> Option<Arc<X::Export>> {
    let request = match InfoRequest::decode(data) {
        Ok(request) => request,
        Err(malformed) => {
            push_error(out, option, Rep::ERR_INVALID, &malformed.to_string());
            return None;
        }
    };
    let Some(export) = exports.find(request.name).await else {
        let message = match request.name {
            [] => "there is no default export here; LIST names the exports".to_owned(),
            name => format!("there is no export {} here", Printable(name)),
        };
        push_error(out, option, Rep::ERR_UNKNOWN, &message);
        return None;
    };

    let mut push = |info: Info| push_reply(out, option, Rep::INFO, &info.encode());
    push(Info::Export { size: export.size(), flags: offered_flags(replies) });
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
    Some(export)
}

async fn list<X: Exports>(out: &mut Vec<u8>, data: &[u8], exports: &X) {
    // "The server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID."
    if !data.is_empty() {
        push_error(out, Opt::LIST, Rep::ERR_INVALID, NO_DATA_ALLOWED);
        return;
    }
    for export in exports.list().await {
        let entry = server_data(export.name(), export.description());
        push_reply(out, Opt::LIST, Rep::SERVER, &entry);
    }
    push_reply(out, Opt::LIST, Rep::ACK, &[]);
}

fn refuse_starttls(out: &mut Vec<u8>, security: Security) {
    let (reply, message) = match security {
        // "If the server receives NBD_OPT_STARTTLS when TLS has already been negotiated,
        // it MUST reply with NBD_REP_ERR_INVALID."
        Security::Tls => (Rep::ERR_INVALID, "TLS is already running"),
        Security::Plain => {
            (Rep::ERR_POLICY, "this server runs without TLS: connect with TLS switched off")
        }
    };
    push_error(out, Opt::STARTTLS, reply, message);
}

/// The next option with its data, or `None` if the client closed between two options.
async fn read_option<S>(stream: &mut S) -> Result<Option<(Opt, Vec<u8>)>, SessionError>
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
        // Its data is the name itself: nothing longer than a name can be meant.
        Opt::EXPORT_NAME => MAX_NAME,
        _ => MAX_OPTION_DATA,
    };
    if length > cap {
        return Err(SessionError::OptionTooLarge { option, length });
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok(Some((option, data)))
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// Acknowledges ABORT. "The server SHOULD gracefully handle the client sending an
/// NBD_OPT_ABORT and closing the connection without waiting for a reply", so a failure
/// here is none.
async fn send_farewell<S: AsyncWrite + Unpin>(stream: &mut S) {
    let mut out = Vec::new();
    push_reply(&mut out, Opt::ABORT, Rep::ACK, &[]);
    if send(stream, &out).await.is_ok() {
        stream.shutdown().await.unwrap_or_default();
    }
}
