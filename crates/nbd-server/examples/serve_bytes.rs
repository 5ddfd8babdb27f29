//! Serves an export of its own making: text that is generated as it is read, a gigabyte of it that
//! is stored nowhere.
//!
//!     cargo run -p nbd-server --example serve_bytes
//!     nbdcopy nbd://localhost:10811/numbers - | head -3
//!
//! All clients share one memory budget, and Ctrl-C drains their requests in flight. There is no
//! TLS; see `nbd-gateway` for what a server on a network needs.

use std::error::Error;
use std::io::Write;

use bytes::Bytes;
use nbd_server::{Export, ExportSet, ReadError, Segment, SessionOptions, Span, handle_client_with};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A line for each number: "line 00000000001\n", 17 bytes.
struct Numbers;

const LINE: u64 = 17;

impl Export for Numbers {
    fn name(&self) -> &str {
        "numbers"
    }

    fn description(&self) -> &str {
        "numbered lines of 17 bytes"
    }

    fn size(&self) -> u64 {
        LINE * 64_000_000
    }

    async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        let first = span.offset / LINE;
        let last = span.end().div_ceil(LINE);
        let mut text = Vec::new();
        for number in first..last {
            writeln!(text, "line {number:011}").map_err(|_| ReadError::Unreadable(span.offset))?;
        }
        let skipped = usize::try_from(span.offset % LINE).unwrap_or(0);
        let wanted = Bytes::from(text).slice(skipped..skipped + span.length as usize);
        part(span.offset, Segment::Data(wanted));
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let exports = ExportSet::single(Numbers);
    let options = SessionOptions::default();
    let (shutdown, _) = watch::channel(false);
    let listener = TcpListener::bind("127.0.0.1:10811").await?;
    println!("serving on {}", listener.local_addr()?);
    let mut sessions = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted?.0,
            _ = sessions.join_next(), if !sessions.is_empty() => continue,
            interrupted = tokio::signal::ctrl_c() => break interrupted?,
        };
        stream.set_nodelay(true)?;
        let (exports, options, mut stop) = (exports.clone(), options.clone(), shutdown.subscribe());
        sessions.spawn(async move {
            let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
            match handle_client_with(stream, &exports, &options, stopped).await {
                Ok(Some(stats)) => println!("a client left after {} requests", stats.requests),
                Ok(None) => println!("a client left without choosing an export"),
                Err(error) => eprintln!("session failed: {error}"),
            }
        });
    }
    shutdown.send_replace(true);
    while sessions.join_next().await.is_some() {}
    Ok(())
}
