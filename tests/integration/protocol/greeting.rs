//! "Newstyle negotiation", "Handshake flags", "Client flags", `NBD_OPT_EXPORT_NAME`.

use super::{BASE, base, servers};
use crate::support::client::{
    Client, Duplex, FLAGS, OPT_EXPORT_NAME, OPT_LIST, Request, TRANSMISSION_FLAGS, option,
};
use crate::support::{IMAGE_SIZE, image};

/// "Newstyle negotiation": NBDMAGIC, IHAVEOPT, 16 bits of handshake flags, and then it
/// is the client's turn.
#[test]
fn the_greeting_to_the_byte() {
    for server in servers(BASE) {
        let mut client = server.connect();
        client.expect(b"\x4e\x42\x44\x4d\x41\x47\x49\x43\x49\x48\x41\x56\x45\x4f\x50\x54\x00\x03");
        client.stream.shutdown(std::net::Shutdown::Write);
        client.expect_closed();
    }
}

/// "Client flags": "The server MUST drop the TCP connection if the client sets an unknown
/// flag, or a flag that does not match something advertised by the server."
#[test]
fn an_unknown_client_flag_closes() {
    for server in servers(BASE) {
        for bit in 2..32 {
            let mut client = server.connect();
            client.greet(FLAGS | 1 << bit);
            client.expect_closed();
        }
        server.assert_alive();
    }
}

/// "Fixed newstyle negotiation": "The client SHOULD reply with `NBD_FLAG_C_FIXED_NEWSTYLE`
/// set", so it may not; NO_ZEROES is independent of it.
#[test]
fn export_name_with_and_without_padding() {
    let server = base();
    for flags in [0, 1, 2, 3] {
        for name in ["", BASE] {
            let mut client = server.connect();
            client.greet(flags);
            client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
            expect_export_name_reply(&mut client, flags);
        }
    }
}

/// Inside TLS the client's flags from before it still count: the greeting isn't repeated.
#[test]
fn export_name_inside_tls() {
    let [_, server] = servers(BASE);
    for flags in [1, 3] {
        let mut client = server.connect();
        client.greet(flags);
        let mut client = client.starttls(server.pki().client_config());
        client.send(&option(OPT_EXPORT_NAME, b""));
        expect_export_name_reply(&mut client, flags);
    }
}

/// "S: 64 bits, size of the export in bytes; S: 16 bits, transmission flags; S: 124 bytes,
/// zeroes (unless `NBD_FLAG_C_NO_ZEROES` was negotiated by the client)"
fn expect_export_name_reply<S: Duplex>(client: &mut Client<S>, flags: u32) {
    client.expect(&IMAGE_SIZE.to_be_bytes());
    client.expect(&TRANSMISSION_FLAGS.to_be_bytes());
    if flags & 2 == 0 {
        client.expect(&[0; 124]);
    }
    assert_eq!(client.read_ok(4096, 4096), &image()[4096..8192]);
    client.send_request(Request::disc());
    client.expect_end();
}

/// `NBD_OPT_EXPORT_NAME`: "If the chosen export does not exist …, the server MUST
/// terminate the session."
#[test]
fn export_name_of_an_unknown_export_closes() {
    for server in servers(BASE) {
        for name in ["nothing", "base-zstd", "base-zstd.hxz/aux", "base-zstd.hxz\0", " "] {
            let mut client = server.greeted();
            client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
            client.expect_closed();
        }
        server.assert_alive();
    }
}

/// A client that speaks fixed newstyle without NO_ZEROES gets no padding behind GO: "The
/// server MUST NOT send any zero padding bytes after the `NBD_REP_ACK` data".
#[test]
fn go_never_pads() {
    let server = base();
    let mut client = server.connect();
    client.greet(1);
    client.go("");
    assert_eq!(client.read_ok(0, 512), &image()[..512]);
}

/// "Newstyle negotiation": options begin with IHAVEOPT; what doesn't isn't NBD.
#[test]
fn a_wrong_option_magic_closes() {
    for server in servers(BASE) {
        let mut bytes = option(OPT_LIST, b"");
        bytes[7] ^= 1;
        let mut client = server.greeted();
        client.send(&bytes);
        client.expect_closed();
        server.assert_alive();
    }
}
