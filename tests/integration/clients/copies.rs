//! Every archive, copied whole through TLS by each client that copies.

use super::{output, qemu, run, tls, uri};
use crate::support::pki::Pki;
use crate::support::server::Server;
use crate::support::{IMAGE_SHA256, IMAGE_SIZE, PASSWORD, archive, sha256};

const CHILD: &str = "bdfb933e575594c1e7909a1d8cac0836966fad767893806bd8303d0b2ce7c8d1";
const GRANDCHILD: &str = "b2bc3711e3005be4f34b835d6b3375c64674ad995ac3eb4065575e3ea8764433";
const TEXT: &str = "c12f9f46eb3393106b75ecbd89218fe2cca06d9d636d42dcc6ffeea1eeea015d";
const AUXILIARY: &str = "5a42555d1241e69065fc93ebac465c5ba48699ba1cb1fe8d81778da49e6b270d";
/// The 27 bytes of the file that is the auxiliary archive's main stream.
const HELLO: &[u8] = b"hello from a hexz snapshot\n";

/// Serves `name` and copies its export in both ways.
fn copies(name: &str, args: &[&str], export: &str, size: u64, expected: &str) {
    let server = Server::builder().archive(name).args(args).tls(Pki::new()).start();

    let (_folder, file) = output();
    run("nbdcopy", &[&uri(&server, export), file.to_str().unwrap()]).ok();
    let copied = std::fs::read(&file).unwrap();
    assert_eq!((copied.len() as u64, sha256(&copied).as_str()), (size, expected), "nbdcopy {name}");

    let (_folder, file) = output();
    let [object, creds, image_opts, source] = qemu(&server, export);
    let to = file.to_str().unwrap();
    run("qemu-img", &["convert", "-O", "raw", &object, &creds, &image_opts, &source, to]).ok();
    let mut copied = std::fs::read(&file).unwrap();
    // qemu counts in sectors, and fills the last one with zeros.
    assert_eq!(copied.len() as u64, size.next_multiple_of(512), "qemu-img {name}");
    assert!(copied.split_off(size as usize).iter().all(|&byte| byte == 0));
    assert_eq!(sha256(&copied), expected, "qemu-img {name}");
}

#[test]
fn base_zstd() {
    copies("base-zstd.hxz", &[], "base-zstd.hxz", IMAGE_SIZE, IMAGE_SHA256);
}

#[test]
fn base_lz4() {
    copies("base-lz4.hxz", &[], "", IMAGE_SIZE, IMAGE_SHA256);
}

#[test]
fn sparse() {
    copies("sparse-zstd.hxz", &[], "sparse-zstd.hxz", IMAGE_SIZE, IMAGE_SHA256);
}

#[test]
fn fixed_blocks() {
    copies("fixed-64k-zstd.hxz", &[], "fixed-64k-zstd.hxz", IMAGE_SIZE, IMAGE_SHA256);
    copies("fixed-4k-zstd.hxz", &[], "fixed-4k-zstd.hxz", IMAGE_SIZE, IMAGE_SHA256);
}

#[test]
fn signed() {
    copies("signed-zstd.hxz", &[], "signed-zstd.hxz", IMAGE_SIZE, IMAGE_SHA256);
}

#[test]
fn encrypted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, format!("{PASSWORD}\n")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&file, mode).unwrap();
    for name in ["encrypted-zstd.hxz", "encrypted-lz4.hxz"] {
        let args = ["--password-file", file.to_str().unwrap()];
        copies(name, &args, name, IMAGE_SIZE, IMAGE_SHA256);
    }
}

#[test]
fn thin() {
    copies("child-zstd.hxz", &[], "child-zstd.hxz", IMAGE_SIZE, CHILD);
    copies("grandchild-zstd.hxz", &[], "grandchild-zstd.hxz", IMAGE_SIZE, GRANDCHILD);
}

#[test]
fn dictionary_and_a_size_that_is_no_multiple_of_512() {
    copies("text-dict-zstd.hxz", &[], "text-dict-zstd.hxz", 700_000, TEXT);
}

#[test]
fn both_streams_of_a_packed_directory() {
    copies("aux-lz4.hxz", &["--raw"], "aux-lz4.hxz", 27, &sha256(HELLO));
    copies("aux-lz4.hxz", &["--raw"], "aux-lz4.hxz/aux", 70_000, AUXILIARY);
}

#[test]
fn many_small_files_on_many_index_pages() {
    let manifest = std::fs::read(archive("tree.hxz")).unwrap();
    let manifest = String::from_utf8_lossy(&manifest);
    assert!(manifest.contains(r#"{"path":"HELLO","offset":0,"size":27"#));

    let server = Server::builder().archive("tree.hxz").arg("--raw").tls(Pki::new()).start();
    let (_folder, file) = output();
    run("nbdcopy", &[&uri(&server, "tree.hxz"), file.to_str().unwrap()]).ok();
    let copied = std::fs::read(&file).unwrap();
    assert_eq!(copied.len(), 288_662);
    assert!(copied.starts_with(HELLO));
}

#[test]
fn by_several_connections_and_requests() {
    let server = tls("grandchild-zstd.hxz").start();
    let (_folder, file) = output();
    let options = ["--connections=4", "--requests=64", "--request-size=65536"];
    let (uri, to) = (uri(&server, ""), file.to_str().unwrap().to_owned());
    run("nbdcopy", &[options[0], options[1], options[2], &uri, &to]).ok();
    assert_eq!(sha256(&std::fs::read(&file).unwrap()), GRANDCHILD);
}

/// libnbd CVE-2022-0485 | copying that ignores read errors: the server's part is to report
/// them, and to stay in step
#[test]
fn an_unreadable_block_fails_the_copy() {
    let folder = tempfile::tempdir().unwrap();
    let damaged = folder.path().join("damaged.hxz");
    let mut bytes = std::fs::read(archive("base-zstd.hxz")).unwrap();
    bytes[60_000] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();

    let server = Server::builder().arg(damaged.as_os_str()).tls(Pki::new()).start();
    let (_folder, file) = output();
    run("nbdcopy", &[&uri(&server, ""), file.to_str().unwrap()]).failed();
    let line = server.wait_for_reason("crc");
    assert!(line.message().contains("damaged.hxz, byte"), "{}", line.text);
    assert!(line.message().contains("CRC-32"), "{}", line.text);
    server.assert_alive();
}
