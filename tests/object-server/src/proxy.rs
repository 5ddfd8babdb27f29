//! A TCP proxy that adds a network's latency and bandwidth.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use crate::listener::Listener;

/// Maximum number of bytes that are read at once.
const PIECE: usize = 128 * 1024;
/// Maximum number of pieces in transit in one direction of a connection.
const IN_TRANSIT: usize = 512;
/// How far a limited link may catch up after a pause, which makes up for late timers.
const BURST: Duration = Duration::from_millis(5);

/// Properties of a link. It doesn't model loss or slow start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Link {
    /// Latency in each direction: half of a round trip. Connecting takes a round trip too.
    pub one_way_delay: Duration,
    /// Bytes per second in each direction, shared by all connections; unlimited if `None`.
    pub bytes_per_second: Option<u64>,
}

/// A running proxy in front of a server.
pub struct DelayProxy {
    listener: Listener,
    traffic: Arc<Traffic>,
}

struct Traffic {
    link: Link,
    target: SocketAddr,
    up: Direction,
    down: Direction,
}

/// Direction of a link, shared by all connections.
#[derive(Default)]
struct Direction {
    bytes: AtomicU64,
    /// Time at which a limited link has sent everything so far.
    free_at: Mutex<Option<Instant>>,
}

impl DelayProxy {
    /// Starts a proxy on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// The system refused a socket or a thread.
    pub fn start(target: SocketAddr, link: Link) -> io::Result<Self> {
        let (up, down) = (Direction::default(), Direction::default());
        let traffic = Arc::new(Traffic { link, target, up, down });
        let shared = Arc::clone(&traffic);
        let listener = Listener::start(Arc::new(move |client| {
            let traffic = Arc::clone(&shared);
            Box::pin(async move { forward(&traffic, client).await })
        }))?;
        Ok(Self { listener, traffic })
    }

    /// Returns the address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Returns the number of bytes from clients to the server so far.
    #[must_use]
    pub fn bytes_up(&self) -> u64 {
        self.traffic.up.bytes.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes from the server to clients so far.
    #[must_use]
    pub fn bytes_down(&self) -> u64 {
        self.traffic.down.bytes.load(Ordering::Relaxed)
    }

    /// Closes all connections; new ones are accepted.
    pub fn disconnect_all(&self) {
        self.listener.disconnect_all();
    }

    /// Closes all connections and refuses new ones.
    pub fn refuse(&self) {
        self.listener.close();
    }

    /// Accepts connections again, on the same port.
    ///
    /// # Errors
    /// The port has been taken by another process.
    pub fn accept(&self) -> io::Result<()> {
        self.listener.reopen()
    }
}

impl std::fmt::Debug for DelayProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "proxy at {} for {}: {:?}",
            self.address(),
            self.traffic.target,
            self.traffic.link
        )
    }
}

/// Forwards one connection in both directions.
async fn forward(traffic: &Traffic, client: TcpStream) {
    sleep(traffic.link.one_way_delay * 2).await;
    let Ok(server) = TcpStream::connect(traffic.target).await else { return };
    if server.set_nodelay(true).is_err() {
        return;
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (link, up, down) = (&traffic.link, &traffic.up, &traffic.down);
    let up = transfer(link, up, from_client, to_server);
    let down = transfer(link, down, from_server, to_client);
    // A client or server that leaves ends its direction, and with an error the whole connection.
    drop(tokio::try_join!(up, down));
}

/// Transfers one direction of a connection until its end.
async fn transfer(
    link: &Link,
    direction: &Direction,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
) -> io::Result<()> {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Bytes)>(IN_TRANSIT);
    let receive = async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE);
            let count = from.read_buf(&mut buffer).await?;
            direction.bytes.fetch_add(count as u64, Ordering::Relaxed);
            let sent_at = direction.send(link, count as u64);
            wait_until(sent_at).await;
            let piece = (sent_at + link.one_way_delay, buffer.split().freeze());
            if count == 0 || sender.send(piece).await.is_err() {
                return Ok(());
            }
        }
    };
    let deliver = async move {
        while let Some((due, piece)) = receiver.recv().await {
            wait_until(due).await;
            to.write_all(&piece).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(receive, deliver).map(drop)
}

/// Sleeps until a time, unless it has passed: a timer would round it up to the next millisecond.
async fn wait_until(time: Instant) {
    if time > Instant::now() {
        sleep_until(time).await;
    }
}

impl Direction {
    /// Puts bytes on the link. Returns when they have been sent.
    fn send(&self, link: &Link, bytes: u64) -> Instant {
        let now = Instant::now();
        let Some(rate) = link.bytes_per_second else { return now };
        let mut free_at = self.free_at.lock();
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let start = free_at.map_or(now, |free_at| free_at.max(earliest));
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
        let end = start + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        *free_at = Some(end);
        end.max(now)
    }
}
