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

use super::SandboxPlan;

/// Maximum number of links followed, as in the kernel.
const MAX_LINKS: usize = 40;

/// Paths that may be read, appended to, or removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Readable {
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
    pub(super) notes: Vec<String>,
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
    pub(super) fn new(plan: &SandboxPlan, readable: &Readable) -> Self {
        let places = readable.folders.iter().chain(&readable.files).cloned().collect();
        Self(Some(ReadablePaths { places, known: named(plan).cloned().collect() }))
    }

    /// Returns the paths in `plan` that are new and can't be read inside the sandbox.
    pub fn unreadable(&self, plan: &SandboxPlan) -> Vec<PathBuf> {
        let Some(within) = &self.0 else { return Vec::new() };
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let new = named(plan).filter(|path| !within.known.contains(*path));
        let is_closed = |path: &&PathBuf| {
            let end = follow(&here.join(path), &look).end;
            !end.ancestors().any(|above| within.places.iter().any(|place| place == above))
        };
        let everywhere =
            plan.anywhere && !within.places.iter().any(|place| place == Path::new("/"));
        let everywhere = everywhere.then(|| PathBuf::from("/"));
        new.filter(is_closed).cloned().chain(everywhere).collect()
    }
}

/// Returns all files and folders to read that a plan names.
fn named(plan: &SandboxPlan) -> impl Iterator<Item = &PathBuf> {
    plan.files.iter().chain(&plan.reloaded).chain(&plan.folders)
}

/// Kind of file at a path whose parents aren't links.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Link(PathBuf),
    Folder,
    File,
    Device,
    /// A pipe, or a device that isn't a disk.
    Other,
    Nothing,
}

/// Result of following a path.
struct Trail {
    /// Folders of links that are the last component of a path.
    links: Vec<PathBuf>,
    /// Folders of links that lead to a place below their own folder, such as `current` to
    /// `releases/7`: such links are meant to be switched.
    switches: Vec<PathBuf>,
    end: PathBuf,
    kind: Kind,
}

impl Readable {
    /// Computes what `plan` needs, based on the links and folders as they are now.
    pub(super) fn of(plan: &SandboxPlan) -> Self {
        // Without a current directory, relative paths lead nowhere anyway.
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Self::with(plan, &here, look)
    }

    fn with(plan: &SandboxPlan, here: &Path, look: impl Fn(&Path) -> Kind) -> Self {
        let mut readable = Self::default();
        for path in plan.files.iter().chain(&plan.reloaded) {
            readable.add_file(path, follow(&here.join(path), &look));
        }
        for path in &plan.folders {
            readable.add_folder(path, follow(&here.join(path), &look));
        }
        for path in &plan.appended {
            readable.add_appended(path, follow(&here.join(path), &look));
        }
        for path in &plan.sockets {
            let folder = here.join(path).parent().map(Path::to_owned).unwrap_or_default();
            readable.add_socket(path, follow(&folder, &look).end);
        }
        if plan.anywhere {
            readable.folders.insert("/".into());
        }
        readable.drop_what_is_within();
        readable.note_what_is_both();
        readable
    }

    fn add_file(&mut self, path: &Path, trail: Trail) {
        match (&trail.kind, trail.end.parent()) {
            // The device's folder isn't allowed, since it contains other devices.
            (Kind::Device, _) => {
                self.files.insert(trail.end);
                return;
            }
            (Kind::Folder, _) | (_, None) => return,
            (_, Some(root)) if root == Path::new("/") => {
                self.notes.push(format!(
                    "{} is in the folder /, which doesn't stay readable: a file that replaces it \
                     can be read after a restart only",
                    path.display()
                ));
                self.files.insert(trail.end);
            }
            (_, Some(folder)) => {
                self.folders.insert(folder.to_owned());
            }
        }
        let links = trail.links.into_iter().chain(trail.switches);
        self.folders.extend(links.filter(|folder| folder != Path::new("/")));
    }

    fn add_folder(&mut self, path: &Path, trail: Trail) {
        if trail.kind == Kind::Nothing {
            self.notes.push(format!(
                "there is no folder {}: what comes there later can be read after a restart only",
                path.display()
            ));
            return;
        }
        self.folders.insert(trail.end);
        self.folders.extend(trail.switches.into_iter().filter(|folder| folder != Path::new("/")));
    }

    fn add_appended(&mut self, path: &Path, trail: Trail) {
        match (&trail.kind, trail.end.parent()) {
            // Its folder contains other devices, and it is never rotated.
            (Kind::Other, _) => {
                self.appendable_files.insert(trail.end);
            }
            (_, Some(root)) if root == Path::new("/") => {
                self.notes.push(format!(
                    "{} is in the folder /, where no file can be made: when it has been rotated, \
                     it takes a restart",
                    path.display()
                ));
                self.appendable_files.insert(trail.end);
            }
            (_, Some(folder)) => {
                self.appendable.insert(folder.to_owned());
            }
            (_, None) => {}
        }
    }

    /// Adds a note if an attacker inside the sandbox could append to what is read.
    fn note_what_is_both(&mut self) {
        for folder in &self.appendable {
            let is_within = |path: &&PathBuf| path.starts_with(folder);
            if let Some(both) = self.folders.iter().chain(&self.files).find(is_within) {
                self.notes.push(format!(
                    "{} is read, and can be appended to, since it is in the folder of a file that \
                     is: give that one a folder of its own",
                    both.display()
                ));
            }
        }
    }

    /// Describes what can be appended to.
    pub(super) fn appends(&self) -> String {
        let folders = self.appendable.iter().map(|folder| format!("{}/", folder.display()));
        let files = self.appendable_files.iter().map(|file| file.display().to_string());
        match folders.chain(files).collect::<Vec<_>>() {
            none if none.is_empty() => String::new(),
            some => format!(", appends to {}", some.join(", ")),
        }
    }

    fn add_socket(&mut self, path: &Path, folder: PathBuf) {
        if folder == Path::new("/") {
            self.notes.push(format!(
                "{} will stay behind at the end, until the next start: nothing may be removed \
                 from the folder /",
                path.display()
            ));
        } else {
            self.removable.insert(folder);
        }
    }

    /// Drops folders and files that are below others.
    fn drop_what_is_within(&mut self) {
        let all = self.folders.clone();
        let within = |path: &Path| path.ancestors().skip(1).any(|above| all.contains(above));
        self.folders.retain(|folder| !within(folder));
        self.files.retain(|file| !within(file));
    }
}

impl fmt::Display for Readable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.folders.contains(Path::new("/")) {
            return f.write_str("everywhere, as parents may be anywhere");
        }
        let folders = self.folders.iter().map(|folder| format!("{}/", folder.display()));
        let files = self.files.iter().map(|file| file.display().to_string());
        match folders.chain(files).collect::<Vec<_>>() {
            none if none.is_empty() => f.write_str("no file"),
            some => f.write_str(&some.join(", ")),
        }
    }
}

/// Follows an absolute path as the kernel would.
fn follow(path: &Path, look: &impl Fn(&Path) -> Kind) -> Trail {
    let mut parts: VecDeque<OsString> = parts(path).collect();
    let mut trail = Trail { links: vec![], switches: vec![], end: "/".into(), kind: Kind::Folder };
    let mut followed = 0;
    while let Some(part) = parts.pop_front() {
        if part == ".." {
            trail.end.pop();
            continue;
        }
        let next = trail.end.join(part);
        match look(&next) {
            Kind::Link(target) if followed < MAX_LINKS => {
                followed += 1;
                if parts.is_empty() {
                    trail.links.push(trail.end.clone());
                }
                if leads_below(&trail.end, &target) {
                    trail.switches.push(trail.end.clone());
                }
                if target.is_absolute() {
                    trail.end = "/".into();
                }
                for part in self::parts(&target).collect::<Vec<_>>().into_iter().rev() {
                    parts.push_front(part);
                }
            }
            kind => {
                trail.end = next;
                trail.kind = kind;
            }
        }
    }
    // After a `..` the kind of the last component no longer applies.
    trail.kind = look(&trail.end);
    trail
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> {
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

fn look(path: &Path) -> Kind {
    let Ok(there) = std::fs::symlink_metadata(path) else { return Kind::Nothing };
    let kind = there.file_type();
    if kind.is_symlink() {
        std::fs::read_link(path).map_or(Kind::Nothing, Kind::Link)
    } else if kind.is_dir() {
        Kind::Folder
    } else if kind.is_block_device() {
        Kind::Device
    } else if kind.is_fifo() || kind.is_char_device() {
        Kind::Other
    } else {
        Kind::File
    }
}

#[cfg(test)]
#[path = "paths_tests.rs"]
mod tests;
