//! Required digests of archives, with which their content is verified.
//!
//! Unlike a signature, a digest covers every byte of an archive. It is verified when the archive is
//! opened, which takes reading all of it. The resulting BLAKE3 tree is kept, and all later reads
//! are verified against it: a file can be modified without a change of its timestamps, for example
//! through a memory mapping. If there is a tree file beside the archive whose root is the digest,
//! the archive isn't read when it is opened.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytesize::ByteSize;
use parking_lot::Mutex;

use super::OpenOptions;
use super::digest_list::{Digest, DigestsError, parse_entry, parse_line};
use super::error::{Error, ErrorKind, printable};
use super::limits::{GROUP_CACHE_BYTES, MAX_TREE_MEMORY};
use crate::storage::{
    FetchPriority, GROUP_LEN, GroupCache, GroupHashes, HashTree, RemoteError, Stamp, Storage,
    TreeBudget, TreeError, VerifiedStorage,
};

/// Minimum length of a file for which hashing is logged, in bytes.
const MIN_LOGGED_LENGTH: u64 = 1 << 30;

/// Maximum length of an object that is fetched without a warning because it has no tree file, in
/// bytes. Opening an archive fetches about as much.
const MAX_FETCHED_LENGTH: u64 = 1 << 20;

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

/// Required digests of archives, by file name.
///
/// ```
/// use hexz_reader::{Digests, OpenOptions};
///
/// let list = "3ebfc4fd8c2484be73524c218d5260fc92dcb080dee526a6be43df65755391da  disk.hxz\n";
/// let mut digests = Digests::default();
/// digests.add_list(list.as_bytes())?;
/// let options = OpenOptions { digests: Some(digests.into()), ..OpenOptions::default() };
/// # Ok::<(), hexz_reader::DigestsError>(())
/// ```
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

impl RequiredDigest {
    /// Returns the tree if its digest is the expected one, or else the digest.
    fn check(&self, tree: Arc<HashTree>) -> Result<Arc<HashTree>, Digest> {
        let digest = Digest(tree.root());
        if digest == self.expected { Ok(tree) } else { Err(digest) }
    }
}

/// Result of hashing a file.
#[derive(Debug, Clone)]
struct FileHash {
    /// Stamp of the file when it was opened.
    stamp: Stamp,
    /// Hash tree if the digest is the expected one, or the other digest.
    result: Result<Arc<HashTree>, Digest>,
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
                && let Some(before) = before.known.try_lock()
            {
                *entry.known.lock() = before.clone().map(|FileHash { stamp, result }| {
                    let result = result.and_then(|tree| entry.check(tree));
                    FileHash { stamp, result }
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
        options: &OpenOptions,
    ) -> Result<Arc<dyn Storage>, Error> {
        let memory = &options.digest_memory;
        let entry = self.entry(path)?;
        let expected = entry.expected;
        // Only threads that need the same file wait here.
        let mut known = entry.known.lock();
        let stamp = storage.stamp();
        let result = match &*known {
            // A digest that only this list expects needs the tree, which was dropped.
            Some(hash)
                if Some(hash.stamp) == stamp && hash.result.as_ref().err() != Some(&expected) =>
            {
                hash.result.clone()
            }
            _ => {
                // Frees the memory of the previous file's tree first.
                *known = None;
                if !memory.trees.has_room_for(storage.length()) {
                    self.evict_unused();
                }
                let tree = match tree_from_file(path, storage.as_ref(), expected, options) {
                    Ok(Some(tree)) => Ok(tree),
                    Ok(None) if is_tentative(options) && storage.length() > GROUP_LEN => {
                        return Err(ErrorKind::Abandoned.of(path));
                    }
                    Ok(None) => hash_archive(path, storage.as_ref(), &memory.trees),
                    Err(error) => Err(error),
                };
                let tree = tree.map_err(|error| error_kind(error).of(path))?;
                let result = entry.check(Arc::new(tree));
                *known = stamp.map(|stamp| FileHash { stamp, result: result.clone() });
                result
            }
        };
        drop(known);
        let tree = result.map_err(|got| ErrorKind::DigestMismatch { got, expected }.of(path))?;
        match storage.verified_by(Arc::clone(&tree) as Arc<dyn GroupHashes>) {
            Some(verified) => Ok(verified),
            None => Ok(Arc::new(VerifiedStorage::new(storage, tree, Arc::clone(&memory.recent)))),
        }
    }

    /// Drops the trees of archives that aren't open any more. They are hashed again on demand.
    fn evict_unused(&self) {
        for entry in self.entries.values() {
            // A locked entry is being hashed right now, so it is in use.
            if let Some(mut known) = entry.known.try_lock()
                && let Some(FileHash { result: Ok(tree), .. }) = &*known
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

/// Returns the path of the tree file of an archive: `NAME.tree` beside it.
pub fn tree_path(archive: &Path) -> PathBuf {
    let mut path = archive.as_os_str().to_owned();
    path.push(".tree");
    path.into()
}

/// Reads the tree of an archive from the file beside it. Returns `None` if there is none with the
/// `expected` digest; a file of no use is logged, and so is a missing one if the archive has to be
/// fetched from a store.
fn tree_from_file(
    archive: &Path,
    storage: &dyn Storage,
    expected: Digest,
    options: &OpenOptions,
) -> Result<Option<HashTree>, TreeError> {
    let length = storage.length();
    let budget = &options.digest_memory.trees;
    let path = tree_path(archive);
    let unusable = |problem: &dyn std::fmt::Display| {
        if is_tentative(options) {
            return;
        }
        let path = printable(&path);
        tracing::warn!(
            reason = "tree_unusable",
            "{path}: {problem}; the archive is hashed instead, which takes longer"
        );
    };
    let file = match options.open_side_file(&path, FetchPriority::Demand) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if storage.is_remote() && length > MAX_FETCHED_LENGTH {
                tracing::warn!(
                    reason = "tree_missing",
                    "{}: there is no tree file, so all {} of the archive are fetched to verify its \
                     digest; write one with hexz-nbd tree, and put it beside the archive",
                    printable(&path),
                    ByteSize::b(length).display().iec()
                );
            }
            return Ok(None);
        }
        Err(error) if is_outage(&error) => return Err(TreeError::Io(error)),
        Err(error) => {
            unusable(&format_args!("can't open the tree file: {error}"));
            return Ok(None);
        }
    };
    match HashTree::from_file(file.as_ref(), length, budget) {
        Ok(Some(tree)) if Digest(tree.root()) == expected => Ok(Some(tree)),
        Ok(_) if length <= GROUP_LEN => Ok(None),
        Ok(_) => {
            unusable(&"it isn't the tree of the archive that has the required digest");
            Ok(None)
        }
        Err(TreeError::Io(error)) if !is_outage(&error) => {
            unusable(&format_args!("can't read the tree file: {error}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Returns true if the archive that is being opened may not be the current one, so that it isn't
/// hashed.
fn is_tentative(options: &OpenOptions) -> bool {
    options.remote.as_ref().is_some_and(|remote| remote.is_tentative())
}

/// Returns true if the store fails, so that the archive couldn't be hashed either. Access to a file
/// that doesn't exist may be denied.
fn is_outage(error: &io::Error) -> bool {
    error.kind() != io::ErrorKind::PermissionDenied
        && RemoteError::of(error).is_some_and(|error| error.is_outage)
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
        tracing::info!("{}: hashing {size} to verify its digest", printable(path));
    }
    let start = Instant::now();
    let tree = HashTree::of(storage, budget)?;
    if length >= MIN_LOGGED_LENGTH {
        let seconds = start.elapsed().as_secs().max(1);
        let rate = ByteSize::b(length / seconds).display().iec();
        tracing::info!("{}: hashed {size} in {seconds} s ({rate}/s)", printable(path));
    }
    Ok(tree)
}

fn error_kind(error: TreeError) -> ErrorKind {
    match error {
        TreeError::Io(error) => ErrorKind::from_read_error("hash the file", error),
        TreeError::Memory { needed, limit } => ErrorKind::TooLarge {
            what: "the memory for verifying archives by digest, in bytes,",
            got: needed,
            limit,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DigestTree;
    use crate::storage::{CountedStorage, FileStorage, ReadCounters};

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
            let options =
                OpenOptions { digest_memory: self.memory.clone(), ..OpenOptions::default() };
            digests.verify(&path, counted, &options).map_err(|error| error.kind.label())
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
    fn a_tree_file_saves_hashing_the_archive() {
        let files = TestFiles::new(9);
        let digest = files.write("a");
        let path = files.folder.path().join("a");
        let tree_file = tree_path(&path);
        assert_eq!(tree_file, files.folder.path().join("a.tree"));
        let digests = || digests_of(&[("a", digest)]);
        let mut tree = Vec::new();
        DigestTree::of(&FileStorage::open(&path).unwrap()).unwrap().write(&mut tree).unwrap();
        std::fs::write(&tree_file, &tree).unwrap();

        let verified = files.verify(&digests(), "a").unwrap();
        assert_eq!(files.reads.bytes(), 0);
        let mut buffer = vec![0; 1000];
        verified.read_exact_at(&mut buffer, GROUP_LEN - 500).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let middle = usize::try_from(GROUP_LEN).unwrap();
        assert!(buffer == bytes[middle - 500..middle + 500]);

        // The archive is replaced: its bytes are never those that were hashed.
        std::fs::write(&path, vec![7; bytes.len()]).unwrap();
        let verified = files.verify(&digests(), "a").unwrap();
        assert!(verified.read_exact_at(&mut buffer, 0).is_err());
        std::fs::write(&path, &bytes).unwrap();

        // A file that isn't this archive's tree is of no use.
        let mut forged = tree.clone();
        *forged.last_mut().unwrap() ^= 1;
        for (useless, content) in [(1, &forged[..]), (2, &tree[1..]), (3, b""), (4, b"no tree")] {
            std::fs::write(&tree_file, content).unwrap();
            let before = files.reads.bytes();
            assert!(files.verify(&digests(), "a").is_ok(), "{useless}");
            assert_eq!(files.reads.bytes() - before, 2 * GROUP_LEN, "{useless}");
        }
        std::fs::remove_file(&tree_file).unwrap();
        std::fs::create_dir(&tree_file).unwrap();
        assert!(files.verify(&digests(), "a").is_ok());
        // It doesn't help an archive with another digest.
        let other = digests_of(&[("a", Digest([1; 32]))]);
        std::fs::remove_dir(&tree_file).unwrap();
        std::fs::write(&tree_file, &tree).unwrap();
        assert_eq!(files.verify(&other, "a").err(), Some("digest"));
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
