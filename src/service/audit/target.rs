//! Output of the audit: a file that is appended to, a pipe, or standard output.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nbd_telemetry::escape;
use rustix::fs::{Access, CWD, Mode, OFlags, access, openat};
use rustix::io::Errno;

/// Flags that a file is opened with; the sandbox allows no others. Links aren't followed: whoever
/// can create one in the folder could make the program append to another file. Non-blocking, since
/// a named pipe may have no reader.
const FLAGS: OFlags = OFlags::WRONLY
    .union(OFlags::APPEND)
    .union(OFlags::CREATE)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK);

/// Mode of a file that is created. An existing file keeps its own.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR).union(Mode::RGRP);

/// An open output that lines are appended to.
#[derive(Debug)]
pub(crate) struct AuditTarget {
    file: File,
    kind: SinkKind,
    /// True if the output may end in the middle of a line.
    may_end_mid_line: bool,
}

#[derive(Debug)]
enum SinkKind {
    StandardOutput,
    /// A regular file, which can be rotated.
    File(PathBuf),
    /// A pipe or a device, which can't.
    Other(PathBuf),
}

/// Reason why a target can't be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TargetError {
    /// The path is a link.
    #[error("{} is a symbolic link, which isn't followed: {}", escape::path(.0), link_hint(.0))]
    Link(PathBuf),
    /// The path is a pipe without a reader.
    #[error("the pipe {} has no reader: start the reader first", escape::path(.0))]
    NoReader(PathBuf),
    /// The path is neither a file nor a pipe.
    #[error("{} is neither a regular file nor a pipe", escape::path(.0))]
    NotAppendable(PathBuf),
    /// A system call failed.
    #[error("can't append to {}: {error}", escape::path(.path))]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        error: io::Error,
    },
    /// Standard output can't be used.
    #[error("can't use standard output: {0}")]
    StandardOutput(#[source] io::Error),
}

impl TargetError {
    /// Returns the label of the error.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Link(_) => "audit_link",
            Self::NoReader(_) => "audit_no_reader",
            Self::NotAppendable(_) => "audit_not_appendable",
            Self::Io { .. } => "audit_unwritable",
            Self::StandardOutput(_) => "audit_stdout",
        }
    }
}

/// Returns a hint on what to give instead of a link.
fn link_hint(path: &Path) -> &'static str {
    let standard_output = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
    match standard_output.iter().any(|name| path == Path::new(name)) {
        true => "use - for standard output",
        false => "give the path of the file itself",
    }
}

impl AuditTarget {
    /// Returns a target that writes to standard output.
    ///
    /// # Errors
    /// Standard output is closed, or the process has no descriptors left.
    pub(crate) fn standard_output() -> Result<Self, TargetError> {
        let copy = io::stdout().as_fd().try_clone_to_owned();
        let file = copy.map_err(TargetError::StandardOutput)?.into();
        Ok(Self { file, kind: SinkKind::StandardOutput, may_end_mid_line: false })
    }

    /// Opens a file or a pipe. A missing file is created with mode 0640.
    ///
    /// # Errors
    /// See [`TargetError`].
    pub(crate) fn open(path: &Path) -> Result<Self, TargetError> {
        let mut target = open(path)?;
        // An earlier run may have ended in the middle of a line. If the file can't be read, as in
        // the sandbox, assume that: an empty line is harmless.
        target.may_end_mid_line &= !ends_with_newline(path).unwrap_or(false);
        Ok(target)
    }

    /// Checks whether a file could be opened by this user. Doesn't create it, and doesn't open a
    /// pipe.
    ///
    /// # Errors
    /// See [`TargetError`].
    pub(crate) fn check(path: &Path) -> Result<(), TargetError> {
        let failed = |error: io::Error| TargetError::Io { path: path.to_owned(), error };
        let checked = match std::fs::symlink_metadata(path) {
            Ok(there) if there.is_symlink() => return Err(TargetError::Link(path.to_owned())),
            Ok(there) if there.is_dir() => return Err(TargetError::NotAppendable(path.to_owned())),
            Ok(_) => access(path, Access::WRITE_OK),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let folder = path.parent().filter(|folder| *folder != Path::new(""));
                access(folder.unwrap_or(Path::new(".")), Access::WRITE_OK | Access::EXEC_OK)
            }
            Err(error) => return Err(failed(error)),
        };
        checked.map_err(|error| failed(error.into()))
    }

    /// Opens the path again if it leads to another file by now, as after log rotation by renaming.
    /// Returns true if it did.
    ///
    /// # Errors
    /// See [`TargetError`]; the target is unchanged then.
    pub(super) fn reopen(&mut self) -> Result<bool, TargetError> {
        let SinkKind::File(path) = &self.kind else { return Ok(false) };
        let same = |there: &std::fs::Metadata, here: &std::fs::Metadata| {
            (there.dev(), there.ino()) == (here.dev(), here.ino())
        };
        if let (Ok(there), Ok(here)) = (std::fs::symlink_metadata(path), self.file.metadata())
            && same(&there, &here)
        {
            return Ok(false);
        }
        *self = Self::open(path)?;
        Ok(true)
    }

    /// Writes some of `bytes` and returns how many. `at_line` says that they begin at the start of
    /// a line.
    pub(super) fn write(&mut self, bytes: &[u8], at_line: bool) -> io::Result<usize> {
        if self.may_end_mid_line && at_line {
            self.file.write_all(b"\n")?;
        }
        self.may_end_mid_line = false;
        match self.file.write(bytes) {
            Ok(0) if !bytes.is_empty() => Err(io::ErrorKind::WriteZero.into()),
            written => written,
        }
    }

    /// Returns the current length, if it is a file.
    pub(super) fn length(&self) -> Option<u64> {
        match self.kind {
            SinkKind::File(_) => self.file.metadata().ok().map(|file| file.len()),
            SinkKind::Other(_) | SinkKind::StandardOutput => None,
        }
    }

    /// Ensures that the next line starts a new one, whatever precedes it.
    pub(super) fn start_new_line(&mut self) {
        self.may_end_mid_line = self.length() != Some(0);
    }

    /// Waits until the data is on disk. Does nothing for pipes, devices and standard output.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self.kind {
            SinkKind::File(_) => self.file.sync_data(),
            SinkKind::Other(_) | SinkKind::StandardOutput => Ok(()),
        }
    }
}

impl fmt::Display for AuditTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            SinkKind::StandardOutput => f.write_str("standard output"),
            SinkKind::File(path) | SinkKind::Other(path) => escape::path(path).fmt(f),
        }
    }
}

fn open(path: &Path) -> Result<AuditTarget, TargetError> {
    let failed = |error: io::Error| TargetError::Io { path: path.to_owned(), error };
    let file = openat(CWD, path, FLAGS, MODE).map(File::from).map_err(|error| match error {
        Errno::LOOP => TargetError::Link(path.to_owned()),
        Errno::NXIO => TargetError::NoReader(path.to_owned()),
        error => failed(error.into()),
    })?;
    let there = file.metadata().map_err(failed)?;
    let kind = there.file_type();
    let sink = if kind.is_file() {
        SinkKind::File(path.to_owned())
    } else if kind.is_fifo() || kind.is_char_device() {
        SinkKind::Other(path.to_owned())
    } else {
        return Err(TargetError::NotAppendable(path.to_owned()));
    };
    Ok(AuditTarget { file, kind: sink, may_end_mid_line: kind.is_file() && there.len() > 0 })
}

fn ends_with_newline(path: &Path) -> io::Result<bool> {
    // Opening a pipe would block.
    if !std::fs::symlink_metadata(path)?.is_file() {
        return Ok(true);
    }
    let mut file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, mknodat};
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn missing_file_is_created_and_existing_one_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (new, old) = (folder.path().join("new"), folder.path().join("old"));
        AuditTarget::open(&new).unwrap();
        assert_eq!(mode(&new) & !0o640, 0);
        fs::write(&old, "before\n").unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o604)).unwrap();
        AuditTarget::open(&old).unwrap().write(b"after\n", true).unwrap();
        assert_eq!(
            (mode(&old), fs::read_to_string(&old).unwrap().as_str()),
            (0o604, "before\nafter\n")
        );
    }

    #[test]
    fn partial_line_of_an_earlier_run_is_terminated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "{\"half").unwrap();
        AuditTarget::open(&path).unwrap().write(b"{}\n", true).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"half\n{}\n");
    }

    #[test]
    fn links_folders_and_unread_pipes_are_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), "").unwrap();
        symlink("file", at("link")).unwrap();
        assert!(matches!(AuditTarget::open(&at("link")), Err(TargetError::Link(_))));
        assert!(matches!(AuditTarget::open(folder.path()), Err(TargetError::Io { .. })));
        assert!(matches!(AuditTarget::open(&at("none/file")), Err(TargetError::Io { .. })));
        mknodat(CWD, at("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(matches!(AuditTarget::open(&at("pipe")), Err(TargetError::NoReader(_))));

        assert!(matches!(AuditTarget::check(&at("link")), Err(TargetError::Link(_))));
        assert!(matches!(AuditTarget::check(folder.path()), Err(TargetError::NotAppendable(_))));
        assert!(matches!(AuditTarget::check(&at("none/file")), Err(TargetError::Io { .. })));
        for good in ["file", "pipe", "new"] {
            AuditTarget::check(&at(good)).unwrap();
        }
        assert!(!at("new").exists());
    }

    #[test]
    fn wording_of_hints_about_links() {
        let link = |path: &str| TargetError::Link(path.into()).to_string();
        assert!(link("/dev/stdout").ends_with("use - for standard output"));
        assert!(link("/dev/log").ends_with("give the path of the file itself"));
    }

    #[test]
    fn reopening_a_file_of_whole_lines_adds_no_empty_line() {
        let folder = tempfile::tempdir().unwrap();
        let (path, new) = (folder.path().join("a"), folder.path().join("new"));
        let mut target = AuditTarget::open(&path).unwrap();
        for (before, after) in [("1\n", "1\n2\n"), ("half", "half\n2\n"), ("", "2\n")] {
            fs::write(&new, before).unwrap();
            fs::rename(&new, &path).unwrap();
            assert!(target.reopen().unwrap());
            target.write(b"2\n", true).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn rotated_file_is_created_again_on_reopen() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("a"), folder.path().join("a.1"));
        let mut target = AuditTarget::open(&path).unwrap();
        assert!(!target.reopen().unwrap());
        target.write(b"1\n", true).unwrap();
        fs::rename(&path, &old).unwrap();
        target.write(b"2\n", true).unwrap();
        assert!(target.reopen().unwrap());
        target.write(b"3\n", true).unwrap();
        assert_eq!(fs::read_to_string(&old).unwrap(), "1\n2\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "3\n");
        // Reopening fails: the old file is still used.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(target.reopen().is_err());
        target.write(b"4\n", true).unwrap();
    }
}
