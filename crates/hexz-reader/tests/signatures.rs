//! Signatures: required to open an archive, and reported by a summary.

use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use hexz_reader::summary::{ArchiveSummary, MAX_METADATA, SignatureStatus};
use hexz_reader::{OpenOptions, Snapshot, VerifyKey};

use crate::archive_writer::{ArchiveWriter, Written, text};

fn new_key() -> Ed25519KeyPair {
    Ed25519KeyPair::generate().unwrap()
}

fn requires(key: &Ed25519KeyPair) -> OpenOptions {
    let key = VerifyKey::from_file_content(key.public_key().as_ref()).unwrap();
    OpenOptions { verify_keys: [key].into(), ..OpenOptions::default() }
}

fn signed(writer: &ArchiveWriter, key: &Ed25519KeyPair) -> Written {
    let mut archive = ArchiveWriter { signature: Some([0; 64]), ..writer.clone() }.write();
    archive.sign(key);
    archive
}

fn storage(archive: &Written) -> Arc<Arc<[u8]>> {
    Arc::new(Arc::from(archive.bytes.as_slice()))
}

#[test]
fn summary_reports_whether_a_signature_is_valid() {
    let [key, other] = [new_key(), new_key()];
    let writer = ArchiveWriter::of_image(&text(1, 3000), 1000);
    let signed = signed(&writer, &key);
    for (archive, options, status, faults) in [
        (&signed, requires(&key), Some(SignatureStatus::Valid), &[][..]),
        (&signed, requires(&other), Some(SignatureStatus::Invalid), &["signature"]),
        (&signed, OpenOptions::default(), Some(SignatureStatus::NotVerified), &[]),
        (&writer.write(), requires(&key), None, &["not_signed"]),
    ] {
        let path = Path::new("alone.hxz");
        let summary = ArchiveSummary::of_storage(path, storage(archive), &options, |_| ()).unwrap();
        let found: Vec<_> = summary.faults.iter().map(|fault| fault.kind.label()).collect();
        assert_eq!((summary.signature, found.as_slice()), (status, faults));
    }
}

/// The metadata is streamed, or read at once if it is signed.
#[test]
fn metadata_that_is_too_long_is_taken_for_a_manifest() {
    let key = new_key();
    for (length, error) in
        [(10, None), (MAX_METADATA, None), (MAX_METADATA + 1, Some("directory_archive"))]
    {
        let metadata = Some(vec![b' '; length as usize]);
        let writer = ArchiveWriter { metadata, ..ArchiveWriter::of_image(&text(1, 3000), 1000) };
        for (archive, options) in
            [(writer.write(), OpenOptions::default()), (signed(&writer, &key), requires(&key))]
        {
            let path = Path::new("alone.hxz");
            let opened = Snapshot::from_storage(path, storage(&archive), &options);
            assert_eq!(opened.err().map(|error| error.kind.label()), error, "{length}");
        }
    }
}
