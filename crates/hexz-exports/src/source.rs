//! Locates archives: at a path that the operator configured, or as a file of a folder that a
//! client named.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use hexz_reader::storage::{FileStamp, FileStorage, RemoteSource, Stamp, is_url};
use hexz_reader::{Error, OpenOptions, Snapshot};
use nbd_server::wire::MAX_STRING;
use nbd_telemetry::escape;

/// Extensions of the files in a folder that are treated as archives.
const EXTENSIONS: [&str; 2] = ["hxz", "hexz"];

/// Maximum number of unserved files of a folder that are remembered.
const MAX_UNSERVED: usize = 1000;

/// An archive and its export name, written as `PATH` or `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedArchive {
    /// Name of the export.
    pub name: String,
    /// Path of the archive.
    pub path: PathBuf,
}

/// The selection of archives to serve.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportSelection {
    /// Archives with export names of their own.
    pub named: Vec<NamedArchive>,
    /// Folder whose archives are all served; they are looked up on demand.
    pub folder: Option<ExportFolder>,
    /// Export for clients that send an empty name. Without it, a single named archive is the
    /// default if there is no folder.
    pub default: Option<String>,
}

/// Reason for which a text isn't a valid archive argument.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NamedArchiveError {
    /// `=PATH` or `NAME=`.
    #[error("expected PATH or NAME=PATH, got {:?}", escape::path(.0))]
    Malformed(OsString),
    /// The name isn't UTF-8, so no client can ask for it.
    #[error(
        "the export name {:?} isn't UTF-8: give it another one (NAME=PATH)",
        escape::path(.0)
    )]
    NotUtf8(OsString),
    /// The name is longer than NBD allows, so no client can ask for it.
    #[error("the export name is longer than 4096 bytes")]
    NameTooLong,
    /// The URL is that of a folder.
    #[error("it is the URL of a folder, not of an archive")]
    Folder,
}

impl NamedArchiveError {
    /// Returns a stable label for logs and programs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::NotUtf8(_) => "not_utf8",
            Self::NameTooLong => "name_too_long",
            Self::Folder => "folder",
        }
    }
}

impl NamedArchive {
    /// Creates an entry that serves the archive at `path` under `name`.
    ///
    /// # Errors
    /// The name or the path is empty, the name is too long, or the path is the URL of a folder.
    pub fn new(name: &str, path: impl Into<PathBuf>) -> Result<Self, NamedArchiveError> {
        let (name, path) = (name.to_owned(), path.into());
        if path.to_str().is_some_and(|text| is_url(&path) && is_folder(text)) {
            return Err(NamedArchiveError::Folder);
        }
        if name.is_empty() || path.as_os_str().is_empty() {
            let mut text = OsString::from(format!("{name}="));
            text.push(path);
            return Err(NamedArchiveError::Malformed(text));
        }
        if name.len() > MAX_STRING {
            return Err(NamedArchiveError::NameTooLong);
        }
        Ok(Self { name, path })
    }

    /// Parses `PATH` or `NAME=PATH`. The name must be UTF-8, the path need not be.
    ///
    /// # Errors
    /// See [`NamedArchiveError`].
    pub fn parse(text: &OsStr) -> Result<Self, NamedArchiveError> {
        let bytes = text.as_bytes();
        if is_url(Path::new(text)) {
            return Self::of_url(text, None);
        }
        let equals = bytes.iter().position(|byte| *byte == b'=');
        let parts = equals.and_then(|at| Some((bytes.get(..at)?, bytes.get(at + 1..)?)));
        // If a file of the whole text exists, the equals sign is part of its name.
        let (name, path) = match parts {
            Some((name, url)) if is_url(Path::new(OsStr::from_bytes(url))) => {
                return Self::of_url(OsStr::from_bytes(url), Some(OsStr::from_bytes(name)));
            }
            Some((name, path)) if !Path::new(text).exists() => {
                (OsStr::from_bytes(name), Path::new(OsStr::from_bytes(path)))
            }
            _ => {
                let path = Path::new(text);
                (path.file_name().unwrap_or(text), path)
            }
        };
        let name = name.to_str().ok_or_else(|| NamedArchiveError::NotUtf8(name.to_owned()))?;
        Self::new(name, path).map_err(|error| match error {
            NamedArchiveError::Malformed(_) => NamedArchiveError::Malformed(text.to_owned()),
            error => error,
        })
    }
}

impl NamedArchive {
    /// Creates an entry for the object at `url`, by default under the last component of its path.
    fn of_url(url: &OsStr, name: Option<&OsStr>) -> Result<Self, NamedArchiveError> {
        let text = url.to_str().ok_or_else(|| NamedArchiveError::NotUtf8(url.to_owned()))?;
        let path = text.split(['?', '#']).next().unwrap_or(text);
        let file = || OsStr::new(path.rsplit('/').next().unwrap_or(path));
        let name = name.unwrap_or_else(file);
        let name = name.to_str().ok_or_else(|| NamedArchiveError::NotUtf8(name.to_owned()))?;
        Self::new(name, text)
    }
}

impl FromStr for NamedArchive {
    type Err = NamedArchiveError;

    fn from_str(text: &str) -> Result<Self, NamedArchiveError> {
        Self::parse(OsStr::new(text))
    }
}

/// A folder whose archives are served under their file names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportFolder(PathBuf);

impl ExportFolder {
    /// Creates a folder without reading it; archives are looked up on demand.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Finds the archive that a client calls `name`. The name must be that of a regular file in
    /// this folder and not of a link, so it can't lead outside. Files without an archive's
    /// extension aren't looked up, so timing doesn't reveal whether they exist.
    ///
    /// # Errors
    /// The reason for which there is none, for the operator.
    pub(super) fn find(&self, name: &str) -> Result<ArchiveSource, NotFoundReason> {
        if !is_file_name(name) {
            return Err(NotFoundReason::InvalidName);
        }
        if !is_archive_name(name) {
            let is_near = looks_like_archive(OsStr::new(name));
            return Err(if is_near {
                NotFoundReason::WrongExtension
            } else {
                NotFoundReason::UnknownName
            });
        }
        let path = self.0.join(name);
        if is_url(&self.0) {
            // Whether it exists shows when it is opened.
            return is_segment(name)
                .then_some(ArchiveSource::Path(path))
                .ok_or(NotFoundReason::InvalidName);
        }
        match std::fs::symlink_metadata(&path).map(|file| file.file_type()) {
            Ok(kind) if kind.is_file() => Ok(ArchiveSource::RegularFile(path)),
            Ok(kind) if kind.is_symlink() => Err(NotFoundReason::SymbolicLink),
            Ok(_) => Err(NotFoundReason::NotAFile),
            Err(_) => Err(NotFoundReason::UnknownName),
        }
    }

    /// Returns true if there could be an archive of this name, whether or not there is.
    pub(super) fn may_have(&self, name: &str) -> bool {
        is_file_name(name) && is_archive_name(name) && (!is_url(&self.0) || is_segment(name))
    }

    /// Lists the folder.
    ///
    /// # Errors
    /// The error of the system or of the store, if the folder can't be read.
    pub(super) fn content(&self, remote: Option<&dyn RemoteSource>) -> io::Result<FolderContents> {
        let mut content = FolderContents::default();
        if let (Some(remote), true) = (remote, is_url(&self.0)) {
            content.files = remote.list(&self.0)?;
            content.files.retain(|(name, _)| is_archive_name(name) && is_segment(name));
            content.files.sort_by(|(one, _), (other, _)| one.cmp(other));
            return Ok(content);
        }
        for entry in std::fs::read_dir(&self.0)?.filter_map(Result::ok) {
            let Ok(kind) = entry.file_type() else { continue };
            let name = entry.file_name();
            if !looks_like_archive(&name) {
                continue;
            }
            let missing = match (name.to_str(), kind.is_file()) {
                (Some(text), true) if is_archive_name(text) => {
                    // Doesn't follow a link that has replaced the file in the meantime.
                    if let Ok(file) = entry.metadata() {
                        let stamp = Stamp::File(FileStamp::from(&file));
                        content.files.push((text.to_owned(), stamp));
                    }
                    continue;
                }
                (_, false) if kind.is_symlink() => NotFoundReason::SymbolicLink,
                (_, false) => NotFoundReason::NotAFile,
                (Some(_), true) => NotFoundReason::WrongExtension,
                (None, true) => NotFoundReason::NotUtf8,
            };
            if content.unserved.len() < MAX_UNSERVED {
                content.unserved.push((name, missing));
            }
        }
        content.files.sort_by(|(one, _), (other, _)| one.cmp(other));
        content.unserved.sort();
        Ok(content)
    }

    /// Returns the source for a name from [`FolderContents::files`].
    pub(super) fn source(&self, name: &str) -> ArchiveSource {
        let path = self.0.join(name);
        if is_url(&path) { ArchiveSource::Path(path) } else { ArchiveSource::RegularFile(path) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

/// Contents of a folder.
#[derive(Debug, Default)]
pub(super) struct FolderContents {
    /// Names and stamps of its archives, ordered by name.
    pub(super) files: Vec<(String, Stamp)>,
    /// Files that look like archives but aren't served, in order; at most [`MAX_UNSERVED`].
    pub(super) unserved: Vec<(OsString, NotFoundReason)>,
}

/// Reason for which a name has no export. Only shown to the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NotFoundReason {
    /// The client sent an empty name, and there is no default export.
    NoDefault,
    /// The name isn't UTF-8.
    NotUtf8,
    /// No archive has this name.
    UnknownName,
    /// It is a path, or can't be a file name.
    InvalidName,
    /// The extension is almost that of an archive, such as `.HXZ`.
    WrongExtension,
    /// It is a symbolic link, which isn't followed.
    SymbolicLink,
    /// It is a folder, a pipe or a device.
    NotAFile,
    /// The archive has no auxiliary stream.
    NoAuxiliary,
    /// The archive can't be opened; the log says why.
    Unavailable,
}

impl NotFoundReason {
    /// Returns the label for the log and for audit events.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::NoDefault => "no_default",
            Self::NotUtf8 => "not_utf8",
            Self::UnknownName => "unknown_name",
            Self::InvalidName => "invalid_name",
            Self::WrongExtension => "wrong_extension",
            Self::SymbolicLink => "symbolic_link",
            Self::NotAFile => "not_a_file",
            Self::NoAuxiliary => "no_auxiliary_stream",
            Self::Unavailable => "unavailable",
        }
    }
}

/// Returns true if a file name has an archive's extension, ignoring case.
fn looks_like_archive(name: &OsStr) -> bool {
    let extension = Path::new(name).extension().map(OsStr::as_bytes);
    extension.is_some_and(|extension| {
        EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known.as_bytes()))
    })
}

fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(part)), None) if part == OsStr::new(name)
    )
}

/// Returns true if a URL is that of a folder: it has no path, or one that ends in a slash.
fn is_folder(url: &str) -> bool {
    let url = url.split(['?', '#']).next().unwrap_or(url);
    let place = url.split_once("://").map_or(url, |(_, place)| place);
    place.ends_with('/') || !place.contains('/')
}

/// Returns true if a name stands for itself as a segment of a URL.
fn is_segment(name: &str) -> bool {
    !name.bytes().any(|byte| b"?#%\\".contains(&byte))
}

fn is_archive_name(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
}

/// File from which a snapshot is opened.
#[derive(Debug)]
pub(super) enum ArchiveSource {
    /// A path from the operator, in which links are followed.
    Path(PathBuf),
    /// A file that a client named, which must not be a link.
    RegularFile(PathBuf),
}

impl ArchiveSource {
    pub(super) fn open(&self, options: &OpenOptions) -> Result<Snapshot, Error> {
        match self {
            Self::Path(path) => Snapshot::open(path, options),
            Self::RegularFile(path) => {
                let storage = FileStorage::open_no_follow(path)
                    .map_err(|error| Error::open_failed(path, error))?;
                Snapshot::from_storage(path, Arc::new(storage), options)
            }
        }
    }

    /// Opens it only for what header and index contain ([`Snapshot::open_index`]).
    pub(super) fn open_index(&self, options: &OpenOptions) -> Result<Snapshot, Error> {
        match self {
            Self::Path(path) => Snapshot::open_index(path, None, options),
            Self::RegularFile(path) => {
                let storage = FileStorage::open_no_follow(path)
                    .map_err(|error| Error::open_failed(path, error))?;
                Snapshot::open_index(path, Some(Arc::new(storage)), options)
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        let (Self::Path(path) | Self::RegularFile(path)) = self;
        path
    }
}

/// Returns the last component of a path, for display to clients.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_arguments_are_parsed() {
        let named =
            |name: &str, path: &str| Ok(NamedArchive { name: name.into(), path: path.into() });
        assert_eq!("a/b.hxz".parse(), named("b.hxz", "a/b.hxz"));
        assert_eq!("disk=a/b.hxz".parse(), named("disk", "a/b.hxz"));
        assert_eq!("disk=a=b.hxz".parse(), named("disk", "a=b.hxz"));
        assert_eq!("s3://b/v=1/d.hxz".parse(), named("d.hxz", "s3://b/v=1/d.hxz"));
        assert_eq!("web=s3://b/d.hxz".parse(), named("web", "s3://b/d.hxz"));
        assert_eq!("https://h/d.hxz?a=b/c".parse(), named("d.hxz", "https://h/d.hxz?a=b/c"));
        assert_eq!("x=https://h/d?a=b".parse(), named("x", "https://h/d?a=b"));
        assert_eq!("HTTPS://h/d.hxz".parse(), named("d.hxz", "HTTPS://h/d.hxz"));
        for bad in ["", "=x", "x=", "=s3://b/k"] {
            let malformed = NamedArchiveError::Malformed(bad.into());
            assert_eq!(bad.parse::<NamedArchive>(), Err(malformed), "{bad}");
        }
        for folder in ["s3://b/", "s3://b", "x=http://h/v7/?a/b", "https://h?a=b/c", "s3://"] {
            assert_eq!(folder.parse::<NamedArchive>(), Err(NamedArchiveError::Folder), "{folder}");
        }
    }

    #[test]
    fn names_cannot_escape_the_folder() {
        let outside = tempfile::tempdir().unwrap();
        let secret = outside.path().join("secret.hxz");
        std::fs::write(&secret, "x").unwrap();
        let inside = tempfile::tempdir_in(outside.path()).unwrap();
        std::fs::write(inside.path().join("a.hxz"), "x").unwrap();
        std::fs::write(inside.path().join("b.txt"), "x").unwrap();
        std::fs::create_dir(inside.path().join("c.hxz")).unwrap();
        std::os::unix::fs::symlink(&secret, inside.path().join("d.hxz")).unwrap();

        let folder = ExportFolder::new(inside.path().to_owned());
        let odd = OsStr::from_bytes(b"\xff.hxz");
        std::fs::write(inside.path().join(odd), "x").unwrap();
        std::fs::write(inside.path().join("e.HXZ"), "x").unwrap();
        let content = folder.content(None).unwrap();
        let names = content.files.into_iter().map(|(name, _)| name);
        assert_eq!(names.collect::<Vec<_>>(), ["a.hxz"]);
        let unserved = [
            ("c.hxz".into(), NotFoundReason::NotAFile),
            ("d.hxz".into(), NotFoundReason::SymbolicLink),
            ("e.HXZ".into(), NotFoundReason::WrongExtension),
            (odd.to_owned(), NotFoundReason::NotUtf8),
        ];
        assert_eq!(content.unserved, unserved);
        assert!(folder.find("a.hxz").is_ok());
        let absolute = secret.to_str().unwrap();
        for (name, missing) in [
            ("", NotFoundReason::InvalidName),
            (".", NotFoundReason::InvalidName),
            ("..", NotFoundReason::InvalidName),
            ("../secret.hxz", NotFoundReason::InvalidName),
            ("./a.hxz", NotFoundReason::InvalidName),
            ("a.hxz/", NotFoundReason::InvalidName),
            ("a.hxz/.", NotFoundReason::InvalidName),
            ("/a.hxz", NotFoundReason::InvalidName),
            (absolute, NotFoundReason::InvalidName),
            ("b.txt", NotFoundReason::UnknownName),
            ("c.hxz", NotFoundReason::NotAFile),
            ("d.hxz", NotFoundReason::SymbolicLink),
            ("none.hxz", NotFoundReason::UnknownName),
            ("a.hxz\0", NotFoundReason::UnknownName),
            ("a.HXZ", NotFoundReason::WrongExtension),
            ("c.hxz/../a.hxz", NotFoundReason::InvalidName),
        ] {
            assert_eq!(folder.find(name).err(), Some(missing), "{name:?}");
        }
    }
}
