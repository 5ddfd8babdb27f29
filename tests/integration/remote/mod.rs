//! Archives in object stores and on HTTP servers: the program and real clients against a scripted
//! server. Unless a test says otherwise, the gateway runs in its sandbox.

mod chains;
mod credentials;
mod denials;
mod disk_cache;
mod failures;
mod folders;
mod forgeries;
mod formats;
mod names;
mod outages;
mod refusals;
mod reloads;
mod replacements;
mod serving;
mod sharing;
mod traces;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use object_server::ObjectServer;

use crate::archive_writer::{ArchiveWriter, Written, noise};
use crate::support::client::{Client, FLAGS, OPT_GO, REP_ERR_UNKNOWN, Session, info_data};
use crate::support::server::{Builder, Server};
use crate::support::{PATIENCE, archive};

const MIB: u64 = 1 << 20;
/// Size of the blocks of [`Sample`], in bytes.
const BLOCK: u64 = 64 * 1024;

/// An archive of an image that doesn't compress, and its image. Its only index page is at its end.
struct Sample {
    image: Vec<u8>,
    archive: Written,
}

impl Sample {
    /// Creates an archive of this many bytes, with other content for each seed.
    fn new(seed: u64, length: u64) -> Self {
        let image = noise(seed, length as usize);
        let archive = ArchiveWriter::of_image(&image, BLOCK as usize).write();
        Self { image, archive }
    }

    fn bytes(&self) -> Vec<u8> {
        self.archive.bytes.clone()
    }

    /// Returns the argument of `--digest` for it.
    fn digest(&self, name: &str) -> String {
        format!("{name}={}", blake3::hash(&self.archive.bytes).to_hex())
    }

    fn part(&self, offset: u64, length: u64) -> &[u8] {
        &self.image[offset as usize..(offset + length) as usize]
    }

    /// Checks that a client reads all of the image.
    #[track_caller]
    fn is_read(&self, client: &mut Client<Session>) {
        assert!(read_all(client, self.image.len() as u64) == self.image, "other bytes");
    }

    /// Checks that a client reads the block at `offset`.
    #[track_caller]
    fn is_read_at(&self, client: &mut Client<Session>, offset: u64) {
        let read = client.read(offset, BLOCK as u32);
        assert!(read.as_deref() == Ok(self.part(offset, BLOCK)), "at {offset}: {:?}", read.err());
    }
}

/// A sample of 8 MiB.
fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| Sample::new(1, 8 * MIB))
}

/// A sample of the same length with other content.
fn other_sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| Sample::new(2, 8 * MIB))
}

/// A plain HTTP server with the sample as `images/web.hxz`.
fn store() -> ObjectServer {
    let store = ObjectServer::builder().start().unwrap();
    store.put(WEB, sample().bytes());
    store
}

const WEB: &str = "images/web.hxz";

/// A gateway in its sandbox, which doesn't ask for traces: many tests count requests.
fn gateway() -> Builder {
    sandboxed().args(["--traces", "off"])
}

/// A gateway in its sandbox.
fn sandboxed() -> Builder {
    Server::builder().args(["--sandbox", "require"])
}

/// A gateway in its sandbox that serves the sample from `store`.
fn gateway_of(store: &ObjectServer) -> Builder {
    gateway().arg(store.url(WEB))
}

fn read_all(client: &mut Client<Session>, length: u64) -> Vec<u8> {
    let mut image = Vec::new();
    for offset in (0..length).step_by(MIB as usize) {
        image.extend(client.read_ok(offset, MIB.min(length - offset) as u32));
    }
    image
}

/// Returns the image of an archive in the repository, read from the file.
fn local_image(name: &str) -> Vec<u8> {
    let server = Server::start([archive(name)]);
    let mut client = server.greeted();
    let length = client.go("").size;
    read_all(&mut client, length)
}

/// Opens an export, and checks that it has the image of an archive in the repository.
#[track_caller]
fn assert_serves(server: &Server, export: &str, name: &str) {
    let image = local_image(name);
    let mut client = server.greeted();
    let length = client.go(export).size;
    assert_eq!(length, image.len() as u64);
    assert!(read_all(&mut client, length) == image, "{export} has other bytes than {name}");
}

/// Checks that a client can't open an export.
#[track_caller]
fn assert_no_export(server: &Server, export: &str) {
    server.greeted().refused(OPT_GO, &info_data(export.as_bytes(), &[]), REP_ERR_UNKNOWN);
}

/// Returns true if a client can open an export.
fn has_export(server: &Server, export: &str) -> bool {
    let mut client = server.connect();
    client.greet(FLAGS);
    let replies = client.option(OPT_GO, &info_data(export.as_bytes(), &[]));
    replies.last().is_some_and(|reply| reply.kind == crate::support::client::REP_ACK)
}

/// Gets a page of the monitor, head and body. The server has the option `--monitor 0`.
fn monitor_page(server: &Server, target: &str) -> String {
    let line = server.wait_for_log("the monitor runs", |line| line.json["monitor"].is_string());
    let mut stream = TcpStream::connect(line.json["monitor"].as_str().unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}

fn put_file(store: &ObjectServer, key: &str, name: &str) {
    store.put(key, std::fs::read(archive(name)).unwrap());
}

/// Writes a file with the sample in a folder, and returns the content of its tree file.
fn tree_of(sample: &Sample) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.hxz");
    sample.archive.save(&path);
    let ended = crate::support::server::run([Path::new("tree"), &path]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    std::fs::read(folder.path().join("web.hxz.tree")).unwrap()
}

fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}
