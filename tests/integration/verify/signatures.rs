//! Archives that are opened only if somebody known has signed them.

use std::fs;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use hexz_reader::{Error, ErrorKind, OpenOptions, Snapshot, StreamKind, VerifyKey};

use super::Watched;
use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, Written, text};
use crate::snapshot::read;
use crate::support::server::{Server, run_to_failure};
use crate::support::{archive, image};

fn new_key() -> Ed25519KeyPair {
    Ed25519KeyPair::generate().unwrap()
}

fn public(key: &Ed25519KeyPair) -> VerifyKey {
    VerifyKey::from_file_content(key.public_key().as_ref()).unwrap()
}

fn by(keys: &[&Ed25519KeyPair]) -> OpenOptions {
    let verify_keys = keys.iter().map(|key| public(key)).collect();
    OpenOptions { verify_keys, ..OpenOptions::default() }
}

fn signable() -> ArchiveWriter {
    let main = (0..9).map(|seed| Piece::Data(text(seed, 200))).collect();
    ArchiveWriter { main, signature: Some([0; 64]), blocks_per_page: 4, ..ArchiveWriter::default() }
}

fn signed(writer: &ArchiveWriter, key: &Ed25519KeyPair) -> Written {
    let mut written = writer.write();
    written.sign(key);
    written
}

fn open(written: &Written, options: OpenOptions) -> Result<Snapshot, Error> {
    Watched::new(&written.bytes, &[], usize::MAX).open("x.hxz", options)
}

#[track_caller]
fn kind(written: &Written, options: OpenOptions) -> ErrorKind {
    open(written, options).expect_err("it was opened").kind
}

#[test]
fn by_one_of_the_keys() {
    let [key, other] = [new_key(), new_key()];
    let variants = [
        signable(),
        ArchiveWriter { metadata: Some(vec![b' '; 600_000]), ..signable() },
        ArchiveWriter { dictionary: text(1, 300), auxiliary: signable().main, ..signable() },
        ArchiveWriter { password: Some(PASSWORD), ..signable() },
    ];
    for writer in variants {
        let written = signed(&writer, &key);
        for keys in [&[&key][..], &[&key, &other], &[&other, &key]] {
            let snapshot = open(&written, by(keys)).unwrap();
            assert_eq!(read(&snapshot, StreamKind::Main, 200, 200).unwrap(), text(1, 200));
        }
        assert!(matches!(kind(&written, by(&[&other])), ErrorKind::InvalidSignature));
    }
}

#[test]
fn what_the_hexz_tools_have_signed() {
    let key = VerifyKey::from_file_content(&fs::read(archive("signed.public.key")).unwrap());
    let options = |key| OpenOptions { verify_keys: [key].into(), ..OpenOptions::default() };
    Snapshot::open(&archive("signed-zstd.hxz"), &options(key.unwrap())).unwrap();
    let error =
        Snapshot::open(&archive("signed-zstd.hxz"), &options(public(&new_key()))).unwrap_err();
    assert!(error.to_string().contains("signed-zstd.hxz"), "{error}");
    assert_eq!(error.label(), "signature");
}

#[test]
fn every_bit_that_is_signed_counts() {
    let key = new_key();
    let metadata = Some(br#"{"files":[]}"#.to_vec());
    let written = signed(&ArchiveWriter { metadata, ..signable() }, &key);
    let signature = written.field("signature");
    for at in written.signed().chain(signature) {
        for bit in [0, 7] {
            let mut changed = written.clone();
            changed.bytes[at] ^= 1 << bit;
            assert!(matches!(kind(&changed, by(&[&key])), ErrorKind::InvalidSignature), "{at}");
        }
    }
}

#[test]
fn no_signature_or_one_of_something_else() {
    let key = new_key();
    let unsigned = ArchiveWriter { signature: None, ..signable() }.write();
    let error = open(&unsigned, by(&[&key])).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NotSigned));
    assert!(error.to_string().starts_with("x.hxz: "), "{error}");

    let other = ArchiveWriter { main: vec![Piece::Zeros(7)], ..signable() };
    let other = signed(&other, &key);
    let mut written = signable().write();
    written.set("signature", &other.bytes[other.field("signature")]);
    assert!(matches!(kind(&written, by(&[&key])), ErrorKind::InvalidSignature));

    for length in [0, 32, 63, 65_u32] {
        let mut written = signed(&signable(), &key);
        // So that a longer one is inside the file.
        written.bytes.push(0);
        written.set("signature length", &length.to_le_bytes());
        assert!(matches!(kind(&written, by(&[&key])), ErrorKind::Invalid(_)), "{length}");
    }
}

/// The header isn't signed. Whatever it says, the index that is used was.
#[test]
fn a_header_that_leads_elsewhere() {
    let key = new_key();
    let written = signed(&signable(), &key);
    let forged = ArchiveWriter { main: vec![Piece::Zeros(1)], ..signable() }.write();
    // Another index in front of the signed one, or behind its signature.
    let mut behind = written.clone();
    let offset = (behind.bytes.len() as u64).to_le_bytes();
    behind.bytes.extend(&forged.bytes[forged.signed()]);
    behind.set("index offset", &offset);
    assert!(open(&behind, by(&[&key])).is_err());
    for shift in [-1, 1, 28] {
        let mut shifted = written.clone();
        let offset = (shifted.index_offset() as i64 + shift) as u64;
        shifted.set("index offset", &offset.to_le_bytes());
        assert!(matches!(kind(&shifted, by(&[&key])), ErrorKind::InvalidSignature), "{shift}");
    }
}

/// What was verified is what is used: no byte of it is read twice.
#[test]
fn what_is_signed_is_read_once() {
    let key = new_key();
    let metadata = Some(vec![b' '; 300_000]);
    let written = signed(&ArchiveWriter { metadata, ..signable() }, &key);
    let watched = Watched::new(&written.bytes, &[], usize::MAX);
    watched.open("x.hxz", by(&[&key])).unwrap();
    let end = written.field("signature").end;
    assert_eq!(watched.most_reads(written.index_offset()..written.index_offset() + 200), 1);
    assert_eq!(watched.most_reads(end - 64..end), 1);
}

fn folder_of_chain(
    child_key: &Ed25519KeyPair,
    parent_key: Option<&Ed25519KeyPair>,
) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let parent = match parent_key {
        Some(key) => signed(&signable(), key),
        None => ArchiveWriter { signature: None, ..signable() }.write(),
    };
    parent.save(&folder.path().join("parent.hxz"));
    let main = (0..9).map(|seed| Piece::InParent(text(seed, 200))).collect();
    let child = ArchiveWriter { main, parents: vec!["parent.hxz".into()], ..signable() };
    signed(&child, child_key).save(&folder.path().join("child.hxz"));
    folder
}

#[test]
fn the_whole_chain_is_signed() {
    let [key, other] = [new_key(), new_key()];
    let open = |folder: &tempfile::TempDir, options| {
        Snapshot::open(&folder.path().join("child.hxz"), &options)
    };
    let same = folder_of_chain(&key, Some(&key));
    assert!(open(&same, by(&[&key])).is_ok());
    let two = folder_of_chain(&key, Some(&other));
    assert!(open(&two, by(&[&key, &other])).is_ok());
    let names_parent = |error: Error| error.path.ends_with("parent.hxz");
    let error = open(&two, by(&[&key])).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::InvalidSignature) && names_parent(error));
    let unsigned = folder_of_chain(&key, None);
    let error = open(&unsigned, by(&[&key])).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::NotSigned) && names_parent(error));
    assert!(open(&unsigned, by(&[])).is_ok());
}

#[test]
fn a_server_that_asks_for_signatures() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["signed-zstd.hxz", "base-zstd.hxz"] {
        fs::copy(archive(name), folder.path().join(name)).unwrap();
    }
    let server = Server::builder()
        .arg("--verify-key")
        .arg(archive("signed.public.key"))
        .arg("--export-dir")
        .arg(folder.path())
        .start();
    assert_eq!(server.go("signed-zstd.hxz").read_ok(0, 4096), image()[..4096]);
    assert_eq!(server.greeted().list(), ["signed-zstd.hxz"]);
    let line = server.wait_for_reason("not_signed");
    assert!(line.message().contains("base-zstd.hxz"), "{}", line.text);

    // Replaced by one that isn't signed: whoever reads goes on, nobody else comes in.
    let mut old = server.go("signed-zstd.hxz");
    fs::copy(archive("base-zstd.hxz"), folder.path().join("new")).unwrap();
    fs::rename(folder.path().join("new"), folder.path().join("signed-zstd.hxz")).unwrap();
    assert!(server.greeted().list().is_empty());
    assert_eq!(old.read_ok(4096, 4096), image()[4096..8192]);
}

#[test]
fn keys_on_the_command_line() {
    let archive = |name: &str| archive(name).into_os_string().into_string().unwrap();
    let hex = "3ebfc4fd8c2484be73524c218d5260fc92dcb080dee526a6be43df65755391da";
    let [signed, plain] = [archive("signed-zstd.hxz"), archive("base-zstd.hxz")];
    let other = public(&new_key()).to_string();
    Server::builder()
        .args(["--verify-key", &other, "--verify-key", hex, &signed])
        .start()
        .assert_alive();
    for (key, archive, words) in [
        (hex, &plain, "not_signed"),
        (&other, &signed, "signature"),
        (&hex[1..], &signed, "unreadable_key"),
        (&signed, &signed, "unreadable_key"),
        ("/dev/null", &signed, "invalid_key"),
    ] {
        let (code, stderr) = run_to_failure(["--verify-key", key, archive]);
        assert_eq!(code, 3, "{stderr}");
        assert!(stderr.contains(words), "{stderr}");
    }
}
