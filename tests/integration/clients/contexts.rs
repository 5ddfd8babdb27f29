//! What the clients make of holes, and of metadata contexts.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::{output, qemu, run, tls, uri};
use crate::support::server::Server;
use crate::support::structured::{Extent, HOLE, Mode};
use crate::support::{IMAGE_SIZE, image, wait_until};

const BASE: &str = "base-zstd.hxz";
const CHILD: &str = "child-zstd.hxz";
const GRANDCHILD: &str = "grandchild-zstd.hxz";
const SPARSE: &str = "sparse-zstd.hxz";

/// Where the export has holes, as the scripted client is told: start, length, whether.
fn holes(server: &Server, export: &str) -> Vec<(u64, u64, bool)> {
    let mut peer = server.peer(Mode::Extended, export, &["base:allocation"]);
    let mut at = 0;
    let place = |Extent { length, flags }| {
        at += length;
        (at - length, length, flags == HOLE)
    };
    let holes: Vec<_> = peer.map(0, IMAGE_SIZE).into_iter().map(place).collect();
    assert!(holes.len() > 1);
    holes
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

#[test]
fn nbdinfo_maps_holes() {
    for archive in [SPARSE, "fixed-4k-zstd.hxz", GRANDCHILD] {
        let server = tls(archive).start();
        let said = run("nbdinfo", &["--map", "--json", &uri(&server, "")]).ok();
        let map: Vec<_> = json(&said)
            .as_array()
            .unwrap()
            .iter()
            .map(|extent| {
                let number = |field: &str| extent[field].as_u64().unwrap();
                assert!([0, HOLE].contains(&number("type")));
                (number("offset"), number("length"), number("type") == HOLE)
            })
            .collect();
        assert_eq!(map, holes(&server, ""), "{archive}");
        let said = run("nbdinfo", &["--map", "--totals", &uri(&server, "")]).ok();
        assert!(said.contains("hole,zero"), "{said}");
    }
}

#[test]
fn nbdinfo_names_the_contexts() {
    let contexts = [
        "base:allocation",
        "hexz:changed:child-zstd.hxz",
        "qemu:dirty-bitmap:child-zstd.hxz",
        "hexz:changed:base-zstd.hxz",
        "qemu:dirty-bitmap:base-zstd.hxz",
    ];
    let server = tls(GRANDCHILD).start();
    let said = run("nbdinfo", &["--json", &uri(&server, "")]).ok();
    assert_eq!(json(&said)["exports"][0]["contexts"], serde_json::json!(contexts), "{said}");
    for arguments in [&["--list"][..], &[]] {
        let said = run("nbdinfo", &[arguments, &[&uri(&server, "")]].concat()).ok();
        for context in contexts {
            assert!(said.contains(&format!("\t{context}\n")), "{context} is missing in {said}");
        }
        for expected in ["using structured packets", "can_cache: true", "can_df: true"] {
            assert!(said.contains(expected), "{expected} is missing in {said}");
        }
    }
}

#[test]
fn nbdinfo_lists_several_snapshots() {
    let server = tls(BASE).archive(CHILD).archive("aux-lz4.hxz").arg("--raw").start();
    let said = run("nbdinfo", &["--list", "--json", &uri(&server, "")]).ok();
    let listed: Vec<_> = json(&said)["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| {
            let text = |field: &str| export[field].as_str().unwrap().to_owned();
            (text("export-name"), export["export-size"].as_u64().unwrap())
        })
        .collect();
    let expected =
        [(BASE, IMAGE_SIZE), (CHILD, IMAGE_SIZE), ("aux-lz4.hxz", 27), ("aux-lz4.hxz/aux", 70_000)];
    assert_eq!(listed, expected.map(|(name, size)| (name.to_owned(), size)));
}

#[test]
fn qemu_maps_holes() {
    let server = tls(SPARSE).start();
    let [object, creds, image_opts, source] = qemu(&server, "");
    let said = run("qemu-img", &["map", "--output=json", &object, &creds, &image_opts, &source]);
    let map: Vec<_> = json(&said.ok())
        .as_array()
        .unwrap()
        .iter()
        .map(|extent| {
            let number = |field: &str| extent[field].as_u64().unwrap();
            let is = |field: &str| extent[field].as_bool().unwrap();
            assert_eq!(is("zero"), !is("data"));
            (number("start"), number("length"), is("zero"))
        })
        .collect();
    assert_eq!(map, holes(&server, ""));
}

#[test]
fn qemu_compares_and_converts() {
    let server = tls(BASE).archive(SPARSE).archive(CHILD).start();
    let [object, creds, image_opts, _] = qemu(&server, "");
    let common = [object.as_str(), &creds, &image_opts];
    let source = |export: &str| {
        let [.., source] = qemu(&server, export);
        source
    };
    let compare = |one: &str, other: &str| {
        run("qemu-img", &[&["compare", "-s"][..], &common, &[one, other]].concat())
    };
    assert!(compare(&source(BASE), &source(SPARSE)).ok().contains("identical"));
    assert!(compare(&source(BASE), &source(CHILD)).failed().contains("mismatch"));

    // Holes stay holes.
    let (_folder, file) = output();
    let to = file.to_str().unwrap();
    let from = source(CHILD);
    run("qemu-img", &[&["convert", "-O", "qcow2"][..], &common, &[&from, to]].concat()).ok();
    let local = format!("driver=qcow2,file.driver=file,file.filename={to}");
    compare(&from, &local).failed();
    let said = run("qemu-img", &[&["compare"][..], &common, &[&from, &local]].concat()).ok();
    assert!(said.contains("identical"), "{said}");
    assert!(std::fs::metadata(&file).unwrap().len() < IMAGE_SIZE / 2);
}

#[test]
fn qemu_io_maps_and_reads_patterns() {
    let server = tls(SPARSE).start();
    let [object, creds, image_opts, source] = qemu(&server, "");
    let (start, length, _) = *holes(&server, "").iter().find(|(_, _, is_hole)| *is_hole).unwrap();
    let read = format!("read -P 0 {start} {length}");
    let wrong = format!("read -P 7 {start} {length}");
    let arguments = ["-r", &object, &creds, &image_opts, &source];
    let said = run("qemu-io", &[&["-c", "map", "-c", &read][..], &arguments].concat()).ok();
    assert!(said.contains("allocated at offset 0 bytes"), "{said}");
    assert!(!said.contains("verification failed"), "{said}");
    let said = run("qemu-io", &[&["-c", &wrong][..], &arguments].concat());
    assert!((said.stdout + &said.stderr).contains("verification failed"));
}

#[test]
fn nbdsh_asks_several_contexts_at_once() {
    let server = tls(GRANDCHILD).start();
    let script = "
wanted = ['base:allocation', 'hexz:changed:child-zstd.hxz', 'qemu:dirty-bitmap:base-zstd.hxz']
h.set_uri_allow_local_file(True)
for context in wanted:
    h.add_meta_context(context)
h.add_meta_context('x-nobody:knows')
h.connect_uri(uri)
assert [h.can_meta_context(context) for context in wanted] == [True] * 3
assert not h.can_meta_context('x-nobody:knows')
assert h.can_cache() and h.can_df() and h.is_read_only() and not h.can_zero()

def ask(count, offset, flags=0):
    seen = {}
    def extents(context, offset, entries, error):
        assert context not in seen, context
        seen[context] = list(zip(entries[::2], entries[1::2]))
    h.block_status(count, offset, extents, flags)
    assert sorted(seen) == sorted(wanted), seen
    return seen

everything = ask(h.get_size(), 0)
for context in wanted:
    assert sum(length for length, _ in everything[context]) == h.get_size()
    assert len(everything[context]) > 1
one = ask(h.get_size(), 0, nbd.CMD_FLAG_REQ_ONE)
for context in wanted:
    assert one[context] == everything[context][:1]
at = 0
for length, flags in everything['base:allocation']:
    if flags == nbd.STATE_HOLE | nbd.STATE_ZERO:
        assert h.pread(length, at) == bytearray(length)
    else:
        assert flags == 0
    at += length
h.cache(h.get_size(), 0)
print('done')
";
    let uri = format!("uri = '{}'", uri(&server, ""));
    assert_eq!(run("nbdsh", &["-c", &uri, "-c", script]).ok(), "done\n");
}

/// A connection's two directions, recorded.
#[derive(Default)]
struct Recording {
    from_client: Mutex<Vec<u8>>,
    from_server: Mutex<Vec<u8>>,
}

/// Passes clients on to the server, and writes down what is said; the port to come to. It
/// ends with the test's process.
fn recorder(server: &Server) -> (u16, Arc<Recording>) {
    fn pump(mut from: TcpStream, mut to: TcpStream, record: impl Fn(&[u8])) {
        let mut buffer = [0; 65_536];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            record(&buffer[..count]);
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let recording = Arc::new(Recording::default());
    let (to, shared) = (server.address(), Arc::clone(&recording));
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let Ok(server) = TcpStream::connect(to) else { continue };
            let (other_client, other_server) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            let (up, down) = (Arc::clone(&shared), Arc::clone(&shared));
            std::thread::spawn(move || {
                pump(client, server, |bytes| up.from_client.lock().unwrap().extend(bytes));
            });
            std::thread::spawn(move || {
                pump(other_server, other_client, |bytes| {
                    down.from_server.lock().unwrap().extend(bytes);
                });
            });
        }
    });
    (port, recording)
}

fn has(record: &Mutex<Vec<u8>>, wanted: &[u8]) -> bool {
    record.lock().unwrap().windows(wanted.len()).any(|window| window == wanted)
}

/// qemu 10 asks for extended headers, gets them, and uses them.
#[test]
fn qemu_negotiates_extended_headers() {
    let server = Server::builder().archive(SPARSE).start();
    let (port, recording) = recorder(&server);
    let (_folder, file) = output();
    let to = file.to_str().unwrap();
    let from = format!("nbd://127.0.0.1:{port}/{SPARSE}");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &from, to]).ok();
    assert!(std::fs::read(&file).unwrap() == image());

    let Recording { from_client, from_server } = &*recording;
    let option = b"IHAVEOPT\0\0\0\x0b\0\0\0\0";
    let reply = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\0\0\0\x01\0\0\0\0";
    wait_until("everything is recorded", || has(from_client, option) && has(from_server, reply));
    // Requests and replies are extended ones; none is compact or simple.
    for (record, magic, expected) in [
        (from_client, b"\x21\xe4\x1c\x71\0\0\0\0", true),
        // BLOCK_STATUS with REQ_ONE
        (from_client, b"\x21\xe4\x1c\x71\0\x08\0\x07", true),
        (from_client, b"\x25\x60\x95\x13\0\0\0\0", false),
        (from_server, b"\x6e\x8a\x27\x8c\0\x01\0\x01", true),
        // The last chunk with 64-bit extents
        (from_server, b"\x6e\x8a\x27\x8c\0\x01\0\x06", true),
        (from_server, b"\x66\x8e\x33\xef\0\x01\0\x01", false),
        (from_server, b"\x67\x44\x66\x98\0\0\0\0", false),
    ] {
        assert_eq!(has(record, magic), expected, "{}", magic.escape_ascii());
    }
}
