//! Writes to standard output, which its reader may close.

use std::io::{self, Write, stdout};

use crate::failure::Failure;

/// Prints the result of a command.
pub(crate) fn print(what: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut out = stdout().lock();
    out.write_all(what.as_ref()).and_then(|()| out.flush()).map_err(Failure::Output)
}

/// Returns true if the reader of the output has closed it, as with `| head`.
pub(crate) fn is_closed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}
