//! What the NBD specification says of a server, section by section.

mod allowance;
mod extended;
mod greeting;
mod info;
mod meta;
mod modes;
mod options;
mod order;
mod rates;
mod reads;
mod refusals;
mod status;
mod structured;

use crate::support::pki::Pki;
use crate::support::server::Server;

const BASE: &str = "base-zstd.hxz";

/// One without TLS, one with.
fn servers(archive: &str) -> [Server; 2] {
    let plain = Server::builder().archive(archive);
    let tls = Server::builder().archive(archive).tls(Pki::new());
    [plain.start(), tls.start()]
}

fn base() -> Server {
    Server::builder().archive(BASE).start()
}
