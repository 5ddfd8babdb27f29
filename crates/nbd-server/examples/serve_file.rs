//! Serves a file, such as a disk image, read-only.
//!
//!     cargo run -p nbd-server --example serve_file -- disk.img
//!     nbdinfo nbd://localhost:10812/disk

use nbd_server::{ExportSet, FileExport, handle_client};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: serve_file FILE")?;
    let exports = ExportSet::single(FileExport::open("disk", path)?);
    let listener = TcpListener::bind("127.0.0.1:10812").await?;
    println!("serving on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let exports = exports.clone();
        tokio::spawn(async move {
            if let Err(error) = handle_client(stream, &exports).await {
                eprintln!("session failed: {error}");
            }
        });
    }
}
