//! One connection to the server: how it begins, and reads whose every byte is compared.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_server::client::{self, ClientError};
use nbd_server::wire::reply::{ChunkHeader, ErrorCode, ReplyFlags, ReplyType, SimpleReply};
use nbd_server::wire::request::{Command, CommandFlags, Cookie, Request};
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::archives::Expected;
use crate::authority::SERVER_NAME;

/// Whoever has waited so long has been forgotten, even on a busy machine, and with the server
/// stopped for a while.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Why a session is over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server closed it.
    Gone(String),
    /// The server's bytes are wrong.
    Wrong(String),
    /// The server doesn't answer.
    Hung,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone(how) => write!(f, "it was closed: {how}"),
            Self::Wrong(what) => write!(f, "WRONG BYTES: {what}"),
            Self::Hung => write!(f, "no answer within {PATIENCE:?}"),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Gone(error.to_string())
    }
}

pub(crate) type Stream = TlsStream<TcpStream>;

/// A TCP connection from that address of this machine.
pub(crate) async fn connect(from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind((from, 0).into())?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Greets and starts TLS.
pub(crate) async fn secure(
    mut stream: TcpStream,
    config: Arc<ClientConfig>,
) -> Result<Stream, ClientError> {
    client::greet(&mut stream).await?;
    client::start_tls(&mut stream).await?;
    let name = ServerName::try_from(SERVER_NAME).map_err(io::Error::other)?;
    Ok(TlsConnector::from(config).connect(name, stream).await?)
}

/// The certificate that the server showed.
pub(crate) fn server_certificate(stream: &Stream) -> Option<&CertificateDer<'static>> {
    stream.get_ref().1.peer_certificates()?.first()
}

/// A session that reads.
pub(crate) struct Session {
    stream: BufStream<Stream>,
    expected: Expected,
    structured: bool,
    next: u64,
    asked: HashMap<u64, Asked>,
}

/// A read that hasn't been answered in full.
#[derive(Debug)]
struct Asked {
    offset: u64,
    length: u64,
    at: Instant,
    /// What has come: begin and end.
    covered: Vec<(u64, u64)>,
    error: Option<ErrorCode>,
}

/// The end of a read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) length: u64,
    pub(crate) asked_at: Instant,
    /// `None` if its bytes came, and were right.
    pub(crate) error: Option<ErrorCode>,
}

impl Session {
    /// Chooses an export: the session, and the export's size. What it reads as is said then.
    pub(crate) async fn begin(
        mut stream: Stream,
        export: &str,
        structured: bool,
    ) -> Result<(BufStream<Stream>, u64), ClientError> {
        if structured {
            client::negotiate_structured_replies(&mut stream).await?;
        }
        let size = client::go(&mut stream, export).await?.export().size;
        Ok((BufStream::with_capacity(16 * 1024, 256, stream), size))
    }

    pub(crate) fn new(stream: BufStream<Stream>, expected: Expected, structured: bool) -> Self {
        Self { stream, expected, structured, next: 1, asked: HashMap::new() }
    }

    pub(crate) fn export(&self) -> &Expected {
        &self.expected
    }

    pub(crate) fn size(&self) -> u64 {
        self.expected.content.len() as u64
    }

    /// How many reads aren't answered yet.
    pub(crate) fn waiting(&self) -> usize {
        self.asked.len()
    }

    /// Asks for bytes.
    pub(crate) async fn ask(&mut self, offset: u64, length: u64) -> Result<(), Fault> {
        let cookie = self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.next += 1;
        let asked = Asked { offset, length, at: Instant::now(), covered: Vec::new(), error: None };
        self.asked.insert(cookie, asked);
        let (flags, command) = (CommandFlags::default(), Command::READ);
        let request = Request { flags, command, cookie: Cookie(cookie), offset, length };
        self.patiently(async |stream| {
            stream.write_all(&request.encode()).await?;
            stream.flush().await
        })
        .await
    }

    /// Waits until one read is answered, and compares what came.
    pub(crate) async fn answer(&mut self) -> Result<Answer, Fault> {
        if !self.structured {
            return self.simple().await;
        }
        loop {
            if let Some(answer) = self.chunk().await? {
                return Ok(answer);
            }
        }
    }

    /// Leaves.
    pub(crate) async fn leave(mut self) {
        let request = Request {
            flags: CommandFlags::default(),
            command: Command::DISC,
            cookie: Cookie(0),
            offset: 0,
            length: 0,
        };
        let farewell = self.patiently(async |stream| {
            stream.write_all(&request.encode()).await?;
            stream.shutdown().await?;
            // The server closes first, so that no port of this side has to rest for a minute.
            stream.read(&mut [0]).await.map(drop)
        });
        // Whoever leaves doesn't mind how.
        drop(farewell.await);
    }

    async fn simple(&mut self) -> Result<Answer, Fault> {
        let head = self.bytes(SimpleReply::SIZE).await?;
        let head = head.first_chunk().ok_or(Fault::Hung)?;
        let reply = SimpleReply::decode(head).map_err(|error| Fault::Wrong(error.to_string()))?;
        let mut asked = self.take(reply.cookie)?;
        if reply.error == ErrorCode::OK {
            let data = self.bytes(asked.length as usize).await?;
            let offset = asked.offset;
            self.compare(&mut asked, offset, &data)?;
        } else {
            asked.error = Some(reply.error);
        }
        Ok(asked.ended())
    }

    async fn chunk(&mut self) -> Result<Option<Answer>, Fault> {
        let wrong = |what: &str| Fault::Wrong(what.to_owned());
        let head = self.bytes(ChunkHeader::SIZE).await?;
        let head = head.first_chunk().ok_or(Fault::Hung)?;
        let head = ChunkHeader::decode(head).map_err(|error| Fault::Wrong(error.to_string()))?;
        if head.length > 512 * 1024 {
            return Err(Fault::Wrong(format!("a chunk of {} bytes", head.length)));
        }
        let payload = self.bytes(head.length as usize).await?;
        let mut asked = self.take(head.cookie)?;
        match head.kind {
            ReplyType::NONE if payload.is_empty() => {}
            ReplyType::OFFSET_DATA => {
                let (offset, data) = payload.split_first_chunk().ok_or(wrong("a short chunk"))?;
                self.compare(&mut asked, u64::from_be_bytes(*offset), data)?;
            }
            ReplyType::OFFSET_HOLE => {
                let (offset, length) = payload.split_first_chunk().ok_or(wrong("a short hole"))?;
                let length = length.try_into().map_err(|_| wrong("a hole's length"))?;
                let zeros = vec![0; (u32::from_be_bytes(length) as usize).min(1 << 20)];
                self.compare(&mut asked, u64::from_be_bytes(*offset), &zeros)?;
            }
            ReplyType::ERROR | ReplyType::ERROR_OFFSET => {
                let number = payload.first_chunk().ok_or(wrong("a short error"))?;
                asked.error = Some(ErrorCode(u32::from_be_bytes(*number)));
            }
            other => return Err(Fault::Wrong(format!("a chunk of {other}"))),
        }
        if !head.flags.contains(ReplyFlags::DONE) {
            self.asked.insert(head.cookie.0, asked);
            return Ok(None);
        }
        let covered: u64 = asked.covered.iter().map(|(from, to)| to - from).sum();
        if asked.error.is_none() && covered != asked.length {
            return Err(Fault::Wrong(format!("{covered} of {} bytes came", asked.length)));
        }
        Ok(Some(asked.ended()))
    }

    /// Compares what came with what is expected there.
    fn compare(&self, asked: &mut Asked, offset: u64, data: &[u8]) -> Result<(), Fault> {
        let (end, name) = (offset.saturating_add(data.len() as u64), &self.expected.name);
        let what = format_args!("{name}, {offset} to {end}");
        if offset < asked.offset || end > asked.offset + asked.length || data.is_empty() {
            return Err(Fault::Wrong(format!("{what}: nobody asked for that")));
        }
        if asked.covered.iter().any(|&(from, to)| offset < to && from < end) {
            return Err(Fault::Wrong(format!("{what}: it came twice")));
        }
        if data != &self.expected.content[offset as usize..end as usize] {
            return Err(Fault::Wrong(format!("{what}: other bytes are there")));
        }
        asked.covered.push((offset, end));
        Ok(())
    }

    fn take(&mut self, cookie: Cookie) -> Result<Asked, Fault> {
        let unknown = || Fault::Wrong("an answer that nobody asked for".to_owned());
        self.asked.remove(&cookie.0).ok_or_else(unknown)
    }

    async fn bytes(&mut self, length: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; length];
        self.patiently(async |stream| stream.read_exact(&mut bytes).await.map(drop)).await?;
        Ok(bytes)
    }

    async fn patiently(
        &mut self,
        work: impl AsyncFnOnce(&mut BufStream<Stream>) -> io::Result<()>,
    ) -> Result<(), Fault> {
        timeout(PATIENCE, work(&mut self.stream)).await.map_err(|_| Fault::Hung)??;
        Ok(())
    }
}

impl Asked {
    fn ended(self) -> Answer {
        Answer { length: self.length, asked_at: self.at, error: self.error }
    }
}
