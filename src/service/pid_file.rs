//! Writes the file with the process ID, for those who send it signals.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::exit_status::WriteError;

/// Permissions: readable by everyone.
const MODE: u32 = 0o644;

/// Writes the file atomically, so that readers never see a partial number. A symbolic link at
/// `path` is replaced, not followed.
pub(crate) fn write(path: &Path) -> Result<(), WriteError> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let written = || -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(".hexz-nbd-")
            .permissions(Permissions::from_mode(MODE))
            .tempfile_in(folder.unwrap_or(Path::new(".")))?;
        writeln!(file, "{}", std::process::id())?;
        file.persist(path)?;
        Ok(())
    };
    written().map_err(|error| WriteError { path: path.to_owned(), error })
}
