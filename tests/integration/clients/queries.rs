//! What the clients see of an export, and how they are turned away.

use super::{qemu, run, tls, uri};
use crate::support::server::Server;

#[test]
fn nbdinfo_sees_what_is_served() {
    let server = tls("base-zstd.hxz").start();
    for arguments in [&["--list"][..], &[]] {
        let uri = uri(&server, "");
        let said = run("nbdinfo", &[arguments, &[&uri]].concat()).ok();
        for expected in [
            "protocol: newstyle-fixed with TLS",
            "export=\"base-zstd.hxz\":",
            "description: main stream, 8.0 MiB, Zstandard",
            "export-size: 8388608 (8M)",
            "is_read_only: true",
            "can_multi_conn: true",
            "can_flush: true",
            "can_fua: false",
            "can_trim: false",
            "can_zero: false",
            "block_size_minimum: 1\n",
            "block_size_preferred: 65536\n",
            "block_size_maximum: 33554432",
        ] {
            assert!(said.contains(expected), "{expected} is missing in {said}");
        }
    }
    let json = run("nbdinfo", &["--json", &uri(&server, "base-zstd.hxz")]).ok();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["exports"][0]["export-size"], 8_388_608);
}

#[test]
fn nbdinfo_lists_both_streams() {
    let server = tls("aux-lz4.hxz").arg("--raw").start();
    let said = run("nbdinfo", &["--list", &uri(&server, "")]).ok();
    assert!(said.contains("export=\"aux-lz4.hxz\":"), "{said}");
    assert!(said.contains("export=\"aux-lz4.hxz/aux\":"), "{said}");
    assert!(said.contains("export-size: 70000"), "{said}");
}

#[test]
fn a_client_without_tls_is_refused() {
    let server = tls("base-zstd.hxz").start();
    let plain = format!("nbd://localhost:{}/", server.port());
    run("nbdinfo", &[&plain]).failed();
    let said = run("qemu-img", &["info", &plain]).failed();
    assert!(said.contains("TLS is required"), "{said}");
    server.assert_alive();
}

#[test]
fn a_client_that_insists_on_tls_is_told_that_there_is_none() {
    let server = Server::builder().archive("base-zstd.hxz").start();
    let with_tls = tls("base-zstd.hxz").start();
    let folder = with_tls.pki().folder().display();
    let uri = format!("nbds://localhost:{}/?tls-certificates={folder}", server.port());
    run("nbdinfo", &[&uri]).failed();
    server.assert_alive();
}

#[test]
fn a_client_that_trusts_another_ca_leaves_and_the_log_says_why() {
    let server = tls("base-zstd.hxz").start();
    let other = tls("base-zstd.hxz").start();
    let folder = other.pki().folder().display();
    let uri = format!("nbds://localhost:{}/?tls-certificates={folder}", server.port());
    run("nbdinfo", &[&uri]).failed();
    let line = server.wait_for_reason("tls_handshake");
    let cause = line.json["cause"].as_str().unwrap();
    assert!(["distrust", "left_after"].contains(&cause), "{}", line.text);
    server.assert_alive();
}

// nbd-client 3.24 speaks TLS 1.2 and sends options in small pieces. What follows the
// negotiation needs the kernel's client.
#[test]
fn nbd_client_negotiates_over_tls() {
    // It lists exports of the standard port only.
    let server = tls("base-zstd.hxz").start();
    let ca = server.pki().ca_cert();
    let ca = ca.to_str().unwrap();
    let port = server.port().to_string();
    let tls_options = ["-x", "-A", ca, "-H", "localhost"];
    let connect = ["localhost", &port, "/dev/null", "-N", "base-zstd.hxz", "-n"];
    let said = run("nbd-client", &[&connect[..], &tls_options].concat()).failed();
    assert!(said.contains("size = 8MB"), "{said}");
    let line = server.wait_for_reading();
    assert_eq!(line.json["tls"], "TLS 1.2", "{}", line.text);

    let connect = ["localhost", &port, "/dev/null", "-N", "nothing", "-n"];
    let said = run("nbd-client", &[&connect[..], &tls_options].concat()).failed();
    assert!(said.contains("no export named \"nothing\""), "{said}");
}

#[test]
fn qemu_reads_within_and_across_blocks() {
    let server = tls("fixed-4k-zstd.hxz").start();
    let [object, creds, image_opts, source] = qemu(&server, "fixed-4k-zstd.hxz");
    let commands = [
        "-c",
        "read -P 0 0 1024", // before the superblock
        "-c",
        "read 4090 12",
        "-c",
        "read 1M 3M",
        "-c",
        "read 8388607 1",
    ];
    let access = ["-r", &object, &creds, &image_opts, &source];
    let said = run("qemu-io", &[&commands[..], &access].concat()).ok();
    assert_eq!(said.matches("ops; ").count(), 4, "{said}");
    assert!(!said.contains("failed"), "{said}");

    let said = run("qemu-io", &[&["-c", "write 0 512"][..], &access].concat());
    assert!((said.stdout + &said.stderr).contains("read"), "a write has to be refused");
}

#[test]
fn nbdsh_reads_holes_and_data_in_chunks() {
    let server = tls("sparse-zstd.hxz").start();
    let uri = uri(&server, "");
    let connect = format!("h.set_uri_allow_local_file(True)\nh.connect_uri('{uri}')");
    let script = "
kinds = set()
def chunk(buffer, offset, kind, error):
    kinds.add(kind)
    assert error.value == 0
h.pread_structured(1 << 20, 0, chunk)
assert kinds == {nbd.READ_DATA, nbd.READ_HOLE}, kinds
kinds.clear()
h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert kinds == {nbd.READ_DATA}, kinds
assert h.pread(1 << 20, 0) == bytes(h.pread(1 << 19, 0)) + h.pread(1 << 19, 1 << 19)
h.set_strict_mode(0)
for attempt in (lambda: h.pwrite(b'x', 0), lambda: h.pread(1, 8 << 20)):
    try:
        attempt()
    except nbd.Error as error:
        print(error.errno)
h.flush()
";
    let said = run("nbdsh", &["-c", &connect, "-c", script]).ok();
    assert_eq!(said, "EPERM\nEINVAL\n");
}
