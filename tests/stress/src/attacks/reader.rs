//! The honest reader, and connections as everybody makes them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use nbd_server::client::{self, Transmission};
use tokio::net::{TcpSocket, TcpStream};

use crate::hostile::{HONEST, HONEST_BLOCK, HONEST_BLOCKS};

/// Blocks that are read again and again.
const CACHED_BLOCKS: u64 = 16;

/// Distance of the blocks that are read one after another, prime to their number.
const STRIDE: u64 = 1009;

/// Times of an honest client's reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// Median of reads that have to be decoded.
    pub(crate) uncached: Duration,
    /// 99th percentile of reads of what is in the cache.
    pub(crate) cached_p99: Duration,
}

/// Connects from an address of loopback, and greets.
pub(crate) async fn connect(from: Ipv4Addr, to: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind((from, 0).into())?;
    let mut stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    client::greet(&mut stream).await?;
    Ok(stream)
}

/// Reads for `duration`: on one connection blocks that nobody has read yet, on another one
/// the same few.
pub(crate) async fn measure(to: SocketAddr, duration: Duration, round: u64) -> Result<Times> {
    let begin = async || -> Result<Transmission<TcpStream>> {
        let stream = connect(Ipv4Addr::new(127, 1, 0, 1), to).await?;
        Ok(client::go(stream, HONEST).await?)
    };
    let (mut uncached, mut cached) = (begin().await?, begin().await?);
    for block in 0..CACHED_BLOCKS {
        cached.read(block * HONEST_BLOCK, 4096).await?;
    }
    let end = Instant::now() + duration;
    let new = async {
        let mut times = Vec::new();
        // Each round has blocks of its own.
        let half = (HONEST_BLOCKS - CACHED_BLOCKS) / 2;
        for number in 0..half {
            if Instant::now() >= end {
                break;
            }
            // In no order that readahead could follow.
            let block = CACHED_BLOCKS + round * half + number * STRIDE % half;
            let begun = Instant::now();
            uncached.read(block * HONEST_BLOCK + 512, 4096).await?;
            times.push(begun.elapsed());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        anyhow::Ok(times)
    };
    let known = async {
        let mut times = Vec::new();
        let mut number = 0;
        while Instant::now() < end {
            number += 1;
            let begun = Instant::now();
            cached.read(number % CACHED_BLOCKS * HONEST_BLOCK, 4096).await?;
            times.push(begun.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        anyhow::Ok(times)
    };
    let (new, known) = tokio::try_join!(new, known)?;
    Times::of(new, known)
}
