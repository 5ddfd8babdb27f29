//! Checks access to the folder of `--export-dir`, and diagnoses why it can't be read.
//!
//! The sandbox permits the folder as it was when the sandbox was entered. A file system mounted
//! on it later is a different one, which can't be read, not even by root, whatever its
//! permissions. That looks like a permission problem, so this module finds the actual cause.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, access};
use tokio::task::spawn_blocking;

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
    NotFoundReason,
    /// Another file system was mounted on it, which the sandbox doesn't permit.
    MountedSinceStart,
    /// It was replaced by another folder, which the sandbox doesn't permit.
    ReplacedSinceStart,
    /// The sandbox doesn't permit it, for another reason.
    OutsideSandbox,
    /// Any other cause, such as permissions or a failing disk.
    Unreadable,
}

impl FolderFault {
    /// Returns a stable label for logs and programs.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotFoundReason => "folder_missing",
            Self::MountedSinceStart => "folder_mounted_since_start",
            Self::ReplacedSinceStart => "folder_replaced_since_start",
            Self::OutsideSandbox => "folder_outside_sandbox",
            Self::Unreadable => "folder_unreadable",
        }
    }

    /// Returns the label and a message for the readiness check.
    pub(super) fn unready(self) -> &'static str {
        match self {
            Self::NotFoundReason => {
                "folder_missing: there is no folder at the path of --export-dir"
            }
            Self::MountedSinceStart => {
                "folder_mounted_since_start: a file system was mounted on the folder of \
                 --export-dir, which the sandbox doesn't admit; it takes a restart"
            }
            Self::ReplacedSinceStart => {
                "folder_replaced_since_start: another folder is at the path of --export-dir, which \
                 the sandbox doesn't admit; it takes a restart"
            }
            Self::OutsideSandbox => {
                "folder_outside_sandbox: the sandbox doesn't admit the folder of --export-dir; it \
                 takes a restart"
            }
            Self::Unreadable => "folder_unreadable: the folder of --export-dir can't be read",
        }
    }
}

impl fmt::Display for FolderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, cause, error } = self;
        write!(f, "the export folder {} can't be read: ", escape::name(path))?;
        match cause {
            FolderFault::NotFoundReason | FolderFault::Unreadable => error.fmt(f),
            FolderFault::MountedSinceStart => f.write_str(
                "a file system has been mounted on it since the start, and the sandbox admits only \
                 what was there then: restart, or unmount it",
            ),
            FolderFault::ReplacedSinceStart => f.write_str(
                "another folder has taken its place since the start, and the sandbox admits only \
                 the one that was there then: restart, or put that one back",
            ),
            FolderFault::OutsideSandbox => {
                f.write_str("the sandbox doesn't admit it: restart, or see --sandbox")
            }
        }
    }
}

impl std::error::Error for FolderError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Pairs the error with its [`hint`], without blocking the runtime.
pub(super) async fn with_hint(error: SnapshotError) -> (SnapshotError, &'static str) {
    if !is_denied(&error) {
        return (error, "");
    }
    let path = Arc::clone(&error.path);
    let hint = spawn_blocking(move || hint_at(&path)).await;
    (error, hint.unwrap_or(""))
}

/// Returns the likely cause if a file can't be opened although its permissions allow it: the
/// sandbox denies what was mounted or placed there since startup. Empty if that isn't the case.
/// Blocking.
pub(super) fn hint(error: &SnapshotError) -> &'static str {
    if is_denied(error) { hint_at(&error.path) } else { "" }
}

fn is_denied(error: &SnapshotError) -> bool {
    matches!(
        &error.kind,
        ErrorKind::Io(_, error) if error.kind() == io::ErrorKind::PermissionDenied
    )
}

fn hint_at(path: &Path) -> &'static str {
    match access(path, Access::READ_OK) {
        Ok(()) => {
            "; its permissions allow it, so it is the sandbox that doesn't: it admits folders as \
             they were at the start, without what has been mounted on them since"
        }
        Err(_) => "",
    }
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
        io::ErrorKind::NotFound => FolderFault::NotFoundReason,
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
        assert_eq!(missing.cause, FolderFault::NotFoundReason);
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(open(&file, None).unwrap_err().cause, FolderFault::Unreadable);
        // Access was denied although the permissions allow it.
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = explain(folder.path(), FolderId::of(Path::new("/proc")), denied);
        assert_eq!(error.cause, FolderFault::MountedSinceStart);
        assert!(error.cause.unready().starts_with(error.cause.label()));
    }

    #[tokio::test]
    async fn denial_despite_permissions_hints_at_the_sandbox() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let opening = |path: &Path, kind| SnapshotError::open_failed(path, io::Error::from(kind));
        for (path, kind, is_hinted) in [
            (file.path(), io::ErrorKind::PermissionDenied, true),
            (file.path(), io::ErrorKind::NotFound, false),
            (Path::new("/none"), io::ErrorKind::PermissionDenied, false),
        ] {
            let error = opening(path, kind);
            assert_eq!(hint(&error).contains("sandbox"), is_hinted, "{error}");
            assert_eq!(with_hint(opening(path, kind)).await.1, hint(&error));
        }
    }
}
