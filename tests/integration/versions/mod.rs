//! Archives of every published version of Hexz: `tests/archives/versions/kit.json` says what
//! each of them holds.

mod maps;
mod written;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use hexz_reader::summary::ArchiveSummary;
use hexz_reader::{Error, ErrorKind, OpenOptions, Remark, Snapshot, StreamKind};
use serde::Deserialize;
use serde_json::Value;

use crate::archive_writer::PASSWORD;
use crate::clients;
use crate::snapshot::with_password;
use crate::support::server::{Builder, Ended, Server, run};
use crate::support::sha256;

/// What an operator gives to have everything decided.
const DECISIONS: [&str; 3] = ["--resolve-references", "offset", "--zero-uncovered"];

/// An archive, and what its streams hold.
#[derive(Debug, Deserialize)]
struct Entry {
    file: String,
    version: String,
    main_len: u64,
    main: String,
    aux_len: u64,
    aux: String,
    /// Nothing tells for some blocks whether they are referred to by offset or by hash.
    #[serde(default)]
    ambiguous: bool,
    /// No block covers the end of the stated length.
    #[serde(default)]
    uncovered: bool,
    /// File names of its parents, with spaces between them.
    parent: Option<String>,
}

impl Entry {
    fn path(&self) -> PathBuf {
        folder().join(&self.file)
    }

    /// Returns true if all of it can be read without a decision.
    fn is_whole(&self) -> bool {
        !self.ambiguous && !self.uncovered
    }

    /// Streams with something in them: length and SHA-256.
    fn streams(&self) -> impl Iterator<Item = (StreamKind, u64, &str)> {
        [
            (StreamKind::Main, self.main_len, &*self.main),
            (StreamKind::Auxiliary, self.aux_len, &*self.aux),
        ]
        .into_iter()
        .filter(|(_, length, _)| *length > 0)
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/archives/versions")
}

fn kit() -> Vec<Entry> {
    let kit: Vec<Entry> =
        serde_json::from_slice(&std::fs::read(folder().join("kit.json")).unwrap()).unwrap();
    assert_eq!(kit.len(), 98);
    kit
}

/// All that an operator can decide.
fn decided() -> OpenOptions {
    let choices = vec!["offset".parse().unwrap()];
    OpenOptions { reference_choices: choices.into(), zero_uncovered: true, ..with_password() }
}

fn read_whole(snapshot: &Snapshot, stream: StreamKind) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xa5; snapshot.size(stream) as usize];
    snapshot.read_exact_at(stream, &mut bytes, 0).map(|()| bytes)
}

#[test]
fn every_archive_reads_right_when_all_is_decided() {
    for entry in kit() {
        let snapshot = Snapshot::open(&entry.path(), &decided()).unwrap();
        for (stream, length, expected) in entry.streams() {
            let bytes = read_whole(&snapshot, stream).unwrap();
            assert_eq!(bytes.len() as u64, length, "{}", entry.file);
            assert_eq!(sha256(&bytes), expected, "{}: {stream}", entry.file);
        }
    }
}

/// Each block by itself, so that blocks that can be read are compared in archives that have
/// others, too.
#[test]
fn undecided_blocks_are_errors_and_all_others_are_right() {
    for entry in kit() {
        let right = Snapshot::open(&entry.path(), &decided()).unwrap();
        let snapshot = Snapshot::open(&entry.path(), &with_password()).unwrap();
        for (stream, length, _) in entry.streams() {
            let expected = read_whole(&right, stream).unwrap();
            let (mut at, mut failed) = (0, 0);
            while at < length {
                let piece = 512.min(length - at) as usize;
                let mut bytes = vec![0xa5; piece];
                match snapshot.read_exact_at(stream, &mut bytes, at) {
                    Ok(()) => {
                        let expected = &expected[at as usize..][..piece];
                        assert!(bytes == expected, "{} {at}", entry.file);
                    }
                    Err(error) => {
                        failed += 1;
                        assert!(!entry.is_whole(), "{error}");
                        let is_expected = match &error.kind {
                            ErrorKind::Ambiguous(_) => entry.ambiguous,
                            ErrorKind::EndsEarly { .. } => entry.uncovered,
                            _ => false,
                        };
                        assert!(is_expected, "{error}");
                    }
                }
                at += piece as u64;
            }
            assert_eq!(failed == 0, entry.is_whole(), "{}", entry.file);
        }
    }
}

/// A file with the password that is readable by its owner alone.
fn password_file(folder: &Path) -> PathBuf {
    let path = folder.join("password");
    fs::write(&path, PASSWORD).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// Runs `hexz-nbd verify --json`: its exit code, and the objects by archive.
fn verify<'a>(
    args: &[&str],
    entries: impl IntoIterator<Item = &'a Entry>,
) -> (Option<i32>, BTreeMap<String, Vec<Value>>) {
    let folder = tempfile::tempdir().unwrap();
    let mut command: Vec<OsString> =
        ["verify", "--json", "--password-file"].map(OsString::from).into();
    command.push(password_file(folder.path()).into());
    command.extend(args.iter().map(OsString::from));
    command.extend(entries.into_iter().map(|entry| entry.path().into()));
    let Ended { code, stdout, .. } = run(command);
    let mut objects: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in stdout.lines() {
        let object: Value = serde_json::from_str(line).unwrap();
        let archive = Path::new(object["archive"].as_str().unwrap());
        let name = archive.file_name().unwrap().to_str().unwrap().to_owned();
        objects.entry(name).or_default().push(object);
    }
    (code, objects)
}

/// Ranges of the main stream that the faults of an archive name, in order.
fn faulty_ranges(objects: &[Value]) -> Vec<Range<u64>> {
    let faults = objects.iter().filter(|object| object["event"] == "fault");
    let mut ranges: Vec<Range<u64>> = faults
        .inspect(|fault| assert_eq!(fault["stream"], "main"))
        .flat_map(|fault| fault["ranges"].as_array().unwrap())
        .map(|range| {
            let start = range["offset"].as_u64().unwrap();
            start..start + range["length"].as_u64().unwrap()
        })
        .collect();
    ranges.sort_by_key(|range| range.start);
    ranges
}

/// Bytes of the main stream that only a decision makes readable, found out from the images and
/// the indexes alone.
fn undecided_bytes(entry: &Entry) -> Vec<bool> {
    let image = read_whole(&Snapshot::open(&entry.path(), &decided()).unwrap(), StreamKind::Main);
    let image = image.unwrap();
    let mut undecided = vec![false; image.len()];
    if entry.uncovered {
        let facts =
            ArchiveSummary::of_file(&entry.path(), &OpenOptions::default(), |_| ()).unwrap();
        let metadata: Value = serde_json::from_str(&facts.metadata.unwrap().text).unwrap();
        let end = metadata["source"]["total_bytes"].as_u64().unwrap() as usize;
        undecided[end..].fill(true);
    }
    if entry.ambiguous {
        let parent = folder().join(entry.parent.as_ref().unwrap());
        let of_parent = written::blocks(&fs::read(parent).unwrap());
        for block in written::blocks(&fs::read(entry.path()).unwrap()) {
            let covers = |other: &&written::Block| other.range.contains(&block.range.start);
            let covering = of_parent.iter().find(covers);
            let is_candidate = block.offset == u64::MAX
                && block.hash != [0; 32]
                && covering.is_some_and(|covering| {
                    covering.hash == block.hash && covering.range.len() == block.range.len()
                });
            // By offset, the image has the bytes.
            let by_offset = *blake3::hash(&image[block.range.clone()]).as_bytes();
            if is_candidate && by_offset != block.hash {
                undecided[block.range].fill(true);
            }
        }
    }
    undecided
}

#[test]
fn verify_finds_what_is_undecided_and_nothing_else() {
    let kit = kit();
    let (whole, other): (Vec<_>, Vec<_>) = kit.iter().partition(|entry| entry.is_whole());
    let (code, objects) = verify(&[], whole.iter().copied());
    assert_eq!((code, objects.len()), (Some(0), whole.len()));
    for (name, objects) in &objects {
        let [summary] = objects.as_slice() else { panic!("{name}: {objects:?}") };
        assert_eq!((&summary["event"], &summary["is_sound"]), (&"summary".into(), &true.into()));
    }
    for entry in &other {
        let (code, objects) = verify(&[], [*entry]);
        assert_eq!(code, Some(1), "{}", entry.file);
        let mut said = vec![false; entry.main_len as usize];
        for range in faulty_ranges(&objects[&entry.file]) {
            said[range.start as usize..range.end as usize].fill(true);
        }
        let expected = undecided_bytes(entry);
        let count = |bytes: &[bool]| bytes.iter().filter(|&&is_undecided| is_undecided).count();
        assert!(count(&expected) > 0, "{}", entry.file);
        assert!(said == expected, "{}: {} {}", entry.file, count(&said), count(&expected));
        // The library has labels.
        let label = if entry.ambiguous { "ambiguous" } else { "uncovered" };
        let snapshot = Snapshot::open(&entry.path(), &with_password()).unwrap();
        snapshot.verify(std::num::NonZeroUsize::MIN, &Default::default(), |fault| {
            assert_eq!(fault.error.kind.label(), label, "{}", fault.error);
        });
    }
    let (code, objects) = verify(&DECISIONS, &kit);
    assert_eq!((code, objects.len()), (Some(0), kit.len()));
}

fn all() -> Builder {
    Server::builder().arg("--export-dir").arg(folder()).env("HEXZ_PASSWORD", PASSWORD)
}

/// Copies an export with nbdcopy; `None` if that fails.
fn copy(server: &Server, export: &str) -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk.img");
    let uri = format!("nbd://127.0.0.1:{}/{export}", server.port());
    let said = clients::run("nbdcopy", &[&uri, file.to_str().unwrap()]);
    said.output().map(|_| fs::read(&file).unwrap())
}

#[track_caller]
fn assert_copies(server: &Server, entry: &Entry) {
    let main = copy(server, &entry.file).unwrap_or_else(|| panic!("{}", entry.file));
    assert_eq!(main.len() as u64, entry.main_len, "{}", entry.file);
    assert_eq!(sha256(&main), entry.main, "{}", entry.file);
    if entry.aux_len > 0 {
        let auxiliary = copy(server, &format!("{}/aux", entry.file)).unwrap();
        assert_eq!(auxiliary.len() as u64, entry.aux_len, "{}", entry.file);
        assert_eq!(sha256(&auxiliary), entry.aux, "{}", entry.file);
    }
}

#[test]
fn every_archive_of_a_folder_is_copied_whole() {
    let server = all().start();
    for entry in kit() {
        if entry.is_whole() {
            assert_copies(&server, &entry);
        } else {
            assert!(copy(&server, &entry.file).is_none(), "{}", entry.file);
        }
    }
}

#[test]
fn what_was_undecided_is_copied_when_it_is_decided() {
    let server = all().args(DECISIONS).start();
    let kit = kit();
    let undecided: Vec<&Entry> = kit.iter().filter(|entry| !entry.is_whole()).collect();
    assert_eq!(undecided.len(), 6);
    undecided.into_iter().for_each(|entry| assert_copies(&server, entry));
}

/// What `hexz-nbd inspect --json` says, which must find nothing wrong.
fn inspect(path: &Path) -> Value {
    let ended = run(["inspect".into(), "--json".into(), path.as_os_str().to_owned()]);
    assert_eq!(ended.code, Some(0), "{}: {}", path.display(), ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

#[test]
fn inspect_tells_the_layout_and_what_writes_it() {
    let mut writers: BTreeMap<String, String> = BTreeMap::new();
    for entry in kit() {
        let layout = match (entry.file.as_str(), entry.version.as_str()) {
            ("0.8.2-signed-old-lz4.hxz", _) => "X",
            // Not written by "pack": without chunking parameters.
            ("0.8.2-signed-051-lz4.hxz" | "0.8.2-tar.hxz", _) => "C",
            (file, _) if file.ends_with("-empty.hxz") => "empty",
            (_, "0.1.1" | "0.1.4" | "0.4.5") => "A",
            (_, "0.5.0" | "0.5.1") => "B",
            (_, "0.5.2" | "0.5.5" | "0.6.0" | "0.7.0") => "C",
            (_, "0.8.2") => "D",
            other => panic!("{other:?}"),
        };
        let seen = inspect(&entry.path());
        assert_eq!(seen["layout"], layout, "{}", entry.file);
        assert_eq!(seen["manifest"], Value::Null, "{}", entry.file);
        assert_eq!(seen["image"], Value::Null, "{}", entry.file);
        assert_eq!(seen["streams"]["main"]["size"], entry.main_len, "{}", entry.file);
        assert_eq!(seen["streams"]["auxiliary"]["size"], entry.aux_len, "{}", entry.file);
        let says = seen["writers"].as_str().unwrap().to_owned();
        assert_eq!(*writers.entry(layout.to_owned()).or_insert(says.clone()), says);
    }
    let distinct: std::collections::BTreeSet<&String> = writers.values().collect();
    assert_eq!((writers.len(), distinct.len()), (6, 6));
    // Each names the last version that writes it.
    for (layout, version) in [("A", "0.4.5"), ("B", "0.5.1"), ("C", "0.7.0"), ("D", "0.8")] {
        assert!(writers[layout].contains(version), "{layout}: {}", writers[layout]);
    }
}

#[test]
fn inspect_shows_metadata_that_are_no_manifest() {
    for file in ["0.1.1-multi.hxz", "0.4.5-multi.hxz", "0.7.0-thinmeta.hxz", "0.8.2-tar.hxz"] {
        let path = folder().join(file);
        let metadata = inspect(&path)["metadata"].clone();
        let text = metadata["text"].as_str().unwrap();
        assert_eq!(metadata["length"], text.len(), "{file}");
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.windows(text.len()).any(|window| window == text.as_bytes()), "{file}");
        // Nor is it taken for a packed directory.
        assert!(Snapshot::open(&path, &OpenOptions::default()).is_ok(), "{file}");
    }
    let metadata = inspect(&folder().join("0.4.5-multi.hxz"))["metadata"].clone();
    assert!(serde_json::from_str::<Value>(metadata["text"].as_str().unwrap()).is_ok());
}

#[test]
fn inspect_remarks_on_sizes_that_the_blocks_do_not_have() {
    let remarks = |entry: &Entry| {
        let said = inspect(&entry.path())["remarks"].as_array().unwrap().len();
        let facts =
            ArchiveSummary::of_file(&entry.path(), &OpenOptions::default(), |_| ()).unwrap();
        assert_eq!(said, facts.remarks.len());
        facts.remarks
    };
    for entry in kit() {
        match (entry.file.as_str(), remarks(&entry).as_slice()) {
            ("0.8.2-pipe.hxz", [Remark::UnstatedSize { stream: StreamKind::Main, size }]) => {
                assert_eq!(*size, entry.main_len);
            }
            ("0.8.2-tar.hxz", [Remark::EndsEarly { end, size, reads_zeros, .. }]) => {
                assert!(*end < *size && !reads_zeros);
                assert_eq!(*size, entry.main_len);
            }
            ("0.8.2-pipe.hxz" | "0.8.2-tar.hxz", remarks) => panic!("{remarks:?}"),
            (file, remarks) => assert!(remarks.is_empty(), "{file}: {remarks:?}"),
        }
    }
}

/// Signed archives, and who signed them.
const SIGNED: [(&str, &[&str]); 2] = [
    (
        "python.public.key",
        &[
            "0.1.1-signed.hxz",
            "0.4.5-signed2.hxz",
            "0.5.1-signed.hxz",
            "0.5.5-signed.hxz",
            "0.7.0-signed.hxz",
        ],
    ),
    (
        "082.public.key",
        &["0.8.2-signed2.hxz", "0.8.2-signed-old-lz4.hxz", "0.8.2-signed-051-lz4.hxz"],
    ),
];

#[test]
fn signatures_are_valid_by_the_key_that_made_them_and_no_other() {
    for (key, files) in SIGNED {
        for (other, _) in SIGNED {
            for file in files {
                let path = |name: &str| folder().join(name).into_os_string();
                let given = ["verify".into(), "--verify-key".into(), path(other), path(file)];
                let expected = if key == other { 0 } else { 3 };
                assert_eq!(run(given).code, Some(expected), "{file} by {other}");
            }
        }
    }
    // No other archive is signed.
    let signed: Vec<&str> = SIGNED.iter().flat_map(|(_, files)| files.iter().copied()).collect();
    for entry in kit() {
        let facts =
            ArchiveSummary::of_file(&entry.path(), &OpenOptions::default(), |_| ()).unwrap();
        assert_eq!(facts.signature.is_some(), signed.contains(&entry.file.as_str()));
    }
}

/// The signature that was replaced is among the bytes that the later one covers.
#[test]
fn a_replaced_signature_is_covered_by_the_later_one() {
    let key = folder().join("082.public.key").into_os_string();
    let mut bytes = fs::read(folder().join("0.8.2-signed2.hxz")).unwrap();
    let replaced = bytes.len() - 128;
    bytes[replaced] ^= 1;
    let copy = tempfile::tempdir().unwrap();
    let path = copy.path().join("damaged.hxz");
    fs::write(&path, bytes).unwrap();
    let path = path.into_os_string();
    assert_eq!(run(["verify".into(), path.clone()]).code, Some(0));
    assert_eq!(run(["verify".into(), "--verify-key".into(), key, path]).code, Some(3));
}
