//! BLAKE3 digests of files, and lists of them in the format of `b3sum`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nbd_telemetry::Hex;

use super::error::printable;
use crate::storage::{self, GroupHashes as _, HashTree, Storage, TreeBudget, TreeError};

/// BLAKE3-256 hash of a whole file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub(super) [u8; 32]);

impl Digest {
    /// Hashes all of `storage` on all cores, in bounded memory.
    ///
    /// # Errors
    /// The storage can't be read.
    pub fn of(storage: &dyn Storage) -> io::Result<Self> {
        storage::blake3(storage).map(Self)
    }
}

/// Digest of a file with the hashes of all its parts: the content of a tree file.
#[derive(Debug)]
pub struct DigestTree(HashTree);

impl DigestTree {
    /// Hashes all of `storage` on all cores. Memory is 32 bytes for each 256 KiB.
    ///
    /// # Errors
    /// The storage can't be read.
    pub fn of(storage: &dyn Storage) -> io::Result<Self> {
        match HashTree::of(storage, &TreeBudget::new(u64::MAX)) {
            Ok(tree) => Ok(Self(tree)),
            Err(TreeError::Io(error)) => Err(error),
            Err(error @ TreeError::Memory { .. }) => Err(io::Error::other(error)),
        }
    }

    /// Reads the tree of a file of `length` bytes from a tree file. Returns `None` if `tree_file` has
    /// no tree for that length. The tree is as trustworthy as the tree file, until its digest has been
    /// compared.
    ///
    /// # Errors
    /// The tree file can't be read.
    pub fn read(tree_file: &dyn Storage, length: u64) -> io::Result<Option<Self>> {
        match HashTree::from_file(tree_file, length, &TreeBudget::new(u64::MAX)) {
            Ok(tree) => Ok(tree.map(Self)),
            Err(TreeError::Io(error)) => Err(error),
            Err(error @ TreeError::Memory { .. }) => Err(io::Error::other(error)),
        }
    }

    /// Returns true if `bytes` are those of the group with this number: 256 KiB of the file, or less
    /// at its end.
    pub fn matches(&self, group: u64, bytes: &[u8]) -> bool {
        self.0.matches(group, bytes)
    }

    /// Returns the digest of the file.
    pub fn digest(&self) -> Digest {
        Digest(self.0.root())
    }

    /// Writes a tree file, which is found beside an archive under the name that
    /// [`tree_path`](crate::tree_path) returns.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut dyn io::Write) -> io::Result<()> {
        self.0.write_file(out)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Error in a list of digests.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestsError {
    /// The line with this number isn't in the format of b3sum.
    #[error(
        "line {0}: expected 64 hexadecimal digits, two spaces and a path, as b3sum writes them"
    )]
    Line(usize),
    /// The text isn't `NAME=BLAKE3`.
    #[error("expected NAME=BLAKE3, with a file name and 64 hexadecimal digits")]
    Entry,
    /// Two different digests are given for one file name.
    #[error(
        "two digests for {}: archives are identified by file name, without directories; rename one",
        printable(Path::new(.0))
    )]
    Duplicate(OsString),
    /// The list is empty.
    #[error("the list has no digests")]
    Empty,
}

impl DigestsError {
    /// Returns a stable label for logs and programs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Line(_) => "digest_line",
            Self::Entry => "digest_entry",
            Self::Duplicate(_) => "duplicate_digest",
            Self::Empty => "no_digests",
        }
    }
}

/// Formats a line of a list, without a line break.
pub fn format_line(digest: Digest, path: &Path) -> Vec<u8> {
    let path = path.as_os_str().as_bytes();
    let escaped = path.iter().flat_map(|byte| match byte {
        b'\\' => br"\\",
        b'\n' => br"\n",
        b'\r' => br"\r",
        byte => std::slice::from_ref(byte),
    });
    let escaped: Vec<u8> = escaped.copied().collect();
    let mark = if escaped.len() > path.len() { "\\" } else { "" };
    [format!("{mark}{digest}  ").as_bytes(), &escaped].concat()
}

/// Parses the digest and the file name of a line. A leading backslash means that line breaks and
/// backslashes in the path are escaped.
pub(super) fn parse_line(line: &[u8]) -> Option<(Digest, OsString)> {
    let (line, is_escaped) = match line.strip_prefix(b"\\") {
        Some(line) => (line, true),
        None => (line, false),
    };
    let (digest, path) = line.split_at_checked(64)?;
    let digest = parse_digest(digest)?;
    // An asterisk marks binary mode in the formats of related tools.
    let path = path.strip_prefix(b"  ").or_else(|| path.strip_prefix(b" *"))?;
    let path = if is_escaped { unescape(path)? } else { path.to_vec() };
    let name = Path::new(&OsString::from_vec(path)).file_name()?.to_owned();
    Some((digest, name))
}

fn unescape(path: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::with_capacity(path.len());
    let mut bytes = path.iter();
    while let Some(&byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next()? {
                b'n' => b'\n',
                b'r' => b'\r',
                b'\\' => b'\\',
                _ => return None,
            },
            byte => byte,
        });
    }
    Some(plain)
}

pub(super) fn parse_entry(entry: &OsStr) -> Option<(&OsStr, Digest)> {
    let (rest, digest) = entry.as_bytes().split_last_chunk::<64>()?;
    let name = OsStr::from_bytes(rest.strip_suffix(b"=")?);
    // A plain file name, without directories.
    let is_name = Path::new(name).file_name() == Some(name);
    is_name.then_some((name, parse_digest(digest)?))
}

fn parse_digest(hex: &[u8]) -> Option<Digest> {
    blake3::Hash::from_hex(hex).ok().map(|hash| Digest(*hash.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digests;
    use std::sync::Arc;

    const HEX: &str = "3ebfc4fd8c2484be73524c218d5260fc92dcb080dee526a6be43df65755391da";

    fn digests(list: &str) -> Result<Digests, DigestsError> {
        let mut digests = Digests::default();
        digests.add_list(list.as_bytes()).map(|()| digests)
    }

    fn has_digest_for(digests: &Digests, path: &str) -> bool {
        digests.require(&Arc::from(Path::new(path))).is_ok()
    }

    #[test]
    fn digests_are_matched_by_file_name() {
        let list = format!("{HEX}  a/b.hxz\r\n\n{}  with  two.hxz\n{HEX} *c", HEX.to_uppercase());
        let digests = digests(&list).unwrap();
        for path in ["b.hxz", "/x/b.hxz", "with  two.hxz", "c"] {
            assert!(has_digest_for(&digests, path), "{path}");
        }
        for path in ["a", "B.hxz", "b.hxz.old", "two.hxz", "b.hxz/..", ""] {
            assert!(!has_digest_for(&digests, path), "{path}");
        }
    }

    #[test]
    fn malformed_lists_are_rejected() {
        for (list, number) in [
            (HEX.to_owned(), 1),
            (format!("{HEX}  a\n{HEX} b"), 2),
            (format!("{HEX}  "), 1),
            (format!("{HEX}  .."), 1),
            (format!("  {HEX}  a"), 1),
            (format!("{}  a", &HEX[1..]), 1),
            (format!("BLAKE3 (a) = {HEX}"), 1),
            (format!("\\{HEX}  a\\b"), 1),
            (format!("\u{e9}{HEX}  a"), 1),
        ] {
            assert_eq!(digests(&list).unwrap_err(), DigestsError::Line(number), "{list}");
        }
        assert_eq!(digests("\n\n").unwrap_err(), DigestsError::Empty);
    }

    #[test]
    fn conflicting_digests_of_one_name_are_rejected() {
        assert!(digests(&format!("{HEX}  a/x\n{HEX}  b/x")).is_ok());
        let other = HEX.replace('3', "4");
        let twice = digests(&format!("{HEX}  a/x\n{other}  b/x"));
        assert_eq!(twice.unwrap_err(), DigestsError::Duplicate("x".into()));
    }

    #[test]
    fn single_digests_are_parsed() {
        let mut digests = Digests::default();
        for good in [format!("a.hxz={HEX}"), format!("b=c={HEX}")] {
            assert!(Digests::is_entry(good.as_ref()));
            digests.add_entry(good.as_ref()).unwrap();
        }
        assert!(has_digest_for(&digests, "x/a.hxz") && has_digest_for(&digests, "b=c"));
        for bad in [HEX.to_owned(), format!("={HEX}"), format!("a/b={HEX}"), format!("a={HEX}0")] {
            assert!(!Digests::is_entry(bad.as_ref()), "{bad}");
            assert_eq!(digests.add_entry(bad.as_ref()), Err(DigestsError::Entry));
        }
    }

    #[test]
    fn formatted_lines_round_trip() {
        let digest = parse_digest(HEX.as_bytes()).unwrap();
        for name in ["plain.hxz", "a b", "line\nbreak", "back\\slash", "\\n", "cr\r"] {
            let line = format_line(digest, &Path::new("folder").join(name));
            assert_eq!(parse_line(&line), Some((digest, name.into())), "{name:?}");
            assert!(!line.contains(&b'\n'));
        }
        let plain = format_line(digest, Path::new("a.hxz"));
        assert_eq!(plain, format!("{HEX}  a.hxz").into_bytes());
    }
}
