//! What the benchmarks of the gateway's parts have in common: archives, and a connection
//! that needs neither a network nor a client.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use hexz_exports::{BlockReader, Catalog, SnapshotExport};
use hexz_reader::{Block, OpenOptions, Password, Snapshot, StreamKind};
use nbd_gateway::tls::{TlsVersion, without_client_auth};
use nbd_server::budget::Budget;
use nbd_server::wire::request::{Command, CommandFlags, Cookie, Request};
use nbd_server::{
    AccessFilter, CloseReason, Export, ExportCatalog, Exports, Negotiated, ReplyMode, Span,
    TransmitLimits, transmit,
};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Requests that arrive together: as many as clients commonly keep in flight.
pub const TOGETHER: u64 = 32;

/// The archive that is served from the cache.
const SERVED: &str = "base-zstd.hxz";

/// One of the archives that the tests read.
pub fn snapshot(name: &str) -> Snapshot {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/archives").join(name);
    let password = Password::new(b"correct horse battery staple".to_vec());
    let options = OpenOptions { password: Some(password.into()), ..OpenOptions::default() };
    Snapshot::open(&path, &options).unwrap()
}

/// Its blocks that aren't zeros.
pub fn blocks(snapshot: &Snapshot) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut at = 0;
    while at < snapshot.size(StreamKind::Main) {
        let block = snapshot.locate(StreamKind::Main, at).unwrap();
        at = block.end();
        blocks.push(block);
    }
    blocks.retain(|block| !block.is_zeros());
    blocks
}

/// A runtime of this thread alone.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

/// An export whose blocks are all in the cache.
pub fn cached_export(runtime: &Runtime) -> Arc<SnapshotExport> {
    const CACHE: u64 = 256 * 1024 * 1024;
    let reader = BlockReader::new(CACHE);
    let options = OpenOptions::default();
    let catalog = Catalog::with_snapshot("export", snapshot(SERVED), options, reader);
    let catalog = Arc::new(catalog).view_for(AccessFilter::allow_all());
    runtime.block_on(async {
        let export = catalog.find(b"export").await.unwrap();
        let all = Span { offset: 0, length: export.size().try_into().unwrap() };
        export.read(all, |_, _| ()).await.unwrap();
        export
    })
}

/// Where as much data is in [`SERVED`], at multiples of `length`, in bytes.
fn places(length: u32) -> Vec<u64> {
    let snapshot = snapshot(SERVED);
    let data: Vec<_> = blocks(&snapshot).iter().map(|block| block.start()..block.end()).collect();
    let is_data = |at: u64| data.iter().any(|block| block.contains(&at));
    let length = u64::from(length);
    (0..snapshot.size(StreamKind::Main) / length)
        .map(|place| place * length)
        // No block is shorter than that.
        .filter(|start| (*start..start + length).step_by(4096).all(is_data))
        .collect()
}

/// Requests for so many reads of data, and a farewell: a batch for those that arrive
/// together.
pub fn requests(reads: u64, length: u32) -> Vec<Bytes> {
    let places = places(length);
    let request = |command, number: u64| Request {
        flags: CommandFlags::default(),
        command,
        cookie: Cookie(number),
        // Any order that isn't that of the blocks.
        offset: places[number as usize * 7919 % places.len()],
        length: length.into(),
    };
    let numbers: Vec<u64> = (0..reads).collect();
    let mut batches: Vec<Bytes> = numbers
        .chunks(TOGETHER as usize)
        .map(|batch| batch.iter().flat_map(|at| request(Command::READ, *at).encode()).collect())
        .collect();
    batches.push(request(Command::DISC, reads).encode().to_vec().into());
    batches
}

/// Serves what a connection's script asks for.
pub fn serve<S: AsyncRead + AsyncWrite>(
    runtime: &Runtime,
    export: &Arc<SnapshotExport>,
    connection: S,
) -> u64 {
    let limits = TransmitLimits::new(Budget::new(64 * 1024 * 1024, 8 * 1024 * 1024));
    let export = Arc::clone(export);
    let chosen = Negotiated { export, reply_mode: ReplyMode::Structured, contexts: Vec::new() };
    let served = transmit(connection, chosen, &limits, std::future::pending());
    let summary = runtime.block_on(served).unwrap();
    assert_eq!(summary.close_reason, CloseReason::Disconnected);
    summary.requests
}

/// A connection whose client has said beforehand all that it will say, and that takes
/// whatever it is sent.
#[derive(Clone)]
pub struct Scripted(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    /// What comes, in the pieces in which it comes.
    incoming: VecDeque<Bytes>,
    /// Whether more may come when all of that has been read.
    is_open: bool,
    /// What was sent, as long as it is wanted.
    sent: Option<Vec<u8>>,
}

impl Scripted {
    pub fn new(batches: Vec<Bytes>) -> Self {
        let incoming = batches.into();
        Self(Arc::new(Mutex::new(Script { incoming, ..Script::default() })))
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }

    /// The same over TLS, with the handshake behind it.
    pub fn over_tls(batches: &[Bytes]) -> TlsStream<Self> {
        let certificate = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let chain = vec![certificate.cert.der().clone()];
        let mut roots = RootCertStore::empty();
        roots.add(chain[0].clone()).unwrap();
        let key = PrivateKeyDer::try_from(certificate.signing_key.serialize_der()).unwrap();
        let server = without_client_auth(chain, key, TlsVersion::V1_3).unwrap();
        let client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();

        let connection = Self::new(Vec::new());
        connection.script().is_open = true;
        connection.script().sent = Some(Vec::new());
        let mut accepted =
            pin!(TlsAcceptor::from(Arc::clone(server.config())).accept(connection.clone()));
        let stream = loop {
            connection.script().incoming.push_back(spoken(&mut client));
            if let Poll::Ready(stream) = accepted.as_mut().poll(&mut no_waker()) {
                break stream.unwrap();
            }
            let sent = connection.script().sent.replace(Vec::new()).unwrap_or_default();
            client.read_tls(&mut sent.as_slice()).unwrap();
            client.process_new_packets().unwrap();
        };
        for batch in batches {
            io::Write::write_all(&mut client.writer(), batch).unwrap();
            connection.script().incoming.push_back(spoken(&mut client));
        }
        client.send_close_notify();
        connection.script().incoming.push_back(spoken(&mut client));
        connection.script().is_open = false;
        connection.script().sent = None;
        stream
    }
}

fn no_waker() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// What a client of TLS wants to be sent.
fn spoken(client: &mut ClientConnection) -> Bytes {
    let mut bytes = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut bytes).unwrap();
    }
    bytes.into()
}

impl AsyncRead for Scripted {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut script = self.script();
        while script.incoming.front().is_some_and(Bytes::is_empty) {
            script.incoming.pop_front();
        }
        let is_open = script.is_open;
        let Some(batch) = script.incoming.front_mut() else {
            return if is_open { Poll::Pending } else { Poll::Ready(Ok(())) };
        };
        let count = batch.len().min(buffer.remaining());
        buffer.put_slice(&batch[..count]);
        batch.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(sent) = &mut self.script().sent {
            sent.extend_from_slice(bytes);
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(sent) = &mut self.script().sent {
            parts.iter().for_each(|part| sent.extend_from_slice(part));
        }
        Poll::Ready(Ok(parts.iter().map(|part| part.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
