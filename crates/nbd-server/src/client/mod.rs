//! A small NBD client: it can greet, start TLS, list exports, choose an export and read from it.
//!
//! It sends one request at a time and is meant for self-tests and diagnostics, not for speed. The
//! length and number of accepted replies are bounded. Timeouts are up to the caller.

mod transmission;

use std::io;

pub use transmission::Transmission;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::ReplyMode;
use super::wire::handshake::{ClientFlags, Greeting, HandshakeFlags};
use super::wire::info::{BlockSizes, Info, InfoRequest, InfoType, TransmissionFlags};
use super::wire::meta::MetaRequest;
use super::wire::option::{MAX_OPTION_DATA, Opt, OptionReplyHeader, Rep, encode_option};
use super::wire::reply::ErrorCode;
use super::wire::{FieldReader, Malformed};

/// Maximum number of exports accepted in a list; a server could send an endless one.
pub const MAX_LISTED: usize = 20_000;
/// Maximum total size of the replies to one option, in bytes; their names and descriptions are
/// kept.
const MAX_LISTED_BYTES: usize = 16 * 1024 * 1024;
/// Maximum number of replies to any other option, not counting the final one. There are four kinds
/// of information, and a few metadata contexts per bitmap.
const MAX_REPLIES: usize = 4096;

/// Reason why the client could not proceed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server sent bytes that are not valid NBD.
    #[error("the server violated the protocol: {0}")]
    Malformed(#[from] Malformed),
    /// The server does not offer the fixed newstyle negotiation.
    #[error("the server doesn't support fixed newstyle negotiation")]
    NotFixedNewstyle,
    /// The server refused an option.
    #[error("the server replied to {option} with {reply}: {message}")]
    Refused {
        /// The option that was sent.
        option: Opt,
        /// The server's error reply.
        reply: Rep,
        /// The server's message, which may be empty.
        message: String,
    },
    /// The server's reply is not a valid reply to the option.
    #[error("unexpected reply {reply} to {option}")]
    UnexpectedOptionReply {
        /// The option that was sent.
        option: Opt,
        /// The server's reply.
        reply: Rep,
    },
    /// The server's reply is not a valid reply to the request, which the field names.
    #[error("unexpected reply to {0}")]
    UnexpectedReply(&'static str),
    /// The server sent too many replies to an option, or too many bytes.
    #[error("more than {limit} replies to {option}, or more than {MAX_LISTED_BYTES} bytes")]
    TooManyReplies {
        /// The option that was sent.
        option: Opt,
        /// Maximum number of replies accepted.
        limit: usize,
    },
    /// A request failed.
    #[error("the request failed with {0}")]
    Failed(ErrorCode),
    /// A request failed, and the server sent a message.
    #[error("the request failed with {error}: {message}")]
    FailedWithMessage {
        /// The error code.
        error: ErrorCode,
        /// The server's message.
        message: String,
    },
}

/// Information about an export from GO, INFO or EXPORT_NAME.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: TransmissionFlags,
    /// Canonical name, if given.
    pub name: Option<String>,
    /// Description, if given.
    pub description: Option<String>,
    /// Block size constraints, if given.
    pub block_sizes: Option<BlockSizes>,
}

/// Reads the server's greeting and replies with the client's flags.
///
/// # Errors
/// The stream failed, or the server does not speak fixed newstyle NBD.
pub async fn greet<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut bytes = [0; Greeting::SIZE];
    stream.read_exact(&mut bytes).await?;
    let greeting = Greeting::decode(&bytes)?;
    if !greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
        return Err(ClientError::NotFixedNewstyle);
    }
    reply_to_greeting(stream, greeting).await.map(drop)
}

/// Replies to a greeting that has been read, accepting the features that it offers. Returns the
/// flags sent.
///
/// # Errors
/// The stream failed.
pub async fn reply_to_greeting<S>(
    stream: &mut S,
    greeting: Greeting,
) -> Result<ClientFlags, ClientError>
where
    S: AsyncWrite + Unpin,
{
    let mut flags = ClientFlags::FIXED_NEWSTYLE;
    if greeting.flags.contains(HandshakeFlags::NO_ZEROES) {
        flags = flags.with(ClientFlags::NO_ZEROES);
    }
    stream.write_all(&flags.0.to_be_bytes()).await?;
    stream.flush().await?;
    Ok(flags)
}

/// Sends STARTTLS. After this returns, the client sends its TLS handshake next.
///
/// # Errors
/// The stream failed, or the server refused.
pub async fn start_tls<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    expect_ack(stream, Opt::STARTTLS).await
}

/// Negotiates structured replies. Pass [`ReplyMode::Structured`] to [`go_with_mode`] afterwards.
///
/// # Errors
/// The stream failed, or the server refused.
pub async fn negotiate_structured_replies<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    expect_ack(stream, Opt::STRUCTURED_REPLY).await
}

/// Negotiates extended headers. Pass [`ReplyMode::Extended`] to [`go_with_mode`] afterwards.
///
/// # Errors
/// The stream failed, or the server refused.
pub async fn negotiate_extended_headers<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    expect_ack(stream, Opt::EXTENDED_HEADERS).await
}

/// Ends the session during negotiation, and waits for the server's acknowledgment.
///
/// # Errors
/// The stream failed, or the server refused.
pub async fn abort<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    expect_ack(stream, Opt::ABORT).await
}

/// Returns the names of the exports with their descriptions: at most [`MAX_LISTED`].
///
/// # Errors
/// The stream failed, the server refused, or its list is too long.
pub async fn list<S>(stream: &mut S) -> Result<Vec<(String, String)>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut exports = Vec::new();
    collect(stream, Opt::LIST, &[], Rep::SERVER, MAX_LISTED, |data| {
        let mut reader = FieldReader::new(data);
        let name = String::from_utf8_lossy(reader.string("an export's name")?).into_owned();
        exports.push((name, String::from_utf8_lossy(reader.rest()).into_owned()));
        Ok(())
    })
    .await?;
    Ok(exports)
}

/// Chooses the export `name` and starts transmission with simple replies.
///
/// # Errors
/// The stream failed, or the server refused.
pub async fn go<S>(stream: S, name: &str) -> Result<Transmission<S>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    go_with_mode(stream, name, ReplyMode::Simple).await
}

/// Chooses the export `name` and starts transmission with the negotiated kind of replies.
///
/// # Errors
/// The stream failed, or the server refused.
pub async fn go_with_mode<S>(
    mut stream: S,
    name: &str,
    reply_mode: ReplyMode,
) -> Result<Transmission<S>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let export = describe(&mut stream, Opt::GO, name).await?;
    Ok(Transmission::new(stream, export, reply_mode))
}

/// Returns information about an export, without choosing it.
///
/// # Errors
/// The stream failed, or the server refused.
pub async fn info<S>(stream: &mut S, name: &str) -> Result<ExportInfo, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    describe(stream, Opt::INFO, name).await
}

/// Chooses an export by the older `NBD_OPT_EXPORT_NAME`, to which a server can report errors only
/// by closing the connection. `flags` are those sent in reply to the greeting.
///
/// # Errors
/// The stream failed, or the server closed it.
pub async fn choose_by_export_name<S>(
    mut stream: S,
    name: &str,
    flags: ClientFlags,
) -> Result<Transmission<S>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(&mut stream, Opt::EXPORT_NAME, name.as_bytes()).await?;
    let size = stream.read_u64().await?;
    let export = ExportInfo {
        size,
        flags: TransmissionFlags(stream.read_u16().await?),
        ..ExportInfo::default()
    };
    if !flags.contains(ClientFlags::NO_ZEROES) {
        stream.read_exact(&mut [0; 124]).await?;
    }
    Ok(Transmission::new(stream, export, ReplyMode::Simple))
}

/// Returns the names of an export's metadata contexts that match `queries`, or of all contexts if
/// `queries` is empty.
///
/// # Errors
/// The stream failed, the server refused, or its list is too long.
pub async fn list_contexts<S>(
    stream: &mut S,
    name: &str,
    queries: &[&str],
) -> Result<Vec<String>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    contexts(stream, Opt::LIST_META_CONTEXT, name, queries).await
}

/// Selects metadata contexts of an export. Returns the names of those that exist.
///
/// # Errors
/// The stream failed, the server refused, or its list is too long.
pub async fn select_contexts<S>(
    stream: &mut S,
    name: &str,
    queries: &[&str],
) -> Result<Vec<String>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    contexts(stream, Opt::SET_META_CONTEXT, name, queries).await
}

async fn contexts<S>(
    stream: &mut S,
    option: Opt,
    name: &str,
    queries: &[&str],
) -> Result<Vec<String>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let queries = queries.iter().map(|query| query.as_bytes()).collect();
    let request = MetaRequest { name: name.as_bytes(), queries }.encode();
    let mut names = Vec::new();
    collect(stream, option, &request, Rep::META_CONTEXT, MAX_REPLIES, |data| {
        let mut reader = FieldReader::new(data);
        reader.u32("a context's number")?;
        names.push(String::from_utf8_lossy(reader.rest()).into_owned());
        Ok(())
    })
    .await?;
    Ok(names)
}

async fn describe<S>(stream: &mut S, option: Opt, name: &str) -> Result<ExportInfo, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let wanted = vec![InfoType::NAME, InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];
    let request = InfoRequest { name: name.as_bytes(), wanted }.encode();
    let mut export = ExportInfo::default();
    collect(stream, option, &request, Rep::INFO, MAX_REPLIES, |data| {
        match Info::decode(data)? {
            Some(Info::Export { size, flags }) => {
                export.size = size;
                export.flags = flags;
            }
            Some(Info::Name(name)) => export.name = Some(name),
            Some(Info::Description(text)) => export.description = Some(text),
            Some(Info::BlockSize(sizes)) => export.block_sizes = Some(sizes),
            None => {}
        }
        Ok(())
    })
    .await?;
    Ok(export)
}

/// Sends an option, and passes the data of each reply to `take` until the server acknowledges the
/// option. All replies but the last must be of the type `expected`, and there may be `limit` of
/// them.
async fn collect<S>(
    stream: &mut S,
    option: Opt,
    data: &[u8],
    expected: Rep,
    limit: usize,
    mut take: impl FnMut(&[u8]) -> Result<(), Malformed>,
) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(stream, option, data).await?;
    let mut bytes = 0;
    for _ in 0..=limit {
        let (reply, data) = option_reply(stream, option).await?;
        if reply == Rep::ACK {
            return Ok(());
        }
        if reply != expected {
            return Err(ClientError::UnexpectedOptionReply { option, reply });
        }
        bytes += data.len();
        if bytes > MAX_LISTED_BYTES {
            break;
        }
        take(&data)?;
    }
    Err(ClientError::TooManyReplies { option, limit })
}

async fn expect_ack<S>(stream: &mut S, option: Opt) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // No other reply is expected, whatever its type.
    collect(stream, option, &[], Rep::ACK, 0, |_| Ok(())).await
}

async fn send_option<S: AsyncWrite + Unpin>(
    stream: &mut S,
    option: Opt,
    data: &[u8],
) -> io::Result<()> {
    stream.write_all(&encode_option(option, data)).await?;
    stream.flush().await
}

async fn option_reply<S: AsyncRead + Unpin>(
    stream: &mut S,
    option: Opt,
) -> Result<(Rep, Vec<u8>), ClientError> {
    let mut head = [0; OptionReplyHeader::SIZE];
    stream.read_exact(&mut head).await?;
    let header = OptionReplyHeader::decode(&head)?;
    if header.option != option || header.length > MAX_OPTION_DATA {
        return Err(ClientError::UnexpectedOptionReply { option, reply: header.reply });
    }
    let mut data = vec![0; header.length as usize];
    stream.read_exact(&mut data).await?;
    if header.reply.is_error() {
        let message = String::from_utf8_lossy(&data).into_owned();
        return Err(ClientError::Refused { option, reply: header.reply, message });
    }
    Ok((header.reply, data))
}
