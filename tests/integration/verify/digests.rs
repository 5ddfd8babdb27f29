//! Archives that are opened only if they are the files that their digests are of.

use std::ffi::OsStr;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use hexz_reader::storage;
use hexz_reader::{Digests, Error, ErrorKind, OpenOptions, Snapshot, StreamKind};

use super::Watched;
use crate::archive_writer::{ArchiveWriter, HEADER_REGION, Piece, Written, image, noise, text};
use crate::snapshot::read;
use crate::support::client::{Client, Duplex, OPT_INFO, REP_ERR_UNKNOWN, info_data};
use crate::support::server::{Server, run, run_to_failure};
use crate::support::{archive, wait_until};

/// Length of a block, in bytes.
pub(super) const BLOCK: usize = 64 * 1024;
/// Bytes that are verified together.
const GROUP: usize = storage::GROUP_LEN as usize;

fn with(digests: Digests) -> OpenOptions {
    OpenOptions { digests: Some(Arc::new(digests)), ..OpenOptions::default() }
}

fn line(name: &str, bytes: &[u8]) -> String {
    format!("{}  {name}\n", blake3::hash(bytes))
}

fn list(lines: &str) -> OpenOptions {
    let mut digests = Digests::default();
    digests.add_list(lines.as_bytes()).unwrap();
    with(digests)
}

/// A parent of some blocks and a child of it, with a folder for both.
struct Chain {
    folder: tempfile::TempDir,
    parent: Vec<u8>,
    child: Vec<u8>,
}

impl Chain {
    fn new() -> Self {
        let blocks: Vec<Vec<u8>> = (0..20).map(|seed| noise(seed, 2000)).collect();
        let main = blocks.iter().cloned().map(Piece::Data).collect();
        let parent = ArchiveWriter { main, blocks_per_page: 4, ..ArchiveWriter::default() };
        let mut main: Vec<_> = blocks.into_iter().map(Piece::InParent).collect();
        main.push(Piece::Data(text(1, 5000)));
        let parents = vec!["parent.hxz".into()];
        let child = ArchiveWriter { main, parents, ..ArchiveWriter::default() };
        let chain = Self {
            folder: tempfile::tempdir().unwrap(),
            parent: parent.write().bytes,
            child: child.write().bytes,
        };
        fs::write(chain.path("parent.hxz"), &chain.parent).unwrap();
        fs::write(chain.path("child.hxz"), &chain.child).unwrap();
        chain
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn lines(&self) -> String {
        line("parent.hxz", &self.parent) + &line("some/where/child.hxz", &self.child)
    }

    fn open(&self, options: &OpenOptions) -> Result<Snapshot, Error> {
        Snapshot::open(&self.path("child.hxz"), options)
    }
}

#[test]
fn each_archive_of_a_chain_has_its_digest() {
    let chain = Chain::new();
    let snapshot = chain.open(&list(&chain.lines())).unwrap();
    assert_eq!(read(&snapshot, StreamKind::Main, 0, 2000).unwrap(), noise(0, 2000));

    let [parent, child] = [line("parent.hxz", &chain.parent), line("child.hxz", &chain.child)];
    let wrong = |name| line(name, b"something else");
    for (lines, name, is_listed) in [
        (wrong("child.hxz") + &parent, "child.hxz", true),
        (wrong("parent.hxz") + &child, "parent.hxz", true),
        (line("Child.hxz", &chain.child) + &parent, "child.hxz", false),
        (parent, "child.hxz", false),
        (child, "parent.hxz", false),
    ] {
        let error = chain.open(&list(&lines)).unwrap_err();
        assert!(error.path.ends_with(name), "{error}");
        match error.kind {
            ErrorKind::DigestMismatch { .. } => assert!(is_listed),
            ErrorKind::NoDigest => assert!(!is_listed),
            other => panic!("{other}"),
        }
    }
}

/// Unlike a signature.
#[test]
fn every_byte_counts() {
    let chain = Chain::new();
    let options = list(&chain.lines());
    for (name, sound) in [("parent.hxz", &chain.parent), ("child.hxz", &chain.child)] {
        for at in (0..sound.len()).step_by(211) {
            let mut damaged = sound.clone();
            damaged[at] ^= 1;
            fs::write(chain.path(name), damaged).unwrap();
            assert!(chain.open(&options).is_err(), "{name}, byte {at}");
        }
        let mut longer = sound.clone();
        longer.push(0);
        fs::write(chain.path(name), longer).unwrap();
        assert!(chain.open(&options).is_err(), "{name} and a byte");
        fs::write(chain.path(name), sound).unwrap();
        assert!(chain.open(&options).is_ok(), "{name} as it was");
    }
}

/// Storage without a time stamp, like a block device, that changes after it was hashed: what is
/// used are the bytes that were hashed, or none.
#[test]
fn bytes_that_change_after_hashing_are_not_used() {
    let writer = ArchiveWriter {
        main: (0..48).map(|seed| Piece::Data(noise(seed, BLOCK))).collect(),
        blocks_per_page: 8,
        dictionary: text(9, 400),
        metadata: Some(b"{}".to_vec()),
        signature: Some([0; 64]),
        ..ArchiveWriter::default()
    };
    let good = writer.write();
    let options = list(&line("x.hxz", &good.bytes));
    let groups = good.bytes.len().div_ceil(GROUP);
    let field = |name: &str| good.field(name).start;
    let altered = |at: usize| {
        let mut bad = good.bytes.clone();
        bad[at] ^= 1;
        bad
    };
    // What is read when an archive is opened: all of it once, to hash it, then these.
    for at in [field("block size"), HEADER_REGION + 7, field("main size"), field("metadata")] {
        let bad = altered(at);
        let later = Watched::new(&good.bytes, &bad, groups).open("x.hxz", options.clone());
        assert_eq!(later.unwrap_err().kind.label(), "changed", "{at}");
        let before = Watched::new(&bad, &bad, groups).open("x.hxz", options.clone());
        assert_eq!(before.unwrap_err().kind.label(), "digest", "{at}");
    }
    // What is read later: a block, and the index page that leads to it.
    let page = &good.main[3];
    for at in [page.blocks[4].stored.start, page.place.start + 20] {
        let bad = altered(at);
        let snapshot = Watched::new(&good.bytes, &bad, groups).open("x.hxz", options.clone());
        let snapshot = snapshot.unwrap();
        let block = |number: u64| read(&snapshot, StreamKind::Main, number * BLOCK as u64, BLOCK);
        assert_eq!(block(3 * 8 + 4).unwrap_err().kind.label(), "changed", "{at}");
        for number in [0, 9, 40, 47] {
            assert!(block(number).unwrap() == noise(number, BLOCK), "block {number}");
        }
    }
}

/// Pages and blocks are read long after they were hashed.
#[test]
fn what_is_written_to_an_open_file_is_not_served() {
    let chain = Chain::new();
    for (name, sound, block) in [("parent.hxz", &chain.parent, 3), ("child.hxz", &chain.child, 20)]
    {
        let pinned = chain.open(&list(&chain.lines())).unwrap();
        let free = chain.open(&OpenOptions::default()).unwrap();
        let at = block * 2000;
        // What is behind the end of the file that was hashed doesn't matter to who has it open.
        append(&chain.path(name), b"more");
        for snapshot in [&pinned, &free] {
            assert!(read(snapshot, StreamKind::Main, at, 10).is_ok());
        }
        assert_eq!(chain.open(&list(&chain.lines())).unwrap_err().kind.label(), "digest");
        fs::write(chain.path(name), sound).unwrap();

        let pinned = chain.open(&list(&chain.lines())).unwrap();
        fs::OpenOptions::new().write(true).open(chain.path(name)).unwrap().set_len(100).unwrap();
        // What was read lately is kept, and is what was hashed.
        assert!(read(&pinned, StreamKind::Main, at, 10).is_ok_and(|bytes| bytes.len() == 10));
        let error = chain.open(&list(&chain.lines())).unwrap_err();
        assert_eq!(error.kind.label(), "digest");
        fs::write(chain.path(name), sound).unwrap();
    }
}

/// Blocks without hashes are the same where they are the same part of the same file: by the
/// digests if there are any, else by the files' stamps.
#[test]
fn what_is_the_same_file_is_unchanged() {
    let written = |seed: u64| {
        let main = (0..4).map(|number| Piece::Data(noise(seed + number, 4096))).collect();
        ArchiveWriter { main, hashed: false, ..ArchiveWriter::default() }.write()
    };
    let (one, other) = (written(1), written(100));
    assert_eq!(one.bytes.len(), other.bytes.len());
    let folder = tempfile::tempdir().unwrap();
    let [path, other_path] = ["one.hxz", "other.hxz"].map(|name| folder.path().join(name));
    one.save(&path);
    other.save(&other_path);
    let from_file = |path: &Path| Snapshot::open(path, &OpenOptions::default()).unwrap();
    // Bytes in memory have no stamp.
    let by_digest = |archive: &Written| {
        let options = list(&line("x.hxz", &archive.bytes));
        Watched::new(&archive.bytes, &[], usize::MAX).open("x.hxz", options).unwrap()
    };
    let unpinned =
        || Watched::new(&one.bytes, &[], usize::MAX).open("x.hxz", OpenOptions::default()).unwrap();
    for (a, b, is_same) in [
        (from_file(&path), from_file(&path), true),
        (from_file(&path), from_file(&other_path), false),
        (by_digest(&one), by_digest(&one), true),
        (by_digest(&one), by_digest(&other), false),
        (unpinned(), unpinned(), false),
        (by_digest(&one), unpinned(), false),
    ] {
        let reference = Arc::new(b).diff_bases().remove(0);
        let runs = a.changed_runs(StreamKind::Main, 0..4 * 4096, 9, &reference).unwrap();
        let runs: Vec<_> = runs.iter().map(|run| (run.length, run.has_property)).collect();
        assert_eq!(runs, [(4 * 4096, !is_same)]);
    }
}

fn append(path: &Path, bytes: &[u8]) {
    fs::OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

/// What was hashed is remembered only as long as the file is the same.
#[test]
fn a_file_that_was_hashed_before() {
    let chain = Chain::new();
    let options = list(&chain.lines());
    assert!(chain.open(&options).is_ok());
    let path = chain.path("child.hxz");
    let times = fs::metadata(&path).unwrap().modified().unwrap();
    let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    // The last bytes are the size of a stream that isn't there.
    file.seek(SeekFrom::End(-1)).unwrap();
    file.write_all(&[1]).unwrap();
    // The same length, and somebody has set the time back.
    file.set_modified(times).unwrap();
    drop(file);
    assert!(matches!(chain.open(&options).unwrap_err().kind, ErrorKind::DigestMismatch { .. }));
    fs::write(&path, &chain.child).unwrap();
    assert!(chain.open(&options).is_ok());
}

/// Returns true if the default export can't be opened.
fn refused(server: &Server) -> bool {
    let replies = server.greeted().option(OPT_INFO, &info_data(b"", &[]));
    replies.last().is_some_and(|reply| reply.kind == REP_ERR_UNKNOWN)
}

fn read_all(client: &mut Client<impl Duplex>) -> Vec<u8> {
    client.read_ok(0, 40_000)
}

#[test]
fn a_server_that_asks_for_digests() {
    let chain = Chain::new();
    let digests = chain.path("digests");
    let printed = run([
        "digest".into(),
        chain.path("child.hxz").into_os_string(),
        chain.path("parent.hxz").into_os_string(),
    ]);
    assert_eq!(printed.code, Some(0));
    fs::write(&digests, &printed.stdout).unwrap();
    let expected: Vec<u8> = (0..20).flat_map(|seed| noise(seed, 2000)).collect();
    let path = chain.path("child.hxz");
    // Without a cache, all that is read comes from the files.
    let server =
        Server::builder().args(["--cache-size", "0", "--digest"]).args([&digests, &path]).start();
    let mut old = server.go("");
    assert!(read_all(&mut old) == expected);

    // Replaced: new clients are refused, those that read go on.
    let new = chain.path("new");
    let other = ArchiveWriter::of_image(&text(7, 9000), 1000).write();
    other.save(&new);
    fs::rename(&new, &path).unwrap();
    assert!(refused(&server));
    let line = server.wait_for_reason("digest");
    assert!(line.message().contains("child.hxz"), "{}", line.text);
    assert!(read_all(&mut old) == expected);

    // The right one again, then written to in place.
    let put_back = || {
        fs::write(&new, &chain.child).unwrap();
        fs::rename(&new, &path).unwrap();
    };
    put_back();
    let mut current = server.go("");
    append(&path, b"more");
    assert!(read_all(&mut current) == expected);
    assert!(refused(&server));
    put_back();
    assert!(read_all(&mut server.go("")) == expected);
}

/// The parent is read whole once, however many children are opened.
#[test]
fn a_parent_is_hashed_once() {
    let folder = tempfile::tempdir().unwrap();
    let blocks: Vec<Vec<u8>> = (0..64).map(|seed| noise(seed, 1 << 16)).collect();
    let main: Vec<_> = blocks.iter().cloned().map(Piece::Data).collect();
    let parent = ArchiveWriter { main: main.clone(), ..ArchiveWriter::default() }.write();
    let size = parent.bytes.len() as u64;
    parent.save(&folder.path().join("parent.hxz"));
    let mut lines = line("parent.hxz", &parent.bytes);
    for number in 0..8 {
        let first = Piece::InParent(image(&main[number..=number]));
        let parents = vec!["parent.hxz".into()];
        let child =
            ArchiveWriter { main: vec![first], parents, ..ArchiveWriter::default() }.write();
        let name = format!("child-{number}.hxz");
        child.save(&folder.path().join(&name));
        lines += &line(&name, &child.bytes);
    }
    let digests = folder.path().join("digests");
    fs::write(&digests, lines).unwrap();
    let server = Server::builder()
        .arg("--digest")
        .arg(&digests)
        .arg("--export-dir")
        .arg(folder.path())
        .start();
    let before = server.file_bytes_read();
    let names = server.greeted().list();
    assert_eq!(names.len(), 9);
    let read = server.file_bytes_read() - before;
    assert!(read < size / 4, "{read} of {size} to list them");
    for name in names {
        drop(server.go(&name));
    }
    let read = server.file_bytes_read() - before;
    assert!((size..2 * size).contains(&read), "{read} of {size}");
}

/// A client's deadline ends its waiting, and not the hashing that it waits for: otherwise an
/// archive that takes longer could never be served, and each client would begin anew.
#[test]
fn hashing_goes_on_when_the_client_has_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big.hxz");
    // Behind a signature anything may follow: here more than a GiB of zeros, which take no
    // room on the disk.
    let image = text(1, 3000);
    let writer = ArchiveWriter { signature: Some([0; 64]), ..ArchiveWriter::of_image(&image, 500) };
    writer.write().save(&path);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1100 << 20).unwrap();
    // By the library itself: the program is nice to others, which can take its time.
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(&path).unwrap()).unwrap();
    let digests = folder.path().join("digests");
    fs::write(&digests, format!("{}  big.hxz\n", hasher.finalize())).unwrap();
    let server = Server::builder()
        .args(["--handshake-timeout", "50ms"])
        .arg("--digest")
        .arg(&digests)
        .arg("--export-dir")
        .arg(folder.path())
        .start();
    wait_until("it is served", || {
        let uri = format!("nbd://127.0.0.1:{}/big.hxz", server.port());
        let asked = std::process::Command::new("nbdinfo").args(["--size", &uri]).output().unwrap();
        asked.stdout == b"3000\n"
    });
    assert_eq!(server.log_text().matches(": hashing 1.1 GiB").count(), 1);
    assert_eq!(server.log_text().matches(": hashed 1.1 GiB").count(), 1);
}

#[test]
fn lists_on_the_command_line() {
    let base = archive("base-zstd.hxz");
    let hex = blake3::hash(&fs::read(&base).unwrap()).to_string();
    let base = base.to_str().unwrap();
    let pin = format!("base-zstd.hxz={hex}");
    Server::builder().args(["--digest", &pin, base]).start().assert_alive();

    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let zeros = "0".repeat(64);
    for (digest, label) in [
        (format!("base-zstd.hxz={zeros}"), "digest"),
        (format!("other.hxz={hex}"), "no_digest"),
        (format!("base-zstd.hxz={}", &hex[1..]), "unreadable_digests"),
        (file("bad", &format!("{hex}  a\n{hex} b\n")), "invalid_digest"),
        (file("empty", "\n"), "invalid_digest"),
        (file("twice", &format!("{hex}  a/x\n{zeros}  b/x\n")), "invalid_digest"),
    ] {
        let (code, stderr) = run_to_failure(["--digest", &digest, base]);
        assert_eq!(code, 3, "{stderr}");
        assert!(stderr.contains(&format!("\"{label}\"")), "{stderr}");
    }
}

/// An archive of some MiB of blocks of [`BLOCK`] bytes that don't compress.
fn long_archive(path: &Path) -> Vec<u8> {
    let main: Vec<_> = (0..64).map(|seed| Piece::Data(noise(seed, BLOCK))).collect();
    let writer = ArchiveWriter { main: main.clone(), ..ArchiveWriter::default() };
    writer.write().save(path);
    image(&main)
}

#[test]
fn a_tree_file_makes_hashing_at_the_start_unnecessary() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.hxz");
    let expected = long_archive(&path);
    let digest = run([OsStr::new("digest"), path.as_os_str()]).stdout;
    let tree = run([OsStr::new("tree"), path.as_os_str()]).stdout;
    assert_eq!(tree, digest);
    let list = folder.path().join("digests");
    fs::write(&list, &tree).unwrap();
    let length = fs::metadata(&path).unwrap().len();
    let tree_file = folder.path().join("long.hxz.tree");
    assert_eq!(fs::metadata(&tree_file).unwrap().len(), 16 + 32 * length.div_ceil(GROUP as u64));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&tree_file), mode(&path));

    let serve = || Server::start([OsStr::new("--digest"), list.as_os_str(), path.as_os_str()]);
    let server = serve();
    assert!(server.file_bytes_read() < length / 2, "{}", server.file_bytes_read());
    assert!(server.go("").read_ok(0, expected.len() as u32) == expected);
    drop(server);

    // A part that changes is an error, and the others are still read.
    let mut file = fs::File::options().write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(length / 2)).unwrap();
    file.write_all(b"changed").unwrap();
    let server = serve();
    let mut client = server.go("");
    let results: Vec<_> =
        (0..64).map(|block| client.read(block * BLOCK as u64, BLOCK as u32)).collect();
    let failed = results.iter().filter(|result| result.is_err()).count();
    assert!((1..=6).contains(&failed), "{failed}");
    for (result, expected) in results.into_iter().zip(expected.chunks(BLOCK)) {
        assert!(result.is_err() || result.is_ok_and(|bytes| bytes == expected));
    }
    drop(server);

    // A tree file that is damaged doesn't help, and the archive isn't the right one any more.
    let mut tree = fs::read(&tree_file).unwrap();
    tree[100] ^= 1;
    fs::write(&tree_file, tree).unwrap();
    let builder = Server::builder().arg("--digest").arg(&list).arg(&path);
    let message = builder.fails_with(3, "digest");
    assert!(message.contains("BLAKE3"), "{message}");
}

#[test]
fn a_tree_file_that_cannot_be_written_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.hxz");
    long_archive(&path);
    fs::create_dir(folder.path().join("long.hxz.tree")).unwrap();
    let failed = run_to_failure([OsStr::new("tree"), path.as_os_str()]);
    assert!(failed.1.contains("can't write") && failed.1.contains("long.hxz.tree"), "{failed:?}");
    let failed = run_to_failure(["tree", "missing.hxz"]);
    assert!(failed.1.contains("missing.hxz"), "{failed:?}");
}
