//! Checks access to the export folder, and diagnoses why it can't be read.
//!
//! The sandbox permits the folder as it was when the sandbox was entered. A file system mounted
//! on it later is a different one, which can't be read, not even by root, whatever its
//! permissions. That looks like a permission problem, so this module finds the actual cause.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use hexz_reader::storage::{RemoteError, is_url};
use hexz_reader::{Error as SnapshotError, ErrorKind};
use nbd_telemetry::escape;

/// Error of reading the export folder.
#[derive(Debug)]
pub struct FolderError {
    /// Path of the folder.
    pub path: PathBuf,
    /// Cause, as far as it could be determined.
    pub cause: FolderFault,
    /// Error that the system returned.
    pub error: io::Error,
}

/// Cause for which a folder can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FolderFault {
    /// The folder doesn't exist.
    Missing,
    /// Another file system was mounted on it, which the sandbox doesn't permit.
    MountedSinceStart,
    /// It was replaced by another folder, which the sandbox doesn't permit.
    ReplacedSinceStart,
    /// The sandbox doesn't permit it, for another reason.
    OutsideSandbox,
    /// The store of a remote folder failed, or denied the listing.
    StoreFailed,
    /// Any other cause, such as permissions or a failing disk.
    Unreadable,
}

impl FolderError {
    /// Returns true if a store failed in a way that may be over at any time.
    pub fn is_store_down(&self) -> bool {
        self.store_failure().is_some_and(|error| error.is_transient)
    }

    /// Returns true if a store failed, or rejected requests because of the credentials or the clock.
    pub fn is_outage(&self) -> bool {
        self.store_failure().is_some_and(|error| error.is_outage)
    }

    fn store_failure(&self) -> Option<&RemoteError> {
        self.error.get_ref()?.downcast_ref()
    }
}

impl FolderFault {
    /// Returns a stable label for logs and programs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Missing => "folder_missing",
            Self::MountedSinceStart => "folder_mounted_since_start",
            Self::ReplacedSinceStart => "folder_replaced_since_start",
            Self::OutsideSandbox => "folder_outside_sandbox",
            Self::StoreFailed => "folder_store",
            Self::Unreadable => "folder_unreadable",
        }
    }

    /// Returns the label and a message for the readiness check. `None` if a store failed: that
    /// would take all gateways out of service at once, with all that they have cached.
    pub(super) fn unready(self) -> Option<&'static str> {
        Some(match self {
            Self::StoreFailed => return None,
            Self::Missing => "folder_missing: the export folder doesn't exist",
            Self::MountedSinceStart => {
                "folder_mounted_since_start: a file system was mounted on the export folder after \
                 startup, which the sandbox doesn't permit; restart"
            }
            Self::ReplacedSinceStart => {
                "folder_replaced_since_start: the export folder was replaced after startup, which \
                 the sandbox doesn't permit; restart"
            }
            Self::OutsideSandbox => {
                "folder_outside_sandbox: the sandbox doesn't permit the export folder; restart"
            }
            Self::Unreadable => "folder_unreadable: the export folder can't be read",
        })
    }
}

impl fmt::Display for FolderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, cause, error } = self;
        write!(f, "export folder {} can't be read: ", escape::path(path))?;
        match cause {
            FolderFault::Missing | FolderFault::StoreFailed | FolderFault::Unreadable => {
                error.fmt(f)
            }
            FolderFault::MountedSinceStart => f.write_str(
                "a file system was mounted on it after startup, and the sandbox permits only the \
                 folder as it was; restart, or unmount it",
            ),
            FolderFault::ReplacedSinceStart => f.write_str(
                "it was replaced after startup, and the sandbox permits only the previous folder; \
                 restart, or restore that folder",
            ),
            FolderFault::OutsideSandbox => f.write_str("the sandbox doesn't permit it; restart"),
        }
    }
}

impl std::error::Error for FolderError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Returns the likely cause if a file can't be opened although its permissions allow it: the
/// sandbox denies what was mounted or placed there since startup. Blocking.
pub(super) fn hint(error: &SnapshotError) -> Option<&'static str> {
    let is_denied = matches!(
        &error.kind,
        ErrorKind::Io(_, error) if error.kind() == io::ErrorKind::PermissionDenied
    );
    (is_denied && access(&*error.path, Access::READ_OK).is_ok()).then_some(
        "the file permissions allow access, so the sandbox denies it: it permits folders as they \
         were at startup, without what was mounted on them later",
    )
}

/// Identity of a folder, independent of its path: device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FolderId {
    device: u64,
    inode: u64,
}

impl FolderId {
    /// Returns the identity of the folder at `path`, if it exists.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let there = std::fs::metadata(path).ok()?;
        Some(Self { device: there.dev(), inode: there.ino() })
    }
}

/// Checks that the folder at `path`, whose identity at startup was `before`, can be read.
///
/// # Errors
/// [`FolderError`] with the diagnosed cause.
pub(super) fn open(path: &Path, before: Option<FolderId>) -> Result<(), FolderError> {
    match std::fs::read_dir(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(explain(path, before, error)),
    }
}

/// Diagnoses why reading the folder at `path` failed with `error`.
pub(super) fn explain(path: &Path, before: Option<FolderId>, error: io::Error) -> FolderError {
    let is_permitted = || access(path, Access::READ_OK | Access::EXEC_OK).is_ok();
    let cause = match error.kind() {
        _ if is_url(path) => FolderFault::StoreFailed,
        io::ErrorKind::NotFound => FolderFault::Missing,
        // Permissions alone don't explain it.
        io::ErrorKind::PermissionDenied if is_permitted() => moved(before, FolderId::of(path)),
        _ => FolderFault::Unreadable,
    };
    FolderError { path: path.to_owned(), cause, error }
}

fn moved(before: Option<FolderId>, now: Option<FolderId>) -> FolderFault {
    match before.zip(now) {
        Some((before, now)) if before.device != now.device => FolderFault::MountedSinceStart,
        Some((before, now)) if before != now => FolderFault::ReplacedSinceStart,
        _ => FolderFault::OutsideSandbox,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_of_unreadable_folders_are_distinguished() {
        let id = |device, inode| Some(FolderId { device, inode });
        assert_eq!(moved(id(1, 2), id(3, 2)), FolderFault::MountedSinceStart);
        assert_eq!(moved(id(1, 2), id(1, 3)), FolderFault::ReplacedSinceStart);
        assert_eq!(moved(id(1, 2), id(1, 2)), FolderFault::OutsideSandbox);
        assert_eq!(moved(None, id(1, 2)), FolderFault::OutsideSandbox);

        let folder = tempfile::tempdir().unwrap();
        let before = FolderId::of(folder.path());
        assert!(open(folder.path(), before).is_ok());
        let missing = open(&folder.path().join("none"), None).unwrap_err();
        assert_eq!(missing.cause, FolderFault::Missing);
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(open(&file, None).unwrap_err().cause, FolderFault::Unreadable);
        // Access was denied although the permissions allow it.
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = explain(folder.path(), FolderId::of(Path::new("/proc")), denied);
        assert_eq!(error.cause, FolderFault::MountedSinceStart);
        let unready = error.cause.unready();
        assert!(unready.is_some_and(|reason| reason.starts_with(error.cause.label())));
    }

    #[test]
    fn denial_despite_permissions_hints_at_the_sandbox() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (path, kind, is_hinted) in [
            (file.path(), io::ErrorKind::PermissionDenied, true),
            (file.path(), io::ErrorKind::NotFound, false),
            (Path::new("/none"), io::ErrorKind::PermissionDenied, false),
        ] {
            let error = SnapshotError::open_failed(path, io::Error::from(kind));
            assert_eq!(hint(&error).is_some(), is_hinted, "{error}");
        }
    }
}
