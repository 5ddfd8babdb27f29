//! The throughput of the proxy alone.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::{Bench, MIB};
use crate::table::Row;

const CONNECTIONS: usize = 8;
const TIME: Duration = Duration::from_secs(4);
/// Throughput below which the proxy could be what limits a case, in MiB/s.
const REQUIRED: f64 = 300.0;

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for is_limited in [false, true] {
        let proxy = bench.nginx.behind(bench.link(is_limited))?;
        let downloads: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let address = proxy.address();
                std::thread::spawn(move || download(address))
            })
            .collect();
        let mut rate = 0.0;
        for download in downloads {
            rate += download.join().map_err(|_| anyhow!("a download panicked"))??;
        }
        let limit = bench.bytes_per_second() as f64 / MIB;
        let name = if is_limited { "limited link" } else { "link without limit" };
        let row = Row::new(format!("{CONNECTIONS} downloads from nginx over the {name}"), "")
            .compared("HTTP client", format!("{rate:.0} MiB/s"));
        rows.push(if is_limited {
            row.goal(format!("{limit:.0} MiB/s ± 5 %"), (rate / limit - 1.0).abs() < 0.05)
        } else {
            row.goal(format!(">= {REQUIRED} MiB/s"), rate >= REQUIRED)
        });
    }
    Ok(rows)
}

/// Downloads the image for some time. Returns the rate in MiB/s, without the first response.
fn download(address: SocketAddr) -> Result<f64> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIME))?;
    write!(stream, "GET /image.raw HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut buffer = vec![0; 256 * 1024];
    stream.read_exact(&mut buffer[..1])?;
    let (started, mut bytes) = (Instant::now(), 0);
    while started.elapsed() < TIME {
        match stream.read(&mut buffer)? {
            0 => break,
            count => bytes += count,
        }
    }
    Ok(bytes as f64 / started.elapsed().as_secs_f64() / MIB)
}
