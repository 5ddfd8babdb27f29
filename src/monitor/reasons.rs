//! Describes labels of reasons in words, for people.

use std::collections::BTreeMap;

use serde::Serialize;

/// Labels, each with the words for it.
type Words = &'static [(&'static str, &'static str)];

/// Reasons for which a connection was refused ([`REFUSALS`](nbd_gateway::REFUSALS)).
pub(super) const REFUSED_CONNECTIONS: Words = &[
    ("address", "no rule admits the address"),
    ("not_local", "another machine, without TLS"),
    ("connection_rate", "a client connects too often"),
    ("handshakes", "too many clients negotiate"),
    ("handshakes_per_address", "too many clients of an address negotiate"),
    ("handshakes_per_network", "too many clients of a network negotiate"),
    ("connections", "too many clients"),
    ("proxy_header", "no valid PROXY header"),
    ("proxy_address", "no client in the PROXY header"),
];

/// Reasons for which an admitted connection failed ([`FAILURES`](nbd_gateway::FAILURES)).
pub(super) const FAILED_CONNECTIONS: Words = &[
    ("session", "interrupted, or a violation of the protocol"),
    ("tls_handshake", "TLS handshake"),
    ("credentials", "certificate can't be parsed"),
    ("not_allowed", "no rule admits the client"),
    ("dismissed", "no longer allowed"),
    ("deadline", "took too long to select an export"),
    ("connections", "too many clients"),
    ("connections_per_address", "too many clients of an address"),
    ("connections_per_identity", "too many clients with an identity"),
    ("tls_key_limit", "keys of TLS 1.2 have reached their limit"),
    ("panicked", "internal error"),
];

/// Causes of failed TLS handshakes
/// ([`HandshakeFailureCause`](nbd_gateway::tls::HandshakeFailureCause)).
pub(super) const TLS_HANDSHAKES: Words = &[
    ("no_certificate", "client sent no certificate"),
    ("unknown_ca", "client's certificate is of an unknown CA"),
    ("expired", "client's certificate has expired"),
    ("not_yet_valid", "client's certificate isn't valid yet"),
    ("revoked", "client's certificate is revoked"),
    ("unknown_revocation", "no current revocation list"),
    ("wrong_purpose", "certificate isn't for clients"),
    ("bad_certificate", "client's certificate is invalid"),
    ("old_version", "client's TLS version is too old"),
    ("nothing_in_common", "no cipher suite in common"),
    ("not_tls", "client doesn't speak TLS"),
    ("distrust", "client rejects the server's certificate"),
    ("left_before", "client left before it"),
    ("left_after", "client left after the server's certificate"),
    ("deadline", "took too long"),
    ("other", "other cause"),
];

/// Reasons for which an archive can't be opened, or a block can't be read
/// ([`READ_FAILURE_LABELS`](hexz_exports::READ_FAILURE_LABELS)).
pub(super) const ARCHIVES: Words = &[
    ("crc", "wrong checksum"),
    ("tag", "wrong authentication tag"),
    ("decompress", "compressed data is damaged"),
    ("length", "block has the wrong length"),
    ("hash", "wrong hash"),
    ("unresolvable", "no parent has the block"),
    ("uncovered", "no block covers the range"),
    ("ambiguous", "reference to a parent is ambiguous"),
    ("io", "file can't be read"),
    ("truncated", "file is incomplete"),
    ("changed", "content has changed"),
    ("invalid", "damaged or malformed"),
    ("too_large", "exceeds a limit"),
    ("too_many_blocks", "too many blocks in a request"),
    ("panicked", "internal error"),
    ("store_not_found", "not found in the store"),
    ("store_denied", "store denies access"),
    ("store_timed_out", "store doesn't respond in time"),
    ("store_down", "store is down"),
    ("store_throttled", "store throttles requests"),
    ("store_changed", "replaced in the store while in use"),
    ("store_credentials", "credentials for the store have expired"),
    ("store_clock_skew", "this machine's clock is wrong"),
    ("store_unsupported", "store lacks a feature"),
    ("shutting_down", "server was shutting down"),
    ("not_hexz", "not a Hexz archive"),
    ("unknown_version", "unknown format version"),
    ("password_needed", "encrypted, and no password is given"),
    ("wrong_password", "wrong password"),
    ("directory_archive", "packed folder, not a disk"),
    ("parent_missing", "parent is missing"),
    ("parent_cycle", "parents form a cycle"),
    ("chain_too_deep", "too many parents"),
    ("not_signed", "not signed"),
    ("signature", "signature isn't valid"),
    ("no_digest", "no digest is given for it"),
    ("digest", "digest differs"),
];

/// Reasons for which files of the export folder aren't served.
pub(super) const UNSERVED_FILES: Words = &[
    ("wrong_extension", "extension isn't in lower case"),
    ("symbolic_link", "symbolic link"),
    ("not_a_file", "not a regular file"),
    ("not_utf8", "name isn't UTF-8"),
];

/// Reasons for which the export folder can't be read.
pub(super) const FOLDERS: Words = &[
    ("folder_missing", "it doesn't exist"),
    ("folder_mounted_since_start", "a file system was mounted on it after the start"),
    ("folder_replaced_since_start", "it was replaced after the start"),
    ("folder_outside_sandbox", "the sandbox doesn't permit it"),
    ("folder_store", "its store doesn't list it"),
    ("folder_unreadable", "it can't be read"),
];

/// Returns the words for a label; the label itself if there are none.
pub(super) fn describe(words: Words, label: &str) -> &str {
    words.iter().find(|(it, _)| *it == label).map_or(label, |(_, words)| words)
}

/// Words by kind of reason and label, for the status page.
#[derive(Debug, Serialize)]
pub(super) struct AllWords {
    refused: BTreeMap<&'static str, &'static str>,
    failed: BTreeMap<&'static str, &'static str>,
    tls: BTreeMap<&'static str, &'static str>,
    archive: BTreeMap<&'static str, &'static str>,
    file: BTreeMap<&'static str, &'static str>,
    folder: BTreeMap<&'static str, &'static str>,
}

impl AllWords {
    pub(super) fn new() -> Self {
        let map = |words: Words| words.iter().copied().collect();
        Self {
            refused: map(REFUSED_CONNECTIONS),
            failed: map(FAILED_CONNECTIONS),
            tls: map(TLS_HANDSHAKES),
            archive: map(ARCHIVES),
            file: map(UNSERVED_FILES),
            folder: map(FOLDERS),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::monitor::metrics::documented_reasons;

    #[test]
    fn each_documented_reason_has_words() {
        let labels = |words: Words| -> BTreeSet<&str> { words.iter().map(|(it, _)| *it).collect() };
        let documented = documented_reasons;
        assert_eq!(labels(REFUSED_CONNECTIONS), documented("refused connections"));
        assert_eq!(labels(FAILED_CONNECTIONS), documented("failed connections"));
        assert_eq!(labels(TLS_HANDSHAKES), documented("TLS handshakes"));
        let archives = &documented("failed requests") | &documented("archives that couldn't");
        assert_eq!(labels(ARCHIVES), archives);
    }

    /// The page of troubleshooting explains these labels.
    #[test]
    fn each_reason_of_files_and_folders_is_documented() {
        let page = include_str!("../../docs/troubleshooting.md");
        for (label, _) in UNSERVED_FILES.iter().chain(FOLDERS) {
            assert!(page.contains(&format!("`{label}`")), "{label}");
        }
    }

    #[test]
    fn unknown_labels_stand_for_themselves() {
        assert_eq!(describe(ARCHIVES, "not_hexz"), "not a Hexz archive");
        assert_eq!(describe(ARCHIVES, "new_label"), "new_label");
    }
}
