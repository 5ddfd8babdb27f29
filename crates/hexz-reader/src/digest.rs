//! Required digests of archives: lists of BLAKE3 hashes in the format of `b3sum`.
//!
//! Unlike a signature, a digest covers every byte of an archive. It is verified when the archive is
//! opened, which takes reading all of it. The resulting BLAKE3 tree is kept, and all later reads
//! are verified against it: a file can be modified without a change of its timestamps, for example
//! through a memory mapping.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytesize::ByteSize;
use nbd_telemetry::Hex;

use super::error::{Error, ErrorKind, printable};
use super::limits::{GROUP_CACHE_BYTES, MAX_TREE_MEMORY};
use crate::storage::{
    self, FileStamp, GroupCache, HashTree, Storage, TreeBudget, TreeError, VerifiedStorage,
};

/// Minimum length of a file for which hashing is logged, in bytes.
const MIN_LOGGED_LENGTH: u64 = 1 << 30;

/// Memory for verifying reads of archives with digests, shared by all of them.
#[derive(Debug, Clone)]
pub struct DigestMemory {
    trees: Arc<TreeBudget>,
    recent: Arc<GroupCache>,
}

impl Default for DigestMemory {
    fn default() -> Self {
        Self { trees: TreeBudget::new(MAX_TREE_MEMORY), recent: GroupCache::new(GROUP_CACHE_BYTES) }
    }
}

/// BLAKE3-256 hash of a whole file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Hashes all of `storage` on all cores, in bounded memory.
    ///
    /// # Errors
    /// The storage can't be read.
    pub fn of(storage: &dyn Storage) -> io::Result<Self> {
        storage::blake3(storage).map(Self)
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

/// Required digests of archives, by file name.
#[derive(Debug, Default)]
pub struct Digests {
    entries: HashMap<OsString, RequiredDigest>,
}

/// Required digest of one archive.
#[derive(Debug)]
struct RequiredDigest {
    expected: Digest,
    /// Result of the last hashing under this name. Thanks to it, a parent of many archives isn't
    /// hashed again for each of them, nor a file with a wrong digest for each attempt to open it.
    known: Mutex<Option<FileHash>>,
}

/// Result of hashing a file.
#[derive(Debug, Clone)]
struct FileHash {
    /// Stamp of the file when it was opened.
    stamp: FileStamp,
    digest: Digest,
    /// Hash tree; `None` if the digest isn't the expected one.
    tree: Option<Arc<HashTree>>,
}

/// Error in a list of digests.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestsError {
    /// The line with this number isn't in the format of b3sum.
    #[error(
        "line {0} is not a BLAKE3 of 64 hexadecimal digits, two spaces and a path, as \
         \"hexz-nbd digest\" and b3sum write it"
    )]
    Line(usize),
    /// The text isn't `NAME=BLAKE3`.
    #[error("it is not NAME=BLAKE3, with a file's name and 64 hexadecimal digits")]
    Entry,
    /// Two different digests are given for one file name.
    #[error(
        "there are two digests for {}; archives are told apart by their file names, without \
         folders: give one of them another name", printable(Path::new(.0))
    )]
    Duplicate(OsString),
    /// The list is empty.
    #[error("there is no digest in it")]
    Empty,
}

impl Digests {
    /// Adds the lines of a list: `BLAKE3  PATH`. Only the last component of PATH matters.
    ///
    /// # Errors
    /// See [`DigestsError`].
    pub fn add_list(&mut self, list: &[u8]) -> Result<(), DigestsError> {
        let mut is_empty = true;
        for (number, line) in (1..).zip(list.split(|&byte| byte == b'\n')) {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() {
                continue;
            }
            let (digest, name) = parse_line(line).ok_or(DigestsError::Line(number))?;
            self.add(&name, digest)?;
            is_empty = false;
        }
        if is_empty { Err(DigestsError::Empty) } else { Ok(()) }
    }

    /// Adds one digest, given as `NAME=BLAKE3`.
    ///
    /// # Errors
    /// See [`DigestsError`].
    pub fn add_entry(&mut self, entry: &OsStr) -> Result<(), DigestsError> {
        let (name, digest) = parse_entry(entry).ok_or(DigestsError::Entry)?;
        self.add(name, digest)
    }

    /// Returns true if a text has the form `NAME=BLAKE3`, and isn't the path of a list.
    pub fn is_entry(text: &OsStr) -> bool {
        parse_entry(text).is_some()
    }

    fn add(&mut self, name: &OsStr, expected: Digest) -> Result<(), DigestsError> {
        match self.entries.entry(name.to_owned()) {
            Entry::Occupied(entry) if entry.get().expected == expected => Ok(()),
            Entry::Occupied(entry) => Err(DigestsError::Duplicate(entry.key().clone())),
            Entry::Vacant(place) => {
                place.insert(RequiredDigest { expected, known: Mutex::default() });
                Ok(())
            }
        }
    }

    /// Copies the hashing results of a previous list, so that unchanged archives aren't read again.
    pub fn reuse_hashes_of(&self, before: &Self) {
        for (name, entry) in &self.entries {
            // A file that is being hashed right now will be hashed again.
            if let Some(before) = before.entries.get(name)
                && let (Ok(mut known), Ok(before)) = (entry.known.lock(), before.known.try_lock())
            {
                *known = before.clone().map(|hashed| {
                    let tree = hashed.tree.filter(|_| hashed.digest == entry.expected);
                    FileHash { tree, ..hashed }
                });
            }
        }
    }

    /// Checks that an archive has a digest, before any of its bytes are read.
    pub(super) fn require(&self, path: &Arc<Path>) -> Result<(), Error> {
        self.entry(path).map(|_| ())
    }

    /// Compares a whole archive with its digest. Every read of the returned storage is verified
    /// against that digest.
    pub(super) fn verify(
        &self,
        path: &Arc<Path>,
        storage: Arc<dyn Storage>,
        memory: &DigestMemory,
    ) -> Result<Arc<dyn Storage>, Error> {
        let entry = self.entry(path)?;
        // Only threads that need the same file wait here.
        let mut known = entry.known.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = storage.stamp();
        let tree = match &*known {
            Some(FileHash { stamp: then, digest, tree })
                if Some(*then) == stamp && (tree.is_some() || *digest != entry.expected) =>
            {
                tree.clone().filter(|_| *digest == entry.expected).ok_or(*digest)
            }
            _ => {
                // Frees the memory of the previous file's tree first.
                *known = None;
                if !memory.trees.has_room_for(storage.length()) {
                    self.evict_unused();
                }
                let tree = hash_archive(path, storage.as_ref(), &memory.trees)
                    .map_err(|error| error_kind(error).of(path))?;
                let digest = Digest(tree.root());
                let tree = (digest == entry.expected).then(|| Arc::new(tree));
                *known = stamp.map(|stamp| FileHash { stamp, digest, tree: tree.clone() });
                tree.ok_or(digest)
            }
        };
        drop(known);
        match tree {
            Ok(tree) => {
                let recent = Arc::clone(&memory.recent);
                Ok(Arc::new(VerifiedStorage::new(storage, tree, recent)))
            }
            Err(got) => Err(ErrorKind::DigestMismatch { got, expected: entry.expected }.of(path)),
        }
    }

    /// Drops the trees of archives that aren't open any more. They are hashed again on demand.
    fn evict_unused(&self) {
        for entry in self.entries.values() {
            // A locked entry is being hashed right now, so it is in use.
            if let Ok(mut known) = entry.known.try_lock()
                && let Some(FileHash { tree: Some(tree), .. }) = &*known
                && Arc::strong_count(tree) == 1
            {
                *known = None;
            }
        }
    }

    fn entry(&self, path: &Arc<Path>) -> Result<&RequiredDigest, Error> {
        path.file_name()
            .and_then(|name| self.entries.get(name))
            .ok_or_else(|| ErrorKind::NoDigest.of(path))
    }
}

/// Hashes all of an archive, and logs that for a large one.
fn hash_archive(
    path: &Path,
    storage: &dyn Storage,
    budget: &Arc<TreeBudget>,
) -> Result<HashTree, TreeError> {
    let length = storage.length();
    let size = ByteSize::b(length).display().iec();
    if length >= MIN_LOGGED_LENGTH {
        tracing::info!("{}: comparing all of its {size} with its digest", printable(path));
    }
    let start = Instant::now();
    let tree = HashTree::of(storage, budget)?;
    if length >= MIN_LOGGED_LENGTH {
        let seconds = start.elapsed().as_secs().max(1);
        let rate = ByteSize::b(length / seconds).display().iec();
        tracing::info!("{}: hashed {size} in {seconds} s, {rate}/s", printable(path));
    }
    Ok(tree)
}

fn error_kind(error: TreeError) -> ErrorKind {
    match error {
        TreeError::Io(error) => ErrorKind::Io("read all of it for its digest", error),
        TreeError::Memory { needed, limit } => ErrorKind::TooLarge {
            what: "the memory for the hashes of all archives of --digest, in bytes,",
            got: needed,
            limit,
        },
    }
}

/// Formats a line of a list, without a line break.
pub fn format_line(digest: Digest, path: &Path) -> Vec<u8> {
    let mut line = Vec::new();
    let path = path.as_os_str().as_bytes();
    let is_odd = path.iter().any(|byte| b"\\\n\r".contains(byte));
    if is_odd {
        line.push(b'\\');
    }
    line.extend(format!("{digest}  ").as_bytes());
    for &byte in path {
        match byte {
            b'\\' => line.extend(br"\\"),
            b'\n' => line.extend(br"\n"),
            b'\r' => line.extend(br"\r"),
            byte => line.push(byte),
        }
    }
    line
}

/// Parses the digest and the file name of a line. A leading backslash means that line breaks and
/// backslashes in the path are escaped.
fn parse_line(line: &[u8]) -> Option<(Digest, OsString)> {
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
        plain.push(match (byte, byte == b'\\') {
            (byte, false) => byte,
            (_, true) => match bytes.next()? {
                b'n' => b'\n',
                b'r' => b'\r',
                b'\\' => b'\\',
                _ => return None,
            },
        });
    }
    Some(plain)
}

fn parse_entry(entry: &OsStr) -> Option<(&OsStr, Digest)> {
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
    use crate::storage::{CountedStorage, FileStorage, GROUP_LEN, ReadCounters};

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

    /// Files of pseudorandom bytes, with a count of what is read of them.
    struct TestFiles {
        folder: tempfile::TempDir,
        reads: Arc<ReadCounters>,
        memory: DigestMemory,
    }

    impl TestFiles {
        /// Creates a budget for this number of trees, each of two groups.
        fn new(trees: u64) -> Self {
            let memory =
                DigestMemory { trees: TreeBudget::new(trees * 2 * 32), recent: GroupCache::new(0) };
            Self { folder: tempfile::tempdir().unwrap(), reads: Arc::default(), memory }
        }

        fn write(&self, name: &str) -> Digest {
            let mut bytes = vec![0; 2 * usize::try_from(GROUP_LEN).unwrap()];
            blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut bytes);
            std::fs::write(self.folder.path().join(name), &bytes).unwrap();
            Digest(*blake3::hash(&bytes).as_bytes())
        }

        fn verify(&self, digests: &Digests, name: &str) -> Result<Arc<dyn Storage>, &'static str> {
            let path: Arc<Path> = Arc::from(self.folder.path().join(name));
            let file = Arc::new(FileStorage::open(&path).unwrap());
            let counted = Arc::new(CountedStorage::new(file, Arc::clone(&self.reads)));
            digests.verify(&path, counted, &self.memory).map_err(|error| error.kind.label())
        }
    }

    fn digests_of(entries: &[(&str, Digest)]) -> Digests {
        let mut digests = Digests::default();
        for (name, digest) in entries {
            digests.add(OsStr::new(name), *digest).unwrap();
        }
        digests
    }

    #[test]
    fn unchanged_files_are_hashed_once_and_compared_with_the_current_list() {
        let files = TestFiles::new(9);
        let right = files.write("a");
        let wrong = Digest([7; 32]);
        let first = digests_of(&[("a", right)]);
        assert!(files.verify(&first, "a").is_ok());
        let hashed = files.reads.bytes();
        assert_eq!(hashed, 2 * GROUP_LEN);
        assert!(files.verify(&first, "a").is_ok());
        let again = digests_of(&[("a", right)]);
        again.reuse_hashes_of(&first);
        drop(first);
        assert!(files.verify(&again, "a").is_ok());
        assert_eq!(files.reads.bytes(), hashed);
        // Another list expects a different digest of the same file. It isn't read again for that.
        let second = digests_of(&[("a", wrong)]);
        second.reuse_hashes_of(&again);
        drop(again);
        assert_eq!(files.memory.trees.used(), 0);
        assert_eq!(files.verify(&second, "a").err(), Some("digest"));
        assert_eq!(files.verify(&second, "a").err(), Some("digest"));
        assert_eq!(files.reads.bytes(), hashed);
        // The first digest is expected again, which needs the tree that was dropped.
        let third = digests_of(&[("a", right)]);
        third.reuse_hashes_of(&second);
        assert!(files.verify(&third, "a").is_ok());
        assert_eq!(files.reads.bytes(), 2 * hashed);
        // The name now belongs to another file.
        files.write("b");
        std::fs::rename(files.folder.path().join("b"), files.folder.path().join("a")).unwrap();
        assert_eq!(files.verify(&third, "a").err(), Some("digest"));
        assert_eq!(files.reads.bytes(), 3 * hashed);
    }

    #[test]
    fn trees_of_closed_archives_are_evicted_when_memory_is_short() {
        let files = TestFiles::new(2);
        let entries: Vec<_> = ["a", "b", "c"].map(|name| (name, files.write(name))).into();
        let digests = digests_of(&entries);
        let verify = |name| files.verify(&digests, name);
        let [a, b] = ["a", "b"].map(|name| verify(name).unwrap());
        assert_eq!(verify("c").err(), Some("too_large"));
        // Open archives are still verified.
        let mut buffer = [0; 10];
        a.read_exact_at(&mut buffer, GROUP_LEN).unwrap();
        drop(a);
        let _c = verify("c").unwrap();
        assert_eq!(verify("a").err(), Some("too_large"));
        drop(b);
        assert!(verify("a").is_ok());
    }

    #[test]
    fn trees_of_open_archives_are_kept_when_memory_is_short() {
        let files = TestFiles::new(1);
        let digests = digests_of(&["a", "b"].map(|name| (name, files.write(name))));
        let verify = |name| files.verify(&digests, name);
        drop(verify("b").unwrap());
        // Takes the place of the closed archive's tree.
        let a = verify("a").unwrap();
        assert_eq!(verify("b").err(), Some("too_large"));
        // The open archive isn't hashed again.
        let hashed = files.reads.bytes();
        assert!(verify("a").is_ok());
        assert_eq!(files.reads.bytes(), hashed);
        drop(a);
    }

    #[test]
    fn tree_of_a_replaced_file_is_freed() {
        let files = TestFiles::new(1);
        let digests = digests_of(&[("a", files.write("a"))]);
        drop(files.verify(&digests, "a").unwrap());
        assert_eq!(files.memory.trees.used(), 64);
        // The replaced file is hashed again, in the memory of the previous tree.
        files.write("a");
        assert!(files.verify(&digests, "a").is_ok());
        std::fs::write(files.folder.path().join("a"), "else").unwrap();
        assert_eq!(files.verify(&digests, "a").err(), Some("digest"));
        assert_eq!(files.memory.trees.used(), 0);
    }
}
