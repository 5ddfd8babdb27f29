//! The faults that servers of this kind have had, and what the program does at its edges.
//!
//! Where a comment names another server, it names the fault that the test is about, as
//! `who | how it went wrong`.

mod access;
mod deadlines;
mod endings;
mod flood;
mod hostile;
mod hostile_archives;
mod hostile_negotiation;
mod listening;
mod log;
mod log_fields;
mod names;
mod plaintext;
mod proxied;
mod resets;
mod sandbox;
mod shortage;
mod shutdown;
mod slots;
mod starting;
mod tls;
mod tls_expiry;
mod tls_files;
mod tls_kinds;
mod tls_records;
mod tls_secrets;
mod unreadable;

use crate::support::client::{Client, GREETING, Plain};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};
use crate::support::wait_until;

const BASE: &str = "base-zstd.hxz";

fn plain() -> Builder {
    Server::builder().archive(BASE)
}

fn tls() -> Builder {
    plain().tls(Pki::new())
}

/// Connects when there is a place: those of clients that have just vanished are taken
/// until the server has noticed. The greeting has been read.
fn connect(server: &Server) -> Client<Plain> {
    let mut connected = None;
    wait_until("there is a place", || {
        let mut client = server.connect();
        let mut greeting = [0; GREETING.len()];
        let greeted = std::io::Read::read_exact(&mut client.stream, &mut greeting).is_ok();
        if greeted {
            assert_eq!(greeting, GREETING);
            connected = Some(client);
        }
        greeted
    });
    connected.unwrap()
}

/// Waits until the server holds no more descriptors than it did.
fn wait_for_descriptors(server: &Server, before: usize) {
    wait_until("all connections are closed", || server.fd_count() <= before);
}
