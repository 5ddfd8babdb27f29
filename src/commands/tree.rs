//! Implements `hexz-nbd tree`: writes tree files, and prints digests like `hexz-nbd digest`.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use hexz_reader::storage::{FileStorage, is_url};
use hexz_reader::{DigestTree, Error, tree_path};
use tempfile::NamedTempFile;

use crate::cli;
use crate::commands::output;
use crate::exit_status::{Failure, WriteError};

/// Writes a tree file for each file, and prints a line. Stops at the first failure.
pub(crate) fn run(options: &cli::Tree) -> Result<(), Failure> {
    for path in &options.files {
        if is_url(path) {
            let message = "a tree file is written beside a local file: run this where the archive \
                           is, and copy its tree file into the store";
            let error = io::Error::new(io::ErrorKind::Unsupported, message);
            return Err(Error::open_failed(path, error).into());
        }
        let tree = FileStorage::open(path)
            .and_then(|file| DigestTree::of(&file))
            .map_err(|error| Error::open_failed(path, error))?;
        let tree_file = tree_path(path);
        write(&tree, path, &tree_file)
            .map_err(|error| WriteError { path: tree_file.clone(), error })?;
        let mut line = hexz_reader::format_line(tree.digest(), path);
        line.push(b'\n');
        output::print(&line)?;
    }
    Ok(())
}

/// Writes the tree of the file at `path` to `tree_file`, which is complete as soon as it exists.
/// Everyone who can read the file can read its tree.
fn write(tree: &DigestTree, path: &Path, tree_file: &Path) -> io::Result<()> {
    let folder = tree_file.parent().filter(|folder| *folder != Path::new(""));
    let unfinished = NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
    let mut out = BufWriter::new(unfinished.as_file());
    tree.write(&mut out)?;
    out.flush()?;
    drop(out);
    unfinished.as_file().set_permissions(fs::metadata(path)?.permissions())?;
    unfinished.persist(tree_file)?;
    Ok(())
}
