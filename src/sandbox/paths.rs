//! Which folders have to stay readable for all that may be opened later.
//!
//! Files are replaced by renaming others over them, and links by other links, so what is
//! allowed is the folder: of the file, and of the link that leads to it. Whoever can't put
//! files there can't make more readable.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use super::Plan;

/// As many as the kernel follows.
const MAX_LINKS: usize = 40;

/// What may be read, and where files may be removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Readable {
    /// Folders, with all that is below them.
    pub(super) folders: BTreeSet<PathBuf>,
    /// Single files and block devices.
    pub(super) files: BTreeSet<PathBuf>,
    /// Folders of files that are appended to, and may be made anew.
    pub(super) appendable: BTreeSet<PathBuf>,
    /// The same of what is no file, such as pipes.
    pub(super) appendable_files: BTreeSet<PathBuf>,
    /// Folders of Unix sockets.
    pub(super) removable: BTreeSet<PathBuf>,
    /// What won't work, and why.
    pub(super) notes: Vec<String>,
}

/// What can still be read, for those who are told of other files later.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confines(Option<Within>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Within {
    /// Folders and files.
    places: Vec<PathBuf>,
    /// All that was asked for at the start. Of what can't be read of that something has been
    /// said then.
    known: BTreeSet<PathBuf>,
}

impl Confines {
    pub(super) fn new(plan: &Plan, readable: &Readable) -> Self {
        let places = readable.folders.iter().chain(&readable.files).cloned().collect();
        Self(Some(Within { places, known: named(plan).cloned().collect() }))
    }

    /// What `plan` wants to read that is new, and can't be read in here.
    pub fn closed(&self, plan: &Plan) -> Vec<PathBuf> {
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

/// All files and folders of a plan.
fn named(plan: &Plan) -> impl Iterator<Item = &PathBuf> {
    plan.files.iter().chain(&plan.reloaded).chain(&plan.folders)
}

/// What is at a path that leads over no link but in its last part.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Link(PathBuf),
    Folder,
    File,
    Device,
    /// A pipe, or a device that is no disk.
    Other,
    Nothing,
}

/// Where a path leads.
struct Trail {
    /// The folders of links that are the last part of a path.
    links: Vec<PathBuf>,
    /// The folders of other links that lead to a place below their folder, such as `current`
    /// to `releases/7`: those are made to be exchanged.
    switches: Vec<PathBuf>,
    end: PathBuf,
    kind: Kind,
}

impl Readable {
    /// What `plan` needs, as links and folders are now.
    pub(super) fn of(plan: &Plan) -> Self {
        // Without a current folder relative paths lead nowhere anyway.
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Self::with(plan, &here, look)
    }

    fn with(plan: &Plan, here: &Path, look: impl Fn(&Path) -> Kind) -> Self {
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
            // Beside a device there are others.
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
            // Beside it there are others, and nobody puts it out of the way.
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

    /// Says where whoever takes the program over could append to what it reads.
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

    /// What can be appended to, for people.
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

    /// Leaves out folders and files that are below others.
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
    // After .. it is a folder.
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

/// Whether a link in `folder` to `target` leads to something below that folder.
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
