//! The file that says which process this is, for those who send it signals.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::failure::Failure;

/// Everybody may know.
const MODE: u32 = 0o644;

/// Writes it in one go: who finds the file finds the whole number in it. A link in its place is
/// replaced, not followed.
pub(crate) fn write(path: &Path) -> Result<(), Failure> {
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
    written().map_err(|error| Failure::Write { path: path.to_owned(), error })
}
