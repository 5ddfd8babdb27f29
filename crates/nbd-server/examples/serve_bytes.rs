//! Serves any sequence of bytes through the engine: here, text that is made up as it is
//! read, a gigabyte of it that is stored nowhere.
//!
//!     cargo run -p nbd-server --example serve_bytes
//!     nbdcopy nbd://localhost:10811/numbers - | head -3
//!
//! The engine takes any stream. This program gives it TCP connections of this machine and
//! neither TLS nor deadlines; see `nbd_gateway` for what a server on a network needs.

use std::error::Error;
use std::future::{Future, ready};
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::{
    Export, Exports, ListEntry, NegotiationLimits, ReadError, Security, Segment, Span,
    TransmitLimits, greet, negotiate, transmit,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::Sender;

/// A line for each number: "line 0000000001\n", 16 bytes and a newline.
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

/// One export, which is the default one too.
struct OnlyNumbers(Arc<Numbers>);

impl Exports for OnlyNumbers {
    type Export = Numbers;

    fn find(&self, name: &[u8]) -> impl Future<Output = Option<Arc<Numbers>>> + Send {
        ready(matches!(name, b"" | b"numbers").then(|| Arc::clone(&self.0)))
    }

    async fn list(&self, listings: Sender<ListEntry>) {
        let (name, description) = (self.0.name().into(), self.0.description().into());
        // A client that has gone needs no listing.
        listings.send(ListEntry { name, description }).await.ok();
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let exports = Arc::new(OnlyNumbers(Arc::new(Numbers)));
    let limits = TransmitLimits::new(Budget::new(64 * 1024 * 1024, 8 * 1024 * 1024));
    let listener = TcpListener::bind("127.0.0.1:10811").await?;
    println!("serving on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        let (exports, limits) = (Arc::clone(&exports), limits.clone());
        tokio::spawn(async move {
            if let Err(error) = serve(stream, &exports, &limits).await {
                eprintln!("a connection ended: {error}");
            }
        });
    }
}

async fn serve(
    mut stream: TcpStream,
    exports: &OnlyNumbers,
    limits: &TransmitLimits,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let flags = greet(&mut stream).await?;
    let mut quota = NegotiationLimits::default().quota();
    let chosen = negotiate(&mut stream, flags, Security::Plain, exports, &mut quota).await?;
    if let Some(chosen) = chosen {
        let summary = transmit(stream, chosen, limits, std::future::pending()).await?;
        println!("a client left after {} requests", summary.requests);
    }
    Ok(())
}
