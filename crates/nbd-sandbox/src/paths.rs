//! Determines which folders have to stay readable for everything that may be opened later.
//!
//! Files are replaced by renaming others over them, and links by other links. So the folder is
//! allowed, both that of the file and that of a link leading to it. Whoever can't put files there
//! can't make more of them readable.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use nbd_telemetry::escape;

use super::{SOCKET_NOT_REMOVABLE, SandboxNote, SandboxPlan};

/// Maximum number of links followed, as in the kernel.
const MAX_LINKS: usize = 40;

/// Paths that may be read, appended to, or removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct AllowedPaths {
    /// Readable folders, with everything below them.
    pub(super) folders: BTreeSet<PathBuf>,
    /// Readable single files and block devices.
    pub(super) files: BTreeSet<PathBuf>,
    /// Folders of files that are appended to and may be created anew.
    pub(super) appendable: BTreeSet<PathBuf>,
    /// Single paths that are appended to: pipes, devices, and files in the root folder.
    pub(super) appendable_files: BTreeSet<PathBuf>,
    /// Folders of Unix sockets, in which files may be removed.
    pub(super) removable: BTreeSet<PathBuf>,
    /// Operations that won't work, and the reasons.
    pub(super) notes: Vec<SandboxNote>,
}

/// Set of paths that stay readable in the sandbox, to check a later configuration against.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadableSet(Option<ReadablePaths>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct ReadablePaths {
    /// Readable folders and files.
    places: Vec<PathBuf>,
    /// Everything that was named at the start. What of it can't be read was reported then.
    known: BTreeSet<PathBuf>,
}

impl ReadableSet {
    pub(super) fn new(plan: &SandboxPlan, readable: &AllowedPaths) -> Self {
        let places = readable.folders.iter().chain(&readable.files).cloned().collect();
        Self(Some(ReadablePaths { places, known: readable_paths_of(plan).cloned().collect() }))
    }

    /// Returns the paths in `plan` that are new and can't be read inside the sandbox.
    pub fn unreadable(&self, plan: &SandboxPlan) -> Vec<PathBuf> {
        let Some(within) = &self.0 else { return Vec::new() };
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let new = readable_paths_of(plan).filter(|path| !within.known.contains(*path));
        let is_closed = |path: &&PathBuf| {
            let end = resolve(&here.join(path), &file_kind).end;
            !end.ancestors().any(|above| within.places.iter().any(|place| place == above))
        };
        let everywhere =
            plan.anywhere && !within.places.iter().any(|place| place == Path::new("/"));
        let everywhere = everywhere.then(|| PathBuf::from("/"));
        new.filter(is_closed).cloned().chain(everywhere).collect()
    }
}

/// Returns all files and folders to read that a plan names.
fn readable_paths_of(plan: &SandboxPlan) -> impl Iterator<Item = &PathBuf> {
    plan.files.iter().chain(&plan.reloaded).chain(&plan.folders)
}

/// Kind of file at a path whose parents aren't links.
#[derive(Debug, Clone, PartialEq, Eq)]
enum FileKind {
    Link(PathBuf),
    Folder,
    File,
    Device,
    /// A pipe, or a device that isn't a disk.
    Other,
    Nothing,
}

/// Result of following a path.
struct ResolvedPath {
    /// Folders of links that are the last component of a path.
    links: Vec<PathBuf>,
    /// Folders of links that lead to a place below their own folder, such as `current` to
    /// `releases/7`: such links are meant to be switched.
    switchable_links: Vec<PathBuf>,
    end: PathBuf,
    kind: FileKind,
}

impl AllowedPaths {
    /// Computes what `plan` needs, based on the links and folders as they are now.
    pub(super) fn for_plan(plan: &SandboxPlan) -> Self {
        // Without a current directory, relative paths lead nowhere anyway.
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Self::with(plan, &here, file_kind)
    }

    fn with(plan: &SandboxPlan, here: &Path, file_kind: impl Fn(&Path) -> FileKind) -> Self {
        let mut readable = Self::default();
        for path in plan.files.iter().chain(&plan.reloaded) {
            readable.add_file(path, resolve(&here.join(path), &file_kind));
        }
        for path in &plan.folders {
            readable.add_folder(path, resolve(&here.join(path), &file_kind));
        }
        for path in &plan.appended {
            readable.add_appended(path, resolve(&here.join(path), &file_kind));
        }
        for path in &plan.sockets {
            let folder = here.join(path).parent().map(Path::to_owned).unwrap_or_default();
            readable.add_socket(path, resolve(&folder, &file_kind).end);
        }
        if plan.anywhere {
            readable.folders.insert("/".into());
        }
        readable.drop_nested();
        readable.note_readable_and_appendable();
        readable
    }

    fn add_file(&mut self, path: &Path, resolved: ResolvedPath) {
        match (&resolved.kind, resolved.end.parent()) {
            // The device's folder isn't allowed, since it contains other devices.
            (FileKind::Device, _) => {
                self.files.insert(resolved.end);
                return;
            }
            (FileKind::Folder, _) | (_, None) => return,
            (_, Some(root)) if root == Path::new("/") => {
                let text = format!(
                    "{} is in the folder /, which doesn't stay readable: a file that replaces it \
                     can be read only after a restart",
                    escape::path(path)
                );
                self.notes.push(SandboxNote::new("replacement_not_readable", text));
                self.files.insert(resolved.end);
            }
            (_, Some(folder)) => {
                self.folders.insert(folder.to_owned());
            }
        }
        let links = resolved.links.into_iter().chain(resolved.switchable_links);
        self.folders.extend(links.filter(|folder| folder != Path::new("/")));
    }

    fn add_folder(&mut self, path: &Path, resolved: ResolvedPath) {
        if resolved.kind == FileKind::Nothing {
            let text = format!(
                "no folder {}: if it is created later, it can be read only after a restart",
                escape::path(path)
            );
            self.notes.push(SandboxNote::new("folder_missing", text));
            return;
        }
        self.folders.insert(resolved.end);
        self.folders.extend(
            resolved.switchable_links.into_iter().filter(|folder| folder != Path::new("/")),
        );
    }

    fn add_appended(&mut self, path: &Path, resolved: ResolvedPath) {
        match (&resolved.kind, resolved.end.parent()) {
            // Its folder contains other devices, and it is never rotated.
            (FileKind::Other, _) => {
                self.appendable_files.insert(resolved.end);
            }
            (_, Some(root)) if root == Path::new("/") => {
                let text = format!(
                    "{} is in the folder /, where files can't be created: log rotation needs a \
                     restart",
                    escape::path(path)
                );
                self.notes.push(SandboxNote::new("file_not_recreatable", text));
                self.appendable_files.insert(resolved.end);
            }
            (_, Some(folder)) => {
                self.appendable.insert(folder.to_owned());
            }
            (_, None) => {}
        }
    }

    /// Adds a note if an attacker inside the sandbox could append to what is read.
    fn note_readable_and_appendable(&mut self) {
        for folder in &self.appendable {
            let is_within = |path: &&PathBuf| path.starts_with(folder);
            if let Some(both) = self.folders.iter().chain(&self.files).find(is_within) {
                let text = format!(
                    "{} can be appended to, since a file that is written is in the same folder: \
                     move that file to a folder of its own",
                    escape::path(both)
                );
                self.notes.push(SandboxNote::new("readable_and_appendable", text));
            }
        }
    }

    /// Describes what can be appended to.
    pub(super) fn describe_appendable(&self) -> String {
        let folders = self.appendable.iter().map(|folder| format!("{}/", escape::path(folder)));
        let files = self.appendable_files.iter().map(|file| escape::path(file).to_string());
        match folders.chain(files).collect::<Vec<_>>() {
            none if none.is_empty() => String::new(),
            some => format!(", appends to {}", some.join(", ")),
        }
    }

    fn add_socket(&mut self, path: &Path, folder: PathBuf) {
        if folder == Path::new("/") {
            let text = format!(
                "{} can't be removed at exit from the folder /, and stays until the next start",
                escape::path(path)
            );
            self.notes.push(SandboxNote::new(SOCKET_NOT_REMOVABLE, text));
        } else {
            self.removable.insert(folder);
        }
    }

    /// Drops folders and files that are below others.
    fn drop_nested(&mut self) {
        let all = self.folders.clone();
        let within = |path: &Path| path.ancestors().skip(1).any(|above| all.contains(above));
        self.folders.retain(|folder| !within(folder));
        self.files.retain(|file| !within(file));
    }
}

impl fmt::Display for AllowedPaths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.folders.contains(Path::new("/")) {
            return f.write_str("everywhere, as parents may be anywhere");
        }
        let folders = self.folders.iter().map(|folder| format!("{}/", escape::path(folder)));
        let files = self.files.iter().map(|file| escape::path(file).to_string());
        match folders.chain(files).collect::<Vec<_>>() {
            none if none.is_empty() => f.write_str("no file"),
            some => f.write_str(&some.join(", ")),
        }
    }
}

/// Follows an absolute path as the kernel would.
fn resolve(path: &Path, file_kind: &impl Fn(&Path) -> FileKind) -> ResolvedPath {
    let mut parts: VecDeque<OsString> = components(path).collect();
    let (mut links, mut switchable_links, mut end) = (vec![], vec![], PathBuf::from("/"));
    let mut followed = 0;
    while let Some(part) = parts.pop_front() {
        if part == ".." {
            end.pop();
            continue;
        }
        let next = end.join(part);
        match file_kind(&next) {
            FileKind::Link(target) if followed < MAX_LINKS => {
                followed += 1;
                if parts.is_empty() {
                    links.push(end.clone());
                }
                if leads_below(&end, &target) {
                    switchable_links.push(end.clone());
                }
                if target.is_absolute() {
                    end = "/".into();
                }
                for part in components(&target).collect::<Vec<_>>().into_iter().rev() {
                    parts.push_front(part);
                }
            }
            _ => end = next,
        }
    }
    // Looked up last, because the path may end with a `..`.
    let kind = file_kind(&end);
    ResolvedPath { links, switchable_links, end, kind }
}

fn components(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

/// Returns true if a link in `folder` to `target` leads below that folder.
fn leads_below(folder: &Path, target: &Path) -> bool {
    let is_plain = !target.components().any(|part| part == Component::ParentDir);
    is_plain && folder.join(target).starts_with(folder)
}

fn file_kind(path: &Path) -> FileKind {
    let Ok(there) = std::fs::symlink_metadata(path) else { return FileKind::Nothing };
    let kind = there.file_type();
    if kind.is_symlink() {
        std::fs::read_link(path).map_or(FileKind::Nothing, FileKind::Link)
    } else if kind.is_dir() {
        FileKind::Folder
    } else if kind.is_block_device() {
        FileKind::Device
    } else if kind.is_fifo() || kind.is_char_device() {
        FileKind::Other
    } else {
        FileKind::File
    }
}

#[cfg(test)]
#[path = "paths_tests.rs"]
mod tests;
