//! A small NBD client: enough to greet, start TLS, list, choose an export and read it.
//!
//! It sends one thing at a time and is meant for self-tests, not for speed.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::handshake::{ClientFlags, Greeting, HandshakeFlags};
use super::wire::info::{BlockSizes, Info, InfoRequest, InfoType, TransmissionFlags};
use super::wire::option::{MAX_OPTION_DATA, Opt, OptionReplyHeader, Rep, encode_option};
use super::wire::reply::{ErrorCode, SimpleReply};
use super::wire::request::{Command, CommandFlags, Cookie, Request};
use super::wire::{Malformed, Reader};

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
    /// A request failed.
    #[error("the request failed with {0}")]
    Failed(ErrorCode),
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
    let mut flags = ClientFlags::FIXED_NEWSTYLE;
    if greeting.flags.contains(HandshakeFlags::NO_ZEROES) {
        flags = flags.with(ClientFlags::NO_ZEROES);
    }
    stream.write_all(&flags.0.to_be_bytes()).await?;
    stream.flush().await?;
    Ok(())
}

/// Asks for TLS; when this returns, the TLS handshake is the next thing to be sent.
pub async fn start_tls<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(stream, Opt::STARTTLS, &[]).await?;
    match option_reply(stream, Opt::STARTTLS).await? {
        (Rep::ACK, _) => Ok(()),
        _ => Err(ClientError::Unexpected("STARTTLS")),
    }
}

/// Asks for structured replies. [`Transmission::read`] doesn't understand them: it is for
/// callers that go on by themselves.
pub async fn structured_replies<S>(stream: &mut S) -> Result<(), ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(stream, Opt::STRUCTURED_REPLY, &[]).await?;
    match option_reply(stream, Opt::STRUCTURED_REPLY).await? {
        (Rep::ACK, _) => Ok(()),
        _ => Err(ClientError::Unexpected("STRUCTURED_REPLY")),
    }
}

/// The names of the exports, with their descriptions.
pub async fn list<S>(stream: &mut S) -> Result<Vec<(String, String)>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send_option(stream, Opt::LIST, &[]).await?;
    let mut names = Vec::new();
    loop {
        match option_reply(stream, Opt::LIST).await? {
            (Rep::ACK, _) => return Ok(names),
            (Rep::SERVER, data) => {
                let mut reader = Reader::new(&data);
                let name = String::from_utf8_lossy(reader.string("an export's name")?).into_owned();
                names.push((name, String::from_utf8_lossy(reader.rest()).into_owned()));
            }
            _ => return Err(ClientError::Unexpected("LIST")),
        }
    }
}

/// Chooses the export `name` and begins transmission.
pub async fn go<S>(mut stream: S, name: &str) -> Result<Transmission<S>, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let wanted = vec![InfoType::NAME, InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];
    let request = InfoRequest { name: name.as_bytes(), wanted };
    send_option(&mut stream, Opt::GO, &request.encode()).await?;

    let mut export = ExportInfo::default();
    loop {
        match option_reply(&mut stream, Opt::GO).await? {
            (Rep::ACK, _) => return Ok(Transmission { stream, export, cookie: 0 }),
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
            _ => return Err(ClientError::Unexpected("GO")),
        }
    }
}

/// A session in its transmission phase.
#[derive(Debug)]
pub struct Transmission<S> {
    stream: S,
    export: ExportInfo,
    cookie: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Transmission<S> {
    /// What the server told of the export.
    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// The stream below, as for asking what TLS agreed on.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Reads `length` bytes at `offset`.
    ///
    /// # Errors
    /// [`ClientError::Failed`] leaves the session usable; the others don't.
    pub async fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, ClientError> {
        self.cookie += 1;
        let cookie = Cookie(self.cookie);
        self.send(Command::READ, cookie, offset, length).await?;

        let mut head = [0; SimpleReply::SIZE];
        self.stream.read_exact(&mut head).await?;
        let reply = SimpleReply::decode(&head)?;
        if reply.cookie != cookie {
            return Err(ClientError::Unexpected("READ"));
        }
        if reply.error != ErrorCode::OK {
            return Err(ClientError::Failed(reply.error));
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).await?;
        Ok(data)
    }

    /// Leaves, and closes the stream.
    pub async fn disconnect(mut self) -> Result<(), ClientError> {
        self.send(Command::DISC, Cookie(0), 0, 0).await?;
        self.stream.shutdown().await?;
        Ok(())
    }

    async fn send(
        &mut self,
        command: Command,
        cookie: Cookie,
        offset: u64,
        length: u32,
    ) -> io::Result<()> {
        let flags = CommandFlags::default();
        let request = Request { flags, command, cookie, offset, length: length.into() };
        self.stream.write_all(&request.encode()).await?;
        self.stream.flush().await
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
