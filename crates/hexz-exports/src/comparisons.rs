//! Finds the archives that an export can be compared with, and authorizes the comparisons.
//!
//! A comparison reveals where two archives differ, so the client must be allowed to open the same
//! stream of the other archive: under the name in its query, and under every other name by which
//! the same file is served. Files are identified by device and inode, not by path, so links can't
//! be used to bypass the check.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use tokio::task::{spawn_blocking, yield_now};
use tokio::time::timeout;

use super::Catalog;
use super::catalog::{stream_name, stream_of};
use super::files::{PATIENCE, ServedFiles};
use super::snapshot::{COMPARISON_NAMESPACES, SnapshotExport, comparison_contexts};
use super::source::file_name;
use hexz_reader::{DiffBase, Snapshot};
use nbd_server::{AccessFilter, ContextQueries, Export};

/// Number of named archives that are checked together.
const PAGE_SIZE: usize = 64;

/// Maximum number of names of one file. The names are kept while an export is read, so that a
/// client that loses the right to open one of them is disconnected. A file with more names can't
/// be compared with.
const MAX_NAMES: usize = 64;

/// An archive that an export can be compared with.
#[derive(Debug, Clone)]
pub(super) struct Comparison {
    /// Name in the client's query.
    pub(super) name: String,
    pub(super) reference: DiffBase,
    /// Names of the exports that the client must be allowed to open.
    pub(super) exports: Arc<[String]>,
}

/// The comparisons of an export that one client may make, a page at a time. Each name appears
/// once, in an order that doesn't depend on the queries.
pub(super) struct Comparisons<'a> {
    catalog: &'a Catalog,
    export: &'a SnapshotExport,
    queries: &'a ContextQueries<'a>,
    may_open: &'a AccessFilter,
    next: NextPage,
    /// True once the metadata of the served files has been read.
    has_looked: bool,
}

/// The archives of the next page.
enum NextPage {
    /// All named archives from this position on.
    AnyFrom(usize),
    /// The named archives at these positions.
    These(VecDeque<usize>),
    Parents,
    Nothing,
}

impl Catalog {
    /// Returns the comparisons of `export` that match `queries` and that the client may make.
    pub(super) fn comparisons<'a>(
        &'a self,
        export: &'a SnapshotExport,
        queries: &'a ContextQueries<'a>,
        may_open: &'a AccessFilter,
    ) -> Comparisons<'a> {
        let next = match queries.exact_names() {
            None => NextPage::AnyFrom(0),
            Some(names) => {
                let named = names.filter_map(compared_name);
                let positions: BTreeSet<usize> =
                    named.filter_map(|name| self.named.position(name)).collect();
                NextPage::These(positions.into_iter().collect())
            }
        };
        Comparisons { catalog: self, export, queries, may_open, next, has_looked: false }
    }
}

/// Extracts the name that a query's context compares the export with.
fn compared_name(query: &[u8]) -> Option<&str> {
    let query = str::from_utf8(query).ok()?;
    COMPARISON_NAMESPACES
        .iter()
        .find_map(|namespace| query.strip_prefix(namespace)?.strip_prefix(':'))
}

impl Comparisons<'_> {
    /// Returns the next page of comparisons, which may be empty. `None` follows the last one.
    pub(super) async fn page(&mut self) -> Option<Vec<Comparison>> {
        let found = match &mut self.next {
            NextPage::AnyFrom(start) => {
                let positions = *start..self.catalog.named.len().min(*start + PAGE_SIZE);
                *start = positions.end;
                if *start == self.catalog.named.len() {
                    self.next = NextPage::Parents;
                }
                self.named(positions).await
            }
            NextPage::These(positions) => {
                let count = positions.len().min(PAGE_SIZE);
                let now: Vec<usize> = positions.drain(..count).collect();
                if positions.is_empty() {
                    self.next = NextPage::Parents;
                }
                self.named(now).await
            }
            NextPage::Parents => {
                self.next = NextPage::Nothing;
                self.parents()
            }
            NextPage::Nothing => return None,
        };
        if found.is_empty() {
            // Yield: walking a large catalog mustn't monopolize the thread.
            yield_now().await;
            return Some(Vec::new());
        }
        Some(self.authorized(found).await)
    }

    /// Returns those of the named archives that are wanted and open, and whose files haven't
    /// changed.
    async fn named(&self, positions: impl IntoIterator<Item = usize>) -> Vec<(String, DiffBase)> {
        let is_itself = |name: &str| stream_of(self.export.name(), name).is_some();
        let named = positions.into_iter().filter_map(|position| self.catalog.named.get(position));
        let wanted: Vec<_> = named
            .filter(|(name, _)| !is_itself(name) && self.is_wanted(name))
            .map(|(name, slot)| (name.to_owned(), slot.clone()))
            .collect();
        if wanted.is_empty() {
            return Vec::new();
        }
        let current = spawn_blocking(move || {
            let current = wanted.into_iter().filter_map(|(name, slot)| {
                let latest = slot.latest()?;
                // Close it: a deleted file takes up disk space while it is open.
                if !latest.is_current() {
                    slot.close();
                    return None;
                }
                Some((name, latest.diff_bases().into_iter().next()?))
            });
            current.collect()
        });
        match timeout(PATIENCE, current).await {
            Ok(Ok(current)) => current,
            _ => Vec::new(),
        }
    }

    /// Returns the ancestors, under their file names.
    fn parents(&self) -> Vec<(String, DiffBase)> {
        let snapshot: &Arc<Snapshot> = self.export.snapshot();
        let references = snapshot.diff_bases().into_iter().skip(1);
        let parents = snapshot.parents().map(file_name).zip(references);
        let mut names = HashSet::new();
        parents
            // The name of a named archive always refers to that archive.
            .filter(|(name, _)| !self.catalog.named.contains(name) && self.is_wanted(name))
            // If two ancestors have one name, the nearer one is meant.
            .filter(|(name, _)| names.insert(name.clone()))
            .collect()
    }

    /// Returns true if the client asks for a comparison with `name` and may open it.
    fn is_wanted(&self, name: &str) -> bool {
        comparison_contexts(name).any(|context| self.queries.matches(&context))
            && self.may_open.allows(&stream_name(name, self.export.stream()))
    }

    /// Keeps only what the client is authorized to compare with.
    async fn authorized(&mut self, found: Vec<(String, DiffBase)>) -> Vec<Comparison> {
        let files = match self.has_looked {
            true => self.catalog.files.latest(),
            false => self.catalog.look().await,
        };
        self.has_looked = true;
        // Fail closed: without the list of all files, nothing can be authorized.
        let Some(files) = files.filter(|files| files.are_known()) else { return Vec::new() };
        let found = found.into_iter();
        found.filter_map(|(name, reference)| self.authorize(name, reference, &files)).collect()
    }

    fn authorize(
        &self,
        name: String,
        reference: DiffBase,
        files: &ServedFiles,
    ) -> Option<Comparison> {
        let named = &self.catalog.named;
        let mut names = vec![name.as_str()];
        if let Some(file) = reference.file_id() {
            // The folder may contain another file with the same name as an ancestor.
            let is_other = |there| !named.contains(&name) && there != file;
            if files.of_name(&name).is_some_and(|stamp| is_other(stamp.id())) {
                return None;
            }
            let others = files.names_of(file, named).filter(|other| *other != name);
            names.extend(others.take(MAX_NAMES));
        } else if !named.contains(&name) {
            return None;
        }
        let stream = self.export.stream();
        let exports: Arc<[String]> = names.iter().map(|it| stream_name(it, stream)).collect();
        let may_compare =
            names.len() <= MAX_NAMES && exports.iter().all(|export| self.may_open.allows(export));
        may_compare.then_some(Comparison { name, reference, exports })
    }
}
