//! Archives of all kinds read the same from a store as from a file.

use object_server::ObjectServer;

use super::{gateway, read_all};
use crate::clients;
use crate::support::server::Server;
use crate::support::{PASSWORD, archive};

const NAMES: [&str; 11] = [
    "aux-lz4.hxz",
    "base-lz4.hxz",
    "child-zstd.hxz",
    "encrypted-lz4.hxz",
    "encrypted-zstd.hxz",
    "fixed-4k-zstd.hxz",
    "fixed-64k-zstd.hxz",
    "grandchild-zstd.hxz",
    "signed-zstd.hxz",
    "sparse-zstd.hxz",
    "text-dict-zstd.hxz",
];

/// Starts gateways that serve the folder with the archives: from a store, and directly.
fn both(args: &[&str]) -> (ObjectServer, Server, Server) {
    let folder = archive("");
    let store = ObjectServer::builder().folder(&folder).start().unwrap();
    let password = ("HEXZ_PASSWORD", PASSWORD);
    let start = |at: &str| {
        let builder = gateway().args(args).env(password.0, password.1);
        builder.args(["--export-dir", at]).start()
    };
    let (remote, local) = (start(&store.url("")), start(folder.to_str().unwrap()));
    (store, remote, local)
}

#[test]
fn every_archive_reads_the_same() {
    let (_store, remote, local) = both(&["--raw"]);
    let exports = NAMES.iter().map(|name| (*name).to_owned());
    for export in exports.chain(["aux-lz4.hxz/aux".to_owned()]) {
        let [one, other] = [&remote, &local].map(|server| {
            let mut client = server.greeted();
            let length = client.go(&export).size;
            read_all(&mut client, length)
        });
        assert!(one == other, "{export}");
    }
}

#[test]
fn with_the_smallest_memory() {
    let (_store, remote, local) = both(&["--cache-size", "0"]);
    for export in ["grandchild-zstd.hxz", "fixed-4k-zstd.hxz"] {
        let [one, other] = [&remote, &local].map(|server| {
            let mut client = server.greeted();
            let length = client.go(export).size;
            read_all(&mut client, length)
        });
        assert!(one == other, "{export}");
    }
}

/// Holes, and differences between archives of a chain.
#[test]
fn block_status_is_the_same() {
    let (_store, remote, local) = both(&[]);
    for (export, context) in [
        ("sparse-zstd.hxz", "base:allocation"),
        ("grandchild-zstd.hxz", "base:allocation"),
        ("grandchild-zstd.hxz", "hexz:changed:child-zstd.hxz"),
        ("child-zstd.hxz", "hexz:changed:base-zstd.hxz"),
    ] {
        // An export has to be open before others are compared with it.
        let [one, other] = [&remote, &local].map(|server| {
            server.go("base-zstd.hxz").read_ok(0, 512);
            server.go("child-zstd.hxz").read_ok(0, 512);
            let uri = format!("nbd://{}/{export}", server.address());
            clients::run("nbdinfo", &[&format!("--map={context}"), &uri]).ok()
        });
        assert_eq!(one, other, "{export} {context}");
        assert!(one.lines().count() > 1, "{one}");
    }
}

#[test]
fn signatures_are_verified() {
    let folder = archive("");
    let store = ObjectServer::builder().folder(&folder).start().unwrap();
    let key = archive("signed.public.key");
    let signed = |name: &str| gateway().arg("--verify-key").arg(&key).arg(store.url(name));
    signed("signed-zstd.hxz").start().go("").read_ok(0, 512);
    signed("base-zstd.hxz").fails_with(3, "not_signed");
}

/// The chain has a digest for each archive, and each has a tree beside it.
#[test]
fn digests_of_a_chain() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["grandchild-zstd.hxz", "child-zstd.hxz", "base-zstd.hxz"];
    let paths = names.map(|name| folder.path().join(name));
    names.iter().zip(&paths).for_each(|(name, path)| {
        std::fs::copy(archive(name), path).unwrap();
    });
    let arguments = ["tree".into()].into_iter().chain(paths);
    let list = crate::support::server::run(arguments).stdout;
    let digests = folder.path().join("digests");
    std::fs::write(&digests, list).unwrap();
    let store = ObjectServer::builder().folder(folder.path()).start().unwrap();
    let server = gateway().arg("--digest").arg(&digests).arg(store.url(names[0])).start();
    super::assert_serves(&server, "", names[0]);
}
