//! Search for an archive's parents and all further ancestors.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::OpenOptions;
use super::archive::Archive;
use super::error::{Error, ErrorKind};
use super::limits::MAX_CHAIN;
use crate::storage::{FileId, Storage, is_url};

/// Opens the archive at `path`, or in `storage`, and all its ancestors, which are files. Returns the
/// archive itself first, then its ancestors, nearest first.
pub(super) fn open(
    path: &Path,
    storage: Option<Arc<dyn Storage>>,
    options: &OpenOptions,
) -> Result<Vec<Archive>, Error> {
    open_with(Archive::open, path, storage, options, |link| link.found.map(drop))
}

/// Opens as much of a chain as possible to inspect its indexes, without a password. The links list
/// all parents, including those that couldn't be opened, with the reason.
pub(super) fn open_for_index(
    path: &Path,
    storage: Option<Arc<dyn Storage>>,
    options: &OpenOptions,
) -> Result<(Vec<Archive>, Vec<ParentLink>), Error> {
    let mut links = Vec::new();
    let chain = open_with(Archive::open_without_password, path, storage, options, |link| {
        links.push(link);
        Ok(())
    })?;
    Ok((chain, links))
}

/// Opens the archive at `path`, or in `storage`, and all its ancestors. Calls `note` for each link
/// and stops at its first error.
fn open_with(
    open: impl Fn(Arc<Path>, Arc<dyn Storage>, &OpenOptions) -> Result<Archive, Error>,
    path: &Path,
    storage: Option<Arc<dyn Storage>>,
    options: &OpenOptions,
    note: impl FnMut(ParentLink) -> Result<(), Error>,
) -> Result<Vec<Archive>, Error> {
    let storage = match storage {
        Some(storage) => storage,
        None => options.open_storage(path).map_err(|error| Error::open_failed(path, error))?,
    };
    let identity = storage.file_id();
    let archive = open(Arc::from(path), storage, options)?;
    ancestors(archive, identity, options, open, note)
}

/// A reference from an archive to a parent, with the result of opening the parent.
pub(super) struct ParentLink {
    /// Index of the child in the chain.
    pub(super) child: usize,
    /// Name of the parent, as recorded in the child.
    pub(super) name: String,
    /// Index of the parent in the chain.
    pub(super) found: Result<usize, Error>,
}

/// An archive whose parents have yet to be found, with its descendants up to the served archive. A
/// parent that is one of them closes a cycle.
struct PendingArchive {
    archive: usize,
    lineage: Vec<FileId>,
}

/// Opens all ancestors of `archive`. Calls `note` for each link and stops at its first error.
fn ancestors(
    archive: Archive,
    identity: Option<FileId>,
    options: &OpenOptions,
    open: impl Fn(Arc<Path>, Arc<dyn Storage>, &OpenOptions) -> Result<Archive, Error>,
    mut note: impl FnMut(ParentLink) -> Result<(), Error>,
) -> Result<Vec<Archive>, Error> {
    let mut chain = vec![archive];
    let lineage: Vec<FileId> = identity.into_iter().collect();
    let mut opened: Vec<(FileId, usize)> = lineage.iter().map(|&identity| (identity, 0)).collect();
    let mut queue = std::collections::VecDeque::from([PendingArchive { archive: 0, lineage }]);

    while let Some(PendingArchive { archive, lineage }) = queue.pop_front() {
        let Some(child) = chain.get_mut(archive) else { continue };
        child.parents.clear();
        let child_path = Arc::clone(&child.file.path);
        for name in child.header.parent_paths.clone() {
            let mut follow = || {
                let (path, storage) = find(&child_path, &name, options)?;
                let identity = storage.file_id();
                if identity.is_some_and(|identity| lineage.contains(&identity)) {
                    return Err(ErrorKind::ParentCycle(name.clone()).of(&child_path));
                }
                // A parent that several archives share is opened once.
                if let Some((_, place)) = opened.iter().find(|(other, _)| Some(*other) == identity)
                {
                    return Ok(*place);
                }
                if chain.len() >= MAX_CHAIN {
                    return Err(ErrorKind::ChainTooDeep(MAX_CHAIN).of(&chain_start(&chain)));
                }
                chain.push(open(Arc::from(path), storage, options)?);
                let place = chain.len() - 1;
                opened.extend(identity.map(|identity| (identity, place)));
                let mut lineage = lineage.clone();
                lineage.extend(identity);
                queue.push_back(PendingArchive { archive: place, lineage });
                Ok(place)
            };
            let found = follow();
            let parent = found.as_ref().ok().copied();
            if let Some(child) = chain.get_mut(archive) {
                child.parents.push(parent);
            }
            note(ParentLink { child: archive, name, found })?;
        }
    }
    Ok(chain)
}

fn chain_start(chain: &[Archive]) -> Arc<Path> {
    chain.first().map_or_else(|| Arc::from(Path::new("")), |archive| Arc::clone(&archive.file.path))
}

/// Finds the parent that the archive at `child` calls `name`.
///
/// An archive's content is untrusted, so the name can only select a file or object that the operator
/// has put next to the archive or into a parent directory.
fn find(
    child: &Arc<Path>,
    name: &str,
    options: &OpenOptions,
) -> Result<(PathBuf, Arc<dyn Storage>), Error> {
    let tried = candidates(child, name, options);
    let mut denied = None;
    let mut outage = None;
    for path in &tried {
        // The store can't tell whether it has the parent. One that was opened before can be used.
        if outage.is_some() && !options.is_known(path) {
            continue;
        }
        match options.open_storage(path) {
            Ok(storage) => return Ok((path.clone(), storage)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => {
                let is_denied = error.kind() == io::ErrorKind::PermissionDenied;
                let kind = ErrorKind::from_read_error("open the parent", error);
                let error = kind.of(&Arc::from(path.as_path()));
                // A store that may not be listed denies access to objects that don't exist.
                if is_denied && is_url(path) {
                    denied.get_or_insert(error);
                } else if error.is_outage() {
                    outage.get_or_insert(error);
                } else {
                    return Err(error);
                }
            }
        }
    }
    if let Some(error) = outage.or(denied) {
        return Err(error);
    }
    let is_outside = !options.allow_parent_anywhere && !is_plain(Path::new(name));
    Err(ErrorKind::ParentMissing { name: name.to_owned(), tried, is_outside }.of(child))
}

/// Returns the paths at which a parent is searched for, in this order. Of a store's folder, only
/// the objects directly in it.
fn candidates(child: &Path, name: &str, options: &OpenOptions) -> Vec<PathBuf> {
    let name = Path::new(name);
    let beside = match child.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let mut paths = Vec::new();
    for folder in std::iter::once(beside).chain(options.parent_dirs.iter().map(PathBuf::as_path)) {
        if is_url(folder) {
            let is_segment =
                |file: &&OsStr| !file.as_bytes().iter().any(|byte| b"?#%\\".contains(byte));
            paths.extend(name.file_name().filter(is_segment).map(|file| folder.join(file)));
            continue;
        }
        if is_plain(name) {
            paths.push(folder.join(name));
        }
        paths.extend(name.file_name().map(|file| folder.join(file)));
    }
    if options.allow_parent_anywhere && !is_url(child) {
        // Relative names refer to the packer's working directory, which is unknown.
        paths.push(beside.join(name));
        paths.push(name.to_owned());
    }
    let mut seen = std::collections::HashSet::new();
    paths.retain(|path| seen.insert(path.clone()));
    paths
}

/// Returns true if a path stays below the directory that it is joined to.
fn is_plain(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(name: &str, anywhere: bool) -> Vec<String> {
        let options = OpenOptions {
            parent_dirs: vec!["/p".into()],
            allow_parent_anywhere: anywhere,
            ..OpenOptions::default()
        };
        candidates(Path::new("/s/child.hxz"), name, &options)
            .into_iter()
            .map(|path| nbd_telemetry::escape::name(&path).to_string())
            .collect()
    }

    #[test]
    fn parents_are_searched_next_to_the_archive_and_in_parent_dirs_only() {
        assert_eq!(paths("base.hxz", false), ["/s/base.hxz", "/p/base.hxz"]);
        assert_eq!(
            paths("images/base.hxz", false),
            ["/s/images/base.hxz", "/s/base.hxz", "/p/images/base.hxz", "/p/base.hxz"]
        );
        assert_eq!(paths("../up/base.hxz", false), ["/s/base.hxz", "/p/base.hxz"]);
        assert_eq!(paths("/etc/base.hxz", false), ["/s/base.hxz", "/p/base.hxz"]);
        assert_eq!(paths("..", false), [""; 0]);
    }

    #[test]
    fn parents_anywhere_allows_any_path() {
        assert_eq!(paths("/etc/base.hxz", true), ["/s/base.hxz", "/p/base.hxz", "/etc/base.hxz"]);
        assert!(paths("../base.hxz", true).contains(&"/s/../base.hxz".to_owned()));
    }

    #[test]
    fn parents_in_a_store_are_searched_by_file_name_only() {
        let options = OpenOptions {
            parent_dirs: vec!["https://h/base/".into(), "/p".into()],
            allow_parent_anywhere: true,
            ..OpenOptions::default()
        };
        let paths = |name| {
            let paths = candidates(Path::new("s3://golden/v7/child.hxz"), name, &options);
            paths.into_iter().map(|path| path.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let expected = ["s3://golden/v7/base.hxz", "https://h/base/base.hxz", "/p/base.hxz"];
        assert_eq!(paths("base.hxz"), expected);
        assert_eq!(paths("/etc/base.hxz"), expected);
        assert_eq!(paths("../base.hxz"), expected);
        assert_eq!(paths("https://evil/base.hxz")[..2], expected[..2]);
        assert_eq!(paths("base.hxz?x=y"), ["/p/base.hxz?x=y"]);
        assert_eq!(paths("%2e%2e"), ["/p/%2e%2e"]);
    }

    #[test]
    fn parents_of_a_relative_path_are_searched_in_the_current_directory() {
        let options = OpenOptions::default();
        assert_eq!(
            candidates(Path::new("child.hxz"), "base.hxz", &options),
            [PathBuf::from("./base.hxz")]
        );
    }
}
