//! A small NBD client: enough to greet, start TLS, list, choose an export and read it.
//!
//! It sends one thing at a time and is meant for self-tests and diagnoses, not for speed. What a
//! server sends is bounded in length and number; deadlines are the caller's.

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
use super::wire::{Malformed, Reader};

/// Exports that a list may have: a server could go on for ever.
pub const MAX_LISTED: usize = 20_000;
/// What the replies to one option may have together, in bytes: names and descriptions are kept.
const MAX_LISTED_BYTES: usize = 16 * 1024 * 1024;
/// Replies that any other option may have before its last one. There are four kinds of
/// information, and metadata contexts are some for each bitmap.
const MAX_REPLIES: usize = 4096;

/// Why the client could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server's bytes aren't NBD.
    #[error("the server broke the protocol: {0}")]
    Malformed(#[from] Malformed),
    /// The server speaks an older dialect.
    #[error("the server doesn't speak fixed newstyle NBD")]
    NotFixedNewstyle,
    /// The server refused an option.
    #[error("the server answers {option} with {reply}: {message}")]
    Refused {
        /// What was asked.
        option: Opt,
        /// What was answered.
        reply: Rep,
        /// The server's own words, which may be empty.
        message: String,
    },
    /// The server's answer doesn't fit the question.
    #[error("the server's answer to {0} makes no sense")]
    Unexpected(&'static str),
    /// The server doesn't come to an end.
    #[error("the server sends more than {limit} replies to {option}, or too long ones")]
    TooMany {
        /// What was asked.
        option: Opt,
        /// How many are taken.
        limit: usize,
    },
    /// A request failed.
    #[error("the request failed with {0}")]
    Failed(ErrorCode),
    /// A request failed, and the server said why.
    #[error("the request failed with {error}: {message}")]
    FailedBecause {
        /// The error.
        error: ErrorCode,
        /// The server's own words.
        message: String,
    },
}

/// What GO and INFO tell of an export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// What can be done with it.
    pub flags: TransmissionFlags,
    /// Its canonical name, if given.
    pub name: Option<String>,
    /// Its description, if given.
    pub description: Option<String>,
    /// Its size constraints, if given.
    pub block_sizes: Option<BlockSizes>,
}

/// Reads the server's greeting and answers it.
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
    answer_greeting(stream, greeting).await.map(drop)
}

/// Answers a greeting that has been read: takes up what is offered of it.
pub async fn answer_greeting<S>(
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

/// Asks for TLS; when this returns, the TLS handshake is the next thing to be sent.
pub async fn start_tls<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    acknowledged(stream, Opt::STARTTLS, "STARTTLS").await
}

/// Asks for structured replies; [`go_with`] has to know of it.
pub async fn structured_replies<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    acknowledged(stream, Opt::STRUCTURED_REPLY, "STRUCTURED_REPLY").await
}

/// Asks for extended headers; [`go_with`] has to know of it.
pub async fn extended_headers<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    acknowledged(stream, Opt::EXTENDED_HEADERS, "EXTENDED_HEADERS").await
}

/// Leaves in the middle of negotiation.
pub async fn abort<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    acknowledged(stream, Opt::ABORT, "ABORT").await
}

/// The names of the exports, with their descriptions: at most [`MAX_LISTED`].
pub async fn list<S>(stream: &mut S) -> Result<Vec<(String, String)>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(stream, Opt::LIST, &[]).await?;
    let mut names = Vec::new();
    let mut bytes = 0;
    loop {
        if names.len() > MAX_LISTED || bytes > MAX_LISTED_BYTES {
            return Err(ClientError::TooMany { option: Opt::LIST, limit: MAX_LISTED });
        }
        match option_reply(stream, Opt::LIST).await? {
            (Rep::ACK, _) => return Ok(names),
            (Rep::SERVER, data) => {
                bytes += data.len();
                let mut reader = Reader::new(&data);
                let name = String::from_utf8_lossy(reader.string("an export's name")?).into_owned();
                names.push((name, String::from_utf8_lossy(reader.rest()).into_owned()));
            }
            _ => return Err(ClientError::Unexpected("LIST")),
        }
    }
}

/// Chooses the export `name` and begins transmission.
pub async fn go<S>(stream: S, name: &str) -> Result<Transmission<S>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    go_with(stream, name, ReplyMode::Simple).await
}

/// The same after replies of another kind have been agreed on.
pub async fn go_with<S>(
    mut stream: S,
    name: &str,
    replies: ReplyMode,
) -> Result<Transmission<S>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let export = describe(&mut stream, Opt::GO, name).await?;
    Ok(Transmission::new(stream, export, replies))
}

/// What is to be known of an export, without choosing it.
pub async fn info<S>(stream: &mut S, name: &str) -> Result<ExportInfo, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    describe(stream, Opt::INFO, name).await
}

/// Chooses an export as clients did before there was GO: whatever is wrong, the server can only
/// close the connection.
pub async fn export_name<S>(
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

/// The names of an export's metadata contexts, of all if there are no `queries`.
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

/// Selects metadata contexts of an export; their names, as far as there are such.
pub async fn set_contexts<S>(
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
    let request = MetaRequest { name: name.as_bytes(), queries };
    send_option(stream, option, &request.encode()).await?;
    let mut names = Vec::new();
    let mut bytes = 0;
    for _ in 0..MAX_REPLIES {
        if bytes > MAX_LISTED_BYTES {
            break;
        }
        match option_reply(stream, option).await? {
            (Rep::ACK, _) => return Ok(names),
            (Rep::META_CONTEXT, data) => {
                bytes += data.len();
                let mut reader = Reader::new(&data);
                reader.u32("a context's number")?;
                names.push(String::from_utf8_lossy(reader.rest()).into_owned());
            }
            _ => return Err(ClientError::Unexpected("a query for metadata contexts")),
        }
    }
    Err(ClientError::TooMany { option, limit: MAX_REPLIES })
}

async fn describe<S>(stream: &mut S, option: Opt, name: &str) -> Result<ExportInfo, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let wanted = vec![InfoType::NAME, InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];
    let request = InfoRequest { name: name.as_bytes(), wanted };
    send_option(stream, option, &request.encode()).await?;

    let mut export = ExportInfo::default();
    for _ in 0..MAX_REPLIES {
        match option_reply(stream, option).await? {
            (Rep::ACK, _) => return Ok(export),
            (Rep::INFO, data) => match Info::decode(&data)? {
                Some(Info::Export { size, flags }) => {
                    export.size = size;
                    export.flags = flags;
                }
                Some(Info::Name(name)) => export.name = Some(name),
                Some(Info::Description(text)) => export.description = Some(text),
                Some(Info::BlockSize(sizes)) => export.block_sizes = Some(sizes),
                None => {}
            },
            _ => return Err(ClientError::Unexpected("GO or INFO")),
        }
    }
    Err(ClientError::TooMany { option, limit: MAX_REPLIES })
}

async fn acknowledged<S>(stream: &mut S, option: Opt, name: &'static str) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(stream, option, &[]).await?;
    match option_reply(stream, option).await? {
        (Rep::ACK, _) => Ok(()),
        _ => Err(ClientError::Unexpected(name)),
    }
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
        return Err(ClientError::Unexpected("an option"));
    }
    let mut data = vec![0; header.length as usize];
    stream.read_exact(&mut data).await?;
    if header.reply.is_error() {
        let message = String::from_utf8_lossy(&data).into_owned();
        return Err(ClientError::Refused { option, reply: header.reply, message });
    }
    Ok((header.reply, data))
}
