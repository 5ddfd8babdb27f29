//! As a service: started by a service manager, by inetd, or by its client.

mod activation;
#[cfg(feature = "remote")]
mod dialer;
mod hangups;
mod manager;
mod notify;
mod rights;
mod stdio;
mod units;

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crate::support::client::{Client, FLAGS, Plain};
use crate::support::server::{Builder, Server};
use crate::support::{IMAGE_SIZE, image, wait_until};

const BASE: &str = "base-zstd.hxz";

fn plain() -> Builder {
    Server::builder().args(["--sandbox", "require"]).archive(BASE)
}

/// A server that gets one descriptor handed over, of that name.
fn handed(socket: impl Into<OwnedFd>, name: &str) -> Builder {
    let script = "LISTEN_PID=$$ exec \"$@\" 3<&0 </dev/null";
    plain()
        .without_listening()
        .within(["sh", "-c", script, "sh"])
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", name)
        .stdio(socket.into(), std::process::Stdio::null())
}

/// Reads all of the default export.
fn reads_all(stream: Plain) {
    let mut client = Client::new(stream);
    client.greet(FLAGS);
    client.go("");
    assert!(client.read_ok(0, IMAGE_SIZE as u32) == image());
    client.disconnect();
}

/// Connects as soon as somebody listens there, which starts the server.
fn first_client(path: &Path) -> JoinHandle<UnixStream> {
    let path = path.to_owned();
    std::thread::spawn(move || {
        let mut connected = None;
        wait_until("somebody listens", || {
            connected = UnixStream::connect(&path).ok();
            connected.is_some()
        });
        connected.unwrap()
    })
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A folder for sockets, and a path in it.
fn socket_path() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    (folder, path)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
