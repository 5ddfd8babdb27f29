//! Serves one snapshot over TCP, without TLS.
//!
//!     cargo run -p hexz-exports --example serve_snapshot -- disk.hxz
//!     nbdinfo nbd://localhost

use hexz_exports::SnapshotExports;
use nbd_server::handle_client;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: serve_snapshot ARCHIVE")?;
    let exports = SnapshotExports::open(&path)?;
    let listener = TcpListener::bind("127.0.0.1:10809").await?;
    loop {
        let (stream, client) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let exports = exports.clone();
        tokio::spawn(async move {
            if let Err(error) = handle_client(stream, &exports).await {
                eprintln!("{client}: {error}");
            }
        });
    }
}
