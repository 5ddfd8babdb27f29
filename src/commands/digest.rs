//! Implements `hexz-nbd digest`: prints the BLAKE3 digests of files, in the format that
//! `--digest` and `b3sum --check` read.

use hexz_reader::{Digest, Error, OpenOptions};

use crate::cli;
use crate::commands::output;
use crate::exit_status::Failure;
use crate::service::archives;

/// Prints a line for each file. Stops at the first file that can't be read.
pub(crate) fn run(options: &cli::Digest) -> Result<(), Failure> {
    let mut files = options.files.clone();
    let open = archives::with_stores(OpenOptions::default(), &mut files, &options.stores)?;
    for path in &files {
        let digest = open
            .open_storage(path)
            .and_then(|file| Digest::of(file.as_ref()))
            .map_err(|error| Error::open_failed(path, error))?;
        let mut line = hexz_reader::format_line(digest, path);
        line.push(b'\n');
        output::print(&line)?;
    }
    Ok(())
}
