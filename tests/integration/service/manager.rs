//! A service manager, as far as the program has to do with it.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use super::{socket_path, text};
use crate::support::PATIENCE;
use crate::support::server::{Builder, Server};

/// A service manager.
pub struct Manager {
    socket: UnixDatagram,
    pub place: String,
    _folder: Option<tempfile::TempDir>,
}

impl Manager {
    pub fn at_a_path() -> Self {
        let (folder, path) = socket_path();
        let socket = UnixDatagram::bind(&path).unwrap();
        Self::new(socket, text(&path).to_owned(), Some(folder))
    }

    pub fn abstract_one() -> Self {
        let name = format!("hexz-nbd-test-manager-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        Self::new(UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}"), None)
    }

    fn new(socket: UnixDatagram, place: String, folder: Option<tempfile::TempDir>) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, place, _folder: folder }
    }

    pub fn starts(&self, builder: Builder) -> Server {
        builder.env("NOTIFY_SOCKET", &self.place).start()
    }

    /// The next message's lines.
    pub fn hears(&self) -> Vec<String> {
        let mut message = [0; 8192];
        let length = self.socket.recv(&mut message).expect("it hears nothing");
        let message = std::str::from_utf8(&message[..length]).unwrap();
        message.lines().map(str::to_owned).collect()
    }

    /// The messages until the one that begins so, and that one.
    pub fn hears_until(&self, line: &str) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.hears();
            if message.iter().any(|said| said.starts_with(line)) {
                return message;
            }
            assert!(Instant::now() < deadline, "it doesn't hear {line}");
        }
    }

    /// How many messages there are within so long.
    pub fn counts(&self, time: Duration) -> usize {
        let deadline = Instant::now() + time;
        let mut count = 0;
        let mut message = [0; 8192];
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1)))).unwrap();
            count += usize::from(self.socket.recv(&mut message).is_ok());
        }
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        count
    }
}
