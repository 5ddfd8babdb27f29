//! Where a snapshot comes from: a path that the operator gave, or a file of a folder that
//! a client named.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::escape;
use crate::nbd::wire::MAX_STRING;
use crate::snapshot::{Error, OpenOptions, Snapshot};
use crate::storage::FileStorage;

/// How files of a folder end that are taken for archives.
const EXTENSIONS: [&str; 2] = ["hxz", "hexz"];

/// An archive with the name that it is served under: `PATH`, or `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The export's name.
    pub name: String,
    /// The archive's path.
    pub path: PathBuf,
}

/// Which archives are served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Archives that are served under these names.
    pub named: Vec<Named>,
    /// A folder of which all archives are, found when they are asked for.
    pub folder: Option<Folder>,
    /// The export for clients that name none. Without it there is one only where there is one
    /// snapshot.
    pub default: Option<String>,
}

/// Why a text doesn't name an archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NamedError {
    /// `=PATH` or `NAME=`.
    #[error("{:?} is neither PATH nor NAME=PATH", escape::name(.0))]
    Unreadable(String),
    /// A name that no client could ask for.
    #[error("an export's name has at most 4096 bytes")]
    NameTooLong,
}

impl Named {
    /// Serves the archive at `path` under a name.
    ///
    /// # Errors
    /// One of them is empty, or the name is too long.
    pub fn new(name: &str, path: impl Into<PathBuf>) -> Result<Self, NamedError> {
        let (name, path) = (name.to_owned(), path.into());
        if name.is_empty() || path.as_os_str().is_empty() {
            return Err(NamedError::Unreadable(format!("{name}={}", path.display())));
        }
        if name.len() > MAX_STRING {
            return Err(NamedError::NameTooLong);
        }
        Ok(Self { name, path })
    }
}

impl FromStr for Named {
    type Err = NamedError;

    fn from_str(text: &str) -> Result<Self, NamedError> {
        // A file whose own name has an equals sign is more likely meant than a new name.
        let (name, path) = match text.split_once('=') {
            Some((name, path)) if !Path::new(text).exists() => (name.to_owned(), path),
            _ => (super::file_name(Path::new(text)), text),
        };
        Self::new(&name, path).map_err(|error| match error {
            NamedError::Unreadable(_) => NamedError::Unreadable(text.to_owned()),
            error => error,
        })
    }
}

/// A folder whose archives are served under their file names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder(PathBuf);

impl Folder {
    /// Takes a folder as it is; what is in it is looked up when it is asked for.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The archive that a client calls `name`. A name is one file's of this folder, and
    /// no link: it can't lead anywhere else.
    pub(super) fn find(&self, name: &str) -> Option<Source> {
        let mut parts = Path::new(name).components();
        let is_file_name = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(part)), None) if part == OsStr::new(name)
        );
        if !is_file_name || !is_archive_name(name) {
            return None;
        }
        let path = self.0.join(name);
        let is_file = std::fs::symlink_metadata(&path).is_ok_and(|file| file.is_file());
        is_file.then_some(Source::NoLink(path))
    }

    /// The names of its archives, in order.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let mut names: Vec<String> = std::fs::read_dir(&self.0)?
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| is_archive_name(name))
            .collect();
        names.sort();
        Ok(names)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

fn is_archive_name(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
}

/// Where one snapshot is opened from.
#[derive(Debug)]
pub(super) enum Source {
    /// The operator's path, links and all.
    Path(PathBuf),
    /// A client's choice, which must not be a link.
    NoLink(PathBuf),
}

impl Source {
    pub(super) fn open(&self, options: &OpenOptions) -> Result<Snapshot, Error> {
        match self {
            Self::Path(path) => Snapshot::open(path, options),
            Self::NoLink(path) => {
                let storage =
                    FileStorage::open_no_link(path).map_err(|error| Error::opening(path, error))?;
                Snapshot::from_storage(path, Arc::new(storage), options)
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        let (Self::Path(path) | Self::NoLink(path)) = self;
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_names() {
        let named = |name: &str, path: &str| Ok(Named { name: name.into(), path: path.into() });
        assert_eq!("a/b.hxz".parse(), named("b.hxz", "a/b.hxz"));
        assert_eq!("disk=a/b.hxz".parse(), named("disk", "a/b.hxz"));
        assert_eq!("disk=a=b.hxz".parse(), named("disk", "a=b.hxz"));
        for bad in ["", "=x", "x="] {
            assert!(bad.parse::<Named>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_stays_in_the_folder() {
        let outside = tempfile::tempdir().unwrap();
        let secret = outside.path().join("secret.hxz");
        std::fs::write(&secret, "x").unwrap();
        let inside = tempfile::tempdir_in(outside.path()).unwrap();
        std::fs::write(inside.path().join("a.hxz"), "x").unwrap();
        std::fs::write(inside.path().join("b.txt"), "x").unwrap();
        std::fs::create_dir(inside.path().join("c.hxz")).unwrap();
        std::os::unix::fs::symlink(&secret, inside.path().join("d.hxz")).unwrap();

        let folder = Folder::new(inside.path().to_owned());
        assert_eq!(folder.names().unwrap(), ["a.hxz"]);
        assert!(folder.find("a.hxz").is_some());
        let absolute = secret.to_str().unwrap();
        for name in [
            "",
            ".",
            "..",
            "../secret.hxz",
            "./a.hxz",
            "a.hxz/",
            "a.hxz/.",
            "/a.hxz",
            absolute,
            "b.txt",
            "c.hxz",
            "d.hxz",
            "none.hxz",
            "a.hxz\0",
            "a.HXZ",
            "c.hxz/../a.hxz",
        ] {
            assert!(folder.find(name).is_none(), "{name:?}");
        }
    }
}
