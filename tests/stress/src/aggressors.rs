//! Those who mean ill, each from addresses of its own. What becomes of them doesn't matter, as
//! long as they don't get in without a certificate, and don't stay without reading.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_server::client;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::random::Random;
use crate::session::{PATIENCE, Session, connect, secure};
use crate::world::World;

/// By then the server has closed a connection that doesn't get anywhere, whose time is over
/// after 10 s, and those for which it was stopped.
const GONE_WITHIN: Duration = PATIENCE;

/// Sends them all.
pub(crate) fn spawn(world: &Arc<World>, tasks: &mut JoinSet<()>) {
    for number in 0..12 {
        tasks.spawn(floods(Arc::clone(world), number));
        tasks.spawn(breaks_off(Arc::clone(world), number));
        tasks.spawn(garbage(Arc::clone(world), number));
        tasks.spawn(resets(Arc::clone(world), number));
    }
    for number in 0..48 {
        tasks.spawn(drips(Arc::clone(world), number));
    }
    for number in 0..8 {
        tasks.spawn(stalls(Arc::clone(world), number));
    }
}

/// Somebody in the networks of those who mean ill.
fn address(network: u8, number: u64) -> Ipv4Addr {
    Ipv4Addr::new(127, 66, network, (1 + number % 250) as u8)
}

/// Whole handshakes, as many as go, by whom the server can't know.
async fn floods(world: Arc<World>, number: u64) {
    let mut random = Random::new(2000 + number);
    while world.rest(Duration::from_millis(random.below(20))).await.is_continue() {
        let config = &world.people.strangers[random.below(2) as usize];
        let from = address(0, number % 3);
        match world.secure(from, config).await {
            // With TLS 1.3 a client hears only now that it isn't welcome.
            Ok(stream) => match Session::begin(stream, "base-zstd.hxz", false).await {
                Ok(_) => world.ledger.violation("a client without a good certificate came in"),
                Err(_) => world.ledger.count("attacks: handshakes without a good certificate"),
            },
            Err(_) => world.ledger.count("attacks: refused at the door, or in the handshake"),
        }
    }
}

/// Handshakes that end in the middle, now and then with a reset.
async fn breaks_off(world: Arc<World>, number: u64) {
    let mut random = Random::new(3000 + number);
    while world.rest(Duration::from_millis(random.below(50))).await.is_continue() {
        let Ok(stream) = connect(address(0, 10 + number % 3).into(), world.address).await else {
            continue;
        };
        if random.below(2) == 0 && stream.set_zero_linger().is_err() {
            continue;
        }
        let config = Arc::clone(&world.people.insider);
        let patience = Duration::from_micros(random.below(5000));
        drop(tokio::time::timeout(patience, secure(stream, config)).await);
        world.ledger.count("attacks: handshakes broken off");
    }
}

/// A byte a second of what might become a handshake.
async fn drips(world: Arc<World>, number: u64) {
    const OPENING: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0";
    while world.rest(Duration::from_millis(500)).await.is_continue() {
        let from = address(1 + (number % 2) as u8, number % 4);
        let Ok(mut stream) = connect(from.into(), world.address).await else { continue };
        world.ledger.count("attacks: slow drips");
        let start = Instant::now();
        for byte in OPENING.iter().cycle() {
            if world.rest(Duration::from_secs(1)).await.is_break() {
                return;
            }
            if stream.write_all(&[*byte]).await.is_err() {
                world.ledger.count("attacks: slow drips that were closed");
                break;
            }
            if start.elapsed() > GONE_WITHIN {
                world.ledger.violation("a client that drips could stay");
                break;
            }
        }
    }
}

/// Asks for much and reads nothing of it.
async fn stalls(world: Arc<World>, number: u64) {
    let mut random = Random::new(4000 + number);
    let expected = &world.archives.steady[0];
    while world.rest(Duration::from_millis(500)).await.is_continue() {
        let insider = &world.people.insider;
        let begun = world.session(address(3, number), insider, expected, false).await;
        let Ok(mut session) = begun else {
            world.ledger.violation("a client that will stall wasn't let in");
            continue;
        };
        for _ in 0..4 {
            drop(session.ask(0, session.size()).await);
        }
        world.ledger.count("attacks: stalled readers");
        let seconds = 5 + random.below(10);
        if world.rest(Duration::from_secs(seconds)).await.is_break() {
            return;
        }
        // Had the server waited, all of it would still come.
        while session.waiting() > 0 {
            if session.answer().await.is_err() {
                world.ledger.count("attacks: stalled readers that were dropped");
                break;
            }
        }
    }
}

/// Goes away in the middle of everything.
async fn resets(world: Arc<World>, number: u64) {
    let mut random = Random::new(5000 + number);
    while world.rest(Duration::from_millis(random.below(300))).await.is_continue() {
        let Ok(stream) = connect(address(4, number).into(), world.address).await else { continue };
        if stream.set_zero_linger().is_err() {
            continue;
        }
        let exports = &world.archives.steady;
        let expected = &exports[random.below(exports.len() as u64) as usize];
        let Ok(stream) = secure(stream, Arc::clone(&world.people.insider)).await else { continue };
        let Ok((stream, _)) = Session::begin(stream, &expected.name, true).await else { continue };
        let mut session = Session::new(stream, expected.clone(), true);
        for _ in 0..random.below(8) {
            drop(session.ask(0, 1 + random.below(256 * 1024)).await);
        }
        random.pause(Duration::from_millis(5)).await;
        drop(session);
        world.ledger.count("attacks: resets in the middle of answers");
    }
}

/// What isn't NBD: in clear, instead of options, and instead of requests.
async fn garbage(world: Arc<World>, number: u64) {
    let mut random = Random::new(6000 + number);
    while world.rest(Duration::from_millis(random.below(200))).await.is_continue() {
        let Ok(stream) = connect(address(5, number).into(), world.address).await else { continue };
        let length = random.below(4096) as usize;
        let bytes = random.bytes(length);
        let sent = match random.below(4) {
            0 => in_clear(stream, &bytes).await,
            1 => instead_of_tls(stream, &bytes).await,
            kind => inside_tls(&world, stream, &bytes, kind == 2).await,
        };
        match sent {
            Ok(()) => world.ledger.count("attacks: garbage, and closed"),
            // As it may be while garbage is still being sent.
            Err(error) if error.kind() != io::ErrorKind::TimedOut => {
                world.ledger.count("attacks: garbage, and closed");
            }
            Err(_) => world.ledger.violation("a client that sends garbage could stay"),
        }
    }
}

async fn in_clear(mut stream: TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    until_closed(stream).await
}

async fn instead_of_tls(mut stream: TcpStream, bytes: &[u8]) -> io::Result<()> {
    client::greet(&mut stream).await.map_err(io::Error::other)?;
    client::start_tls(&mut stream).await.map_err(io::Error::other)?;
    in_clear(stream, bytes).await
}

async fn inside_tls(
    world: &World,
    stream: TcpStream,
    bytes: &[u8],
    as_options: bool,
) -> io::Result<()> {
    let stream = secure(stream, Arc::clone(&world.people.insider)).await;
    let mut stream = stream.map_err(io::Error::other)?;
    if !as_options {
        client::go(&mut stream, "base-zstd.hxz").await.map_err(io::Error::other)?;
        // Less could be the beginning of a request, for whose rest the server waits.
        if bytes.len() < 28 {
            return Ok(());
        }
    }
    stream.write_all(bytes).await?;
    stream.flush().await?;
    until_closed(stream).await
}

async fn until_closed(mut stream: impl tokio::io::AsyncRead + Unpin) -> io::Result<()> {
    let end = async {
        while stream.read(&mut [0; 4096]).await? > 0 {}
        Ok(())
    };
    tokio::time::timeout(GONE_WITHIN, end).await?
}
