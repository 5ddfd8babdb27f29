//! A process that has a served file mapped, and writes through the mapping: no time stamp shows it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::archive_writer::{ArchiveWriter, Piece, Written, noise};
use crate::monitor::metrics;
use crate::support::client::{Client, Duplex, EIO};
use crate::support::server::Server;
use crate::support::wait_until;

const BLOCK: usize = 64 * 1024;
/// So many that their groups don't all fit into what is kept of them.
const BLOCKS: u64 = 256;
/// The block that the writer forges.
const FORGED: u64 = 20;
const GROUP: usize = hexz_reader::storage::GROUP_LEN as usize;

/// Maps the file, shared, makes all its pages dirty, and then copies ranges of another file into
/// it, one for each line of its input.
const SCRIPT: &str = r#"
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
other = open(sys.argv[2], "rb").read()
for at in range(0, len(mapped), mmap.PAGESIZE):
    mapped[at] = mapped[at]
print("mapped", flush=True)
for line in sys.stdin:
    start, end = map(int, line.split())
    mapped[start:end] = other[start:end]
    print("written", flush=True)
"#;

/// A process that has a file mapped. It is killed when this is dropped.
struct MappedWriter {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl MappedWriter {
    fn start(file: &Path, other: &Path) -> Self {
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", SCRIPT])
            .args([file, other])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut writer = Self { child, input, output };
        writer.expect("mapped");
        writer
    }

    /// Replaces a range of the file by that of the other one.
    fn write(&mut self, range: &Range<usize>) {
        writeln!(self.input, "{} {}", range.start, range.end).unwrap();
        self.expect("written");
    }

    fn expect(&mut self, expected: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), expected);
    }
}

impl Drop for MappedWriter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An archive of noise of which the blocks that `is_forged` accepts have other bytes.
fn written(is_forged: impl Fn(u64) -> bool) -> Written {
    let seed = |number| if is_forged(number) { 1000 + number } else { number };
    let main = (0..BLOCKS).map(|number| Piece::Data(noise(seed(number), BLOCK))).collect();
    ArchiveWriter { main, blocks_per_page: 8, ..ArchiveWriter::default() }.write()
}

/// Where two files of one length differ, as one range for each group in which they do.
fn differences(a: &[u8], b: &[u8]) -> Vec<Range<usize>> {
    let groups = (0..).zip(a.chunks(GROUP).zip(b.chunks(GROUP)));
    groups
        .filter_map(|(number, (a, b))| {
            let differs = |at: &usize| a[*at] != b[*at];
            let first = (0..a.len()).find(differs)?;
            let last = (0..a.len()).rfind(differs)?;
            Some(number * GROUP + first..number * GROUP + last + 1)
        })
        .collect()
}

fn groups_of(range: &Range<usize>) -> Range<usize> {
    range.start / GROUP..range.end.div_ceil(GROUP)
}

/// The blocks that need a group that is in `changed`: for themselves or for their index page.
fn blocks_within(archive: &Written, changed: &BTreeSet<usize>) -> BTreeSet<u64> {
    let needs = |range: &Range<usize>| groups_of(range).any(|group| changed.contains(&group));
    let blocks = archive
        .main
        .iter()
        .flat_map(|page| page.blocks.iter().map(|block| (&page.place, &block.stored)));
    (0..)
        .zip(blocks)
        .filter(|(_, (page, stored))| needs(page) || needs(stored))
        .map(|(number, _)| number)
        .collect()
}

/// Reads all blocks; the numbers of those that can't be read. All others have the bytes that the
/// digest is of.
#[track_caller]
fn unreadable(client: &mut Client<impl Duplex>) -> BTreeSet<u64> {
    let is_unreadable = |number: &u64| match client.read(number * BLOCK as u64, BLOCK as u32) {
        Ok(bytes) => {
            assert!(bytes == noise(*number, BLOCK), "block {number} has other bytes");
            false
        }
        Err(error) => {
            assert_eq!(error, EIO);
            true
        }
    };
    (0..BLOCKS).filter(is_unreadable).collect()
}

/// Time stamps as the server sees them.
fn times(path: &Path) -> [i64; 4] {
    let file = fs::metadata(path).unwrap();
    [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()]
}

fn changed_reads(server: &Server) -> f64 {
    metrics(server)["hexz_nbd_verification_failures_total{reason=\"changed\"}"]
}

#[test]
fn a_mapped_writer_gets_errors_and_never_unverified_bytes() {
    let archive = written(|_| false);
    let forged = written(|number| number == FORGED);
    let other = written(|_| true);
    assert_eq!(archive.bytes.len(), forged.bytes.len());
    assert_eq!(archive.bytes.len(), other.bytes.len());

    // In a tmpfs a write through a mapping never sets the time of modification. Elsewhere it does
    // when the page is dirtied for the first time since it was written back.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (served, replacement) = (path("served.hxz"), path("replacement.hxz"));
    archive.save(&served);
    // The forged block with its own index entry, so that its CRC-32 and its hash fit; then all.
    forged.save(&replacement);
    let mut writer = MappedWriter::start(&served, &replacement);
    let pin = format!("served.hxz={}", blake3::hash(&archive.bytes));
    let stamp = times(&served);
    let server = Server::builder()
        // So that nearly each read gets to the file.
        .args(["--cache-size", "64KiB", "--monitor", "0", "--digest", &pin])
        .arg(&served)
        .start();
    let mut client = server.go("");

    let ranges = differences(&archive.bytes, &forged.bytes);
    ranges.iter().for_each(|range| writer.write(range));
    assert!(fs::read(&served).unwrap() == forged.bytes);
    assert_eq!(times(&served), stamp);
    let changed = ranges.iter().flat_map(groups_of).collect();
    let expected = blocks_within(&archive, &changed);
    assert!(expected.contains(&FORGED) && expected.len() < 24, "{expected:?}");
    assert_eq!(unreadable(&mut client), expected);
    assert!(changed_reads(&server) >= expected.len() as f64);

    // The file looks as it did when it was hashed, so it isn't hashed again.
    server.signal("HUP");
    wait_until("it has been reloaded", || {
        server.log().iter().any(|line| line.message().starts_with("reloaded"))
    });
    let before = changed_reads(&server);
    let mut client_after = server.go("");
    assert_eq!(unreadable(&mut client_after), expected);
    assert_eq!(unreadable(&mut client), expected);
    assert!(changed_reads(&server) >= before + 2.0 * expected.len() as f64);

    // The sound block comes back with its bytes.
    archive.save(&replacement);
    let mut restorer = MappedWriter::start(&served, &replacement);
    ranges.iter().for_each(|range| restorer.write(range));
    assert!(fs::read(&served).unwrap() == archive.bytes);
    assert_eq!(times(&served), stamp);
    assert_eq!(unreadable(&mut client), BTreeSet::new());

    // Another archive, sound in itself.
    other.save(&replacement);
    let mut replacer = MappedWriter::start(&served, &replacement);
    replacer.write(&(0..other.bytes.len()));
    assert!(fs::read(&served).unwrap() == other.bytes);
    assert_eq!(times(&served), stamp);
    // Only what is in memory still is what it was.
    for client in [&mut client, &mut client_after] {
        assert!(unreadable(client).len() > 64);
    }
}
